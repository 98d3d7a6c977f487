"""From text to tokens: chat template, placement of the context, left padding. A prompt is never truncated."""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from ctxjax.data import chat_template, control_tokens
from ctxjax.data.grading.graders import READ_TAGS
from ctxjax.data.grading.reasoning import OPEN_REASONING, is_reasoning_open, rename_reasoning
from ctxjax.data.task import Row, read_chat_context
from ctxjax.types import Prompts, bounded

PLACEMENTS = ("system", "user", "prefix")
# A shorter prefix, in tokens, is read in every row: a separate pass over a few tokens reads all weights once more and
# does not pay (benchmarks/README.md, context_cost.py).
SHORTEST_PREFIX = 32


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How prompts are written.

    ``placement``: the context is the "system" message; or part of the "user" turn, before the question; or a "prefix",
    raw text before the whole chat (after the begin token, if the template writes one).
    ``date``: the date that the template writes as today's; templates without a date ignore it.
    ``thinking``: the template's switch ``enable_thinking``; None does not set it, so the template's default applies.
    ``keywords``: other variables of the template, "NAME=VALUE" each (``chat_template.parse_keyword``). Both are for all
    prompts; ``teacher_thinking`` (None: as ``thinking``) and ``teacher_keywords`` (in addition) for prompts with a
    context block, which the teacher reads, and the student when the context comes back.
    ``max_bare_tokens``, ``max_context_tokens``: the longest allowed prompt of each view, template tokens included; 0:
    no limit. ``overlong``: "error" refuses a longer row, "drop" leaves it out and counts it.
    """

    placement: str = "system"
    date: str = "26 Jul 2024"
    thinking: bool | None = None
    teacher_thinking: bool | None = None
    keywords: tuple[str, ...] = ()
    teacher_keywords: tuple[str, ...] = ()
    max_bare_tokens: int = bounded(0, zero=True)
    max_context_tokens: int = bounded(0, zero=True)
    overlong: str = "error"

    def collect_variables(self, has_context: bool) -> dict[str, Any]:
        """Return what the prompts of a view set in the chat template, by name."""
        thinking, keywords = self.thinking, self.keywords
        if has_context:
            thinking = thinking if self.teacher_thinking is None else self.teacher_thinking
            keywords += self.teacher_keywords
        return dict(map(chat_template.parse_keyword, keywords)) | (
            {} if thinking is None else {"enable_thinking": thinking}
        )


def build_messages(row: Row, placement: str) -> list[dict[str, str]]:
    """Build the chat messages of a row.

    A context of None writes no system message, so the template's own default applies; "" writes an empty one. With
    placement "user" an empty context adds nothing. With placement "prefix" the context is not part of the chat. A
    context that is a whole chat has no placement: it is returned.
    """
    if (whole := read_chat_context(row.context)) is not None:
        return whole
    texts = [*itertools.chain.from_iterable(row.earlier), row.question]
    if row.context and placement == "user":
        texts[0] = f"{row.context}\n\n{texts[0]}"
    chat = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]
    if row.context is None or placement != "system":
        return chat
    return [{"role": "system", "content": row.context}, *chat]


def find_control_tokens(tokenizer) -> dict[str, int]:
    """Return the tokens that separate the turns of a chat, with their ids.

    These are the begin, end and padding token, the added tokens that the chat template writes around a question, and
    the special tokens that its source names. The tags that graders read are not: models write them into answers.
    """
    return _find_control_tokens(tokenizer, tokenizer.get_chat_template())


@functools.lru_cache(maxsize=8)
def _find_control_tokens(tokenizer, template: str) -> dict[str, int]:
    written = _render_probe(tokenizer, PromptConfig(), False)
    with contextlib.suppress(ValueError):  # the template may refuse a system message
        written += _apply_template(tokenizer, build_messages(Row("", "?", "?", ""), "system"), PromptConfig(), True)
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    found = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        is_control = text in named or text in written or token.special and text in template
        if is_control and text.strip() and text not in READ_TAGS:
            found[text] = index
    return found


def describe_quoted_control_tokens(tokenizer, rows: list[Row]) -> str:
    """Return a warning that counts the rows whose text contains control tokens, and names the first; "" if none."""
    tokens = find_control_tokens(tokenizer)
    found = [(row.id, control_tokens.find_quoted(f"{row.context or ''}\n{row.conversation}", tokens)) for row in rows]
    found = [(name, quoted) for name, quoted in found if quoted]
    if not found:
        return ""
    name, quoted = found[0]
    return (
        f"{len(found)} of {len(rows)} rows have control tokens in their question or context, first row {name!r} with "
        f"{quoted[0]!r}; they are read as text, not as turns of the chat"
    )


def render(tokenizer, row: Row, config: PromptConfig) -> str:
    """Render the prompt, up to and including the marker that opens the assistant's turn.

    Raises ValueError if the template refuses the chat or leaves the context out.
    """
    return control_tokens.unmark(_render_marked(tokenizer, row, config))


def _render_marked(tokenizer, row: Row, config: PromptConfig) -> str:
    """Render the prompt with the control tokens in texts and context marked (data.control_tokens)."""
    tokens = find_control_tokens(tokenizer)
    if tokens:
        context = None if row.context is None else control_tokens.mark(row.context, tokens)
        earlier = tuple(tuple(control_tokens.mark(text, tokens) for text in turn) for turn in row.earlier)
        row = row._replace(question=control_tokens.mark(row.question, tokens), context=context, earlier=earlier)
    chat, has_context = build_messages(row, config.placement), row.context is not None
    text = _apply_template(tokenizer, chat, config, has_context)
    if not row.context:
        return text
    if read_chat_context(row.context) is not None:
        for message in chat:
            if message["content"].strip() not in text:
                raise ValueError(
                    f"row {row.id!r}: the chat template of {tokenizer.name_or_path} leaves out the teacher's "
                    f"{message['role']} message or changes its text; write it into a user message"
                )
        return text
    if config.placement == "prefix":
        begin = _find_begin_token(tokenizer, config)
        return begin + row.context + text[len(begin) :]
    # Count occurrences, since the texts may quote the context. Most templates strip white space.
    context = row.context.strip()
    if text.count(context) <= row.conversation.count(context):
        raise ValueError(
            f"row {row.id!r}: with prompt.placement = {config.placement!r} the chat template of "
            f"{tokenizer.name_or_path} leaves out the context or changes its text; the teacher would not see it. Set "
            "prompt.placement to another of " + ", ".join(PLACEMENTS)
        )
    return text


def encode(tokenizer, rows: list[Row], config: PromptConfig) -> list[list[int]]:
    """Render and tokenize every row's prompt. Control tokens in a turn or the context are read as text."""
    texts = [_render_marked(tokenizer, row, config) for row in rows]
    marked = [index for index, text in enumerate(texts) if control_tokens.is_marked(text)]
    # The template has already written the special tokens.
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    if marked:
        tokens = find_control_tokens(tokenizer)
        again = control_tokens.encode_marked(tokenizer, [texts[index] for index in marked], tokens)
        for index, ids in zip(marked, again):
            encoded[index] = ids
    return encoded


