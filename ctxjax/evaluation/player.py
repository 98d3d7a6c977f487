"""Play whole episodes of a game: one turn of all running episodes at a time, decoded by the jitted sampler.

The environment is on the host (data.task.GameTask). A response depends only on its own prompt and on the key of its
(episode, turn), so an episode is the same whatever is played at the same time. Programs are few: prompts are padded to
multiples of COLUMNS, and batches have the sizes of ``_batch_sizes``; finished episodes leave the batch.
"""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import sharding
from ctxjax.data import prompts as prompts_lib, responses
from ctxjax.data.grading.reasoning import OPEN_REASONING
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import GameTask, Row
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.types import Params, Rollout

COLUMNS = 32  # tokens; prompts are padded to a multiple of it
SMALLER = 4  # a batch with fewer rows than 1 / SMALLER of the full size is decoded by a second program of that size


class Turn(NamedTuple):
    """``row``: what the player read, in tokens ``prompt``. ``tokens``: the response [t], end token included, and its
    ``logprobs`` [t] in nats. ``opened``: the prompt ends inside <think> (prompts.opens_reasoning)."""

    row: Row
    prompt: list[int]
    tokens: np.ndarray
    logprobs: np.ndarray
    opened: bool


@dataclasses.dataclass
class Clock:
    """What playing took so far: ``episodes``, ``turns``, ``seconds``, and of these the seconds of the ``sampler``; the
    rest is the environment and other work on the host, while the device waits."""

    episodes: int = 0
    turns: int = 0
    seconds: float = 0.0
    sampler: float = 0.0

    def __str__(self) -> str:
        share = 1 - self.sampler / max(self.seconds, 1e-9)
        return (
            f"{self.episodes} episodes of {self.turns / max(self.episodes, 1):.2f} turns, "
            f"{self.turns / max(self.seconds, 1e-9):.0f} turns a second; the device waits for the host in "
            f"{100 * share:.0f} % of the time"
        )


class Player:
    """``most``: episodes that are decoded at the same time."""

    def __init__(self, task: GameTask, folder: ModelFolder, prompt: PromptConfig, most: int, mesh: Mesh):
        self._task, self._folder, self._prompt, self._mesh = task, folder, prompt, mesh
        self._sizes = _batch_sizes(most, sharding.batch_ways(mesh))
        self.clock = Clock()

    def play(
        self,
        params: Params,
        sampling: SamplingConfig,
        rows: list[Row],
        key: jax.Array,
        first: int = 0,
        prefix: tuple[int, ...] | list[int] = (),
        what: str = "",
    ) -> list[list[Turn]]:
        """Play the episode of every row to its end. Return its turns, parallel to ``rows``.

        ``sampling``: with one sample per prompt. Turn t of row i is drawn with the key of (``key``,
        (first + i) * max_turns + t). ``prefix``: tokens that all prompts start with. ``what``: of the progress
        bar; "" for none.
        """
        jax.block_until_ready(params)  # what is still being computed is not the sampler's time
        started = time.monotonic()
        played: list[list[Turn]] = [[] for _ in rows]
        texts: list[list[str]] = [[] for _ in rows]
        going = dict(enumerate(rows))  # row number -> what its player reads now
        for number in range(self._task.max_turns):
            if not going:
                break
            keys = [((first + i) * self._task.max_turns + number) % 2**31 for i in going]
            turn = what and f"{what}, turn {number + 1}"
            turns = self._take_turns(params, sampling, list(going.values()), key, np.array(keys), prefix, turn)
            stop_ids = self._folder.stop_ids
            decoded = responses.decode(self._folder.tokenizer, (turn.tokens for turn in turns), stop_ids)
            for i, turn, text in zip(list(going), turns, decoded):
                played[i].append(turn)
                texts[i].append(OPEN_REASONING * turn.opened + text)
                after = self._task.play(rows[i], texts[i])
                if isinstance(after, Row):
                    going[i] = after
                else:
                    del going[i]
        assert not going, "an episode is longer than the task's max_turns"
        self.clock.episodes += len(rows)
        self.clock.turns += sum(map(len, played))
        self.clock.seconds += time.monotonic() - started
        return played

    def _take_turns(self, params, sampling, rows: list[Row], key, keys: np.ndarray, prefix, what: str) -> list[Turn]:
        folder, prefix = self._folder, list(prefix)
        prompts = prompts_lib.encode(folder.tokenizer, rows, self._prompt)
        opened = [prompts_lib.opens_reasoning(folder.tokenizer, row, self._prompt) for row in rows]
        own = max(len(ids) for ids in prompts) - len(prefix)
        padded = prompts_lib.left_pad(prompts, -(-own // COLUMNS) * COLUMNS, folder.pad_id, prefix)
        size = next((size for size in self._sizes if size >= len(rows)), self._sizes[-1])
        started = time.monotonic()
        rollout = decoding.decode(params, folder.config, sampling, padded, key, size, self._mesh, keys, what)
        self.clock.sampler += time.monotonic() - started
        kept = zip(rollout.tokens_BxT, rollout.logprobs_BxT, rollout.mask_BxT)
        return [
            Turn(row, prompt, tokens[mask], logprobs[mask], is_open)
            for row, prompt, (tokens, logprobs, mask), is_open in zip(rows, prompts, kept, opened)
        ]


def _batch_sizes(most: int, ways: int) -> list[int]:
    """Return the rows that a batch may have, from the smaller to the larger; multiples of ``ways``."""
    return sorted({-(-size // ways) * ways for size in (-(-most // SMALLER), most)})


def pad_responses(turns: list[Turn | None], sampling: SamplingConfig) -> Rollout:
    """Return the turns' responses as host arrays [n, T]; a row without tokens for None."""
    shape = len(turns), sampling.max_tokens
    tokens, mask = np.full(shape, sampling.pad_id, np.int32), np.zeros(shape, bool)
    logprobs = np.zeros(shape, np.float32)
    for i, turn in enumerate(turns):
        if turn is not None:
            count = len(turn.tokens)
            tokens[i, :count], mask[i, :count], logprobs[i, :count] = turn.tokens, True, turn.logprobs
    return Rollout(tokens, mask, logprobs)
