"""A conversation that each view sees with its own replies."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import jax

from ctxjax import rng
from ctxjax.chat.speaker import Speaker
from ctxjax.chat.stream import stream
from ctxjax.data import prompts as prompts_lib, responses
from ctxjax.data.task import Row
from ctxjax.distill.sampling import SamplingConfig

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the text of a character of which only the first tokens are sampled


@dataclasses.dataclass(frozen=True)
class Decoding:
    """See ``ctxjax.generate``."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """One view's reply so far. ``is_cut``: it ended because it has as many tokens as are allowed."""

    text: str
    has_ended: bool
    is_cut: bool = False


class Conversation:
    """Questions and replies, without the context and with it; without a ``context`` (None) there is one view.

    ``views``: the context of each view. ``speaker`` may change its arm, but not in the middle of a conversation.
    """

    def __init__(self, speaker: Speaker, context: str | None, decoding: Decoding):
        self._speaker, self._decoding = speaker, decoding
        folder = speaker.folder
        self._sampling = SamplingConfig(
            decoding.max_tokens, folder.stop_ids, folder.pad_id, decoding.temperature, weights=speaker.weights
        )
        self.start(context)

    def start(self, context: str | None) -> None:
        """Begin anew. Raises ValueError, and changes nothing, if the model cannot read ``context``."""
        views = [None] if context is None else [None, context]
        self._encode("?", views, [[] for _ in views])
        self.context, self.views = context, views
        self._turns: list[list[tuple[str, str]]] = [[] for _ in views]

    def ask(self, question: str) -> Iterator[list[Reply]]:
        """Sample the replies; iterate over every view's reply so far. ``add`` makes them part of the conversation.

        Raises ValueError if the conversation becomes longer than the model can read.
        """
        return self._sample(self._encode(question, self.views, self._turns))

    def _sample(self, prompts: list[list[int]]) -> Iterator[list[Reply]]:
        speaker, sampling = self._speaker, self._sampling
        folder = speaker.folder
        key = rng.key_for(jax.random.key(self._decoding.seed), len(self._turns[0]), "evaluation")
        for rows in stream(speaker.params, folder.config, sampling, _fill(prompts), key, speaker.mesh):
            texts = responses.decode(folder.tokenizer, [ids for ids, _ in rows], folder.stop_ids)
            replies = []
            for text, (ids, has_ended) in zip(texts, rows[: len(prompts)]):
                is_cut = not has_ended and len(ids) == sampling.max_tokens
                done = has_ended or is_cut
                replies.append(Reply(text if done else text.rstrip(UNFINISHED), done, is_cut))
            yield replies

    def add(self, question: str, replies: list[Reply]) -> None:
        """Make a question and its replies, whole or stopped, part of the conversation."""
        for turns, reply in zip(self._turns, replies):
            turns.append((question, reply.text))

    def _encode(self, question: str, views: list[str | None], turns: list) -> list[list[int]]:
        speaker = self._speaker
        rows = [Row("", question, context, "", earlier=tuple(own)) for context, own in zip(views, turns)]
        prompts = prompts_lib.encode(speaker.folder.tokenizer, rows, speaker.prompt)
        longest, most, more = max(map(len, prompts)), speaker.folder.config.max_positions, self._decoding.max_tokens
        if longest + more > most:
            what = "the conversation" if turns[0] else "the context with the question"
            raise ValueError(
                f"{what} has {longest} tokens, and with --max_tokens={more} more it exceeds the model's {most} "
                f"positions; {'/reset begins a new one' if turns[0] else 'shorten it'}, or lower --max_tokens"
            )
        speaker.folder.check_prompts(prompts, more, "--max_tokens")
        return prompts


def _fill(prompts: list[list[int]]) -> list[list[int]]:
    """Return two prompts, so that one view and two take the same compiled programs."""
    return (prompts * 2)[:2]