def opens_reasoning(tokenizer, row: Row, config: PromptConfig) -> bool:
    """Whether the template ends the prompt inside <think>, so that the response begins inside the reasoning."""
    if OPEN_REASONING not in rename_reasoning(tokenizer.get_chat_template()):
        return False
    chat = build_messages(row, config.placement)
    has_context = row.context is not None
    asked, text = (
        rename_reasoning(_apply_template(tokenizer, chat, config, has_context, opens_turn))
        for opens_turn in (False, True)
    )
    if text.startswith(asked) and text != asked:
        return is_reasoning_open(text[len(asked) :])  # what follows the chat: a user may write such tags too
    return text.rstrip().endswith(OPEN_REASONING)


def _render_probe(tokenizer, config: PromptConfig, has_context: bool) -> str:
    """Render a short question, to see what the template writes around any question of a view."""
    return _apply_template(tokenizer, [{"role": "user", "content": "?"}], config, has_context)


def _find_begin_token(tokenizer, config: PromptConfig) -> str:
    """Return the begin token's text if the template opens the chat with it, else "".

    In some ChatML tokenizers the "begin token" opens every turn. It then belongs to its turn, and "" is returned.
    """
    begin, text = tokenizer.bos_token or "", _render_probe(tokenizer, config, has_context=True)
    return begin if begin and text.startswith(begin) and text.count(begin) == 1 else ""


def _apply_template(
    tokenizer, chat: list[dict[str, str]], config: PromptConfig, has_context: bool, opens_turn: bool = True
) -> str:
    """Render the chat as ``config`` says; ``has_context``: in a view with a context block."""
    variables = config.collect_variables(has_context)
    return chat_template.apply(tokenizer, chat, config.date, variables, opens_turn)


def find_common_prefix(token_lists: list[list[int]]) -> list[int]:
    """Return the longest list of tokens that all lists start with."""
    # In sorted order the first and the last list share no more than any other two lists.
    pairs = zip(min(token_lists), max(token_lists))
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def choose_shared_prefix(token_lists: list[list[int]]) -> list[int]:
    """Return the tokens that all prompts start with, to be read once for all rows; [] if they are too few.

    Each prompt keeps at least one token of its own, which predicts the first token of its response. A prefix shorter
    than SHORTEST_PREFIX is not shared: a separate pass for it costs more than it saves.
    """
    if len(token_lists) < 2:
        return []
    prefix = find_common_prefix(token_lists)[: min(len(ids) for ids in token_lists) - 1]
    return prefix if len(prefix) >= SHORTEST_PREFIX else []


def left_pad(token_lists: list[list[int]], columns: int, pad_id: int, prefix: Sequence[int] = ()) -> Prompts:
    """Left-pad prompts to ``columns`` columns, as numpy arrays; every row ends in the last column.

    ``prefix``, which all rows start with, is stored once as ``prefix_C``; the columns hold the rest of each row.
    Raises ValueError if a row's rest is longer than ``columns``, or if the row does not start with ``prefix``.
    """
    prefix = list(prefix)
    tokens = np.full((len(token_lists), columns), pad_id, np.int32)
    mask = np.zeros((len(token_lists), columns), bool)
    for row, ids in enumerate(token_lists):
        if ids[: len(prefix)] != prefix:
            raise ValueError(f"prompt {row} does not start with the {len(prefix)} tokens of the shared prefix")
        own = ids[len(prefix) :]
        if len(own) > columns:
            raise ValueError(f"a prompt with {len(own)} tokens of its own does not fit into {columns} columns")
        if own:
            tokens[row, columns - len(own) :] = own
            mask[row, columns - len(own) :] = True
    return Prompts(tokens, mask, np.asarray(prefix, np.int32) if prefix else None)


def unpad(prompts: Prompts) -> list[list[int]]:
    """Return every row's tokens without padding, the shared prefix included: the inverse of ``left_pad``."""
    prefix = [] if prompts.prefix_C is None else prompts.prefix_C.tolist()
    return [prefix + tokens[mask].tolist() for tokens, mask in zip(prompts.tokens_BxP, prompts.mask_BxP)]


def expand_prefix(prompts: Prompts, pad_id: int) -> Prompts:
    """Return the same prompts with the shared prefix written into every row."""
    shared = 0 if prompts.prefix_C is None else len(prompts.prefix_C)
    return left_pad(unpad(prompts), shared + prompts.tokens_BxP.shape[1], pad_id)


def keep_fitting_rows(rows: list[Row], views: dict[str, list[list[int]]], config: PromptConfig) -> list[int]:
    """Return the indices of the rows that fit in both views.

    ``views``: "bare" and "context" token lists, parallel to ``rows``. Raises ValueError, which names the first row that
    is too long, if ``overlong`` is "error"; and ValueError if no row is left.
    """
    limits = {"bare": config.max_bare_tokens, "context": config.max_context_tokens}
    kept = []
    for index, row in enumerate(rows):
        long = [
            (view, len(views[view][index])) for view, limit in limits.items() if 0 < limit < len(views[view][index])
        ]
        if not long:
            kept.append(index)
        elif config.overlong == "error":
            view, length = long[0]
            raise ValueError(
                f"row {row.id!r}: its {view} prompt has {length} tokens, more than prompt.max_{view}_tokens = "
                f"{limits[view]}; raise the limit, or set prompt.overlong=drop to leave such rows out"
            )
    if not kept:
        raise ValueError(f"none of {len(rows)} rows fits into prompt.max_bare_tokens and prompt.max_context_tokens")
    return kept
