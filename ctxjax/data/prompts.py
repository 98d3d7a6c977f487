"""Text to tokens: chat template, placement of the context, left padding. Nothing is ever cut."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from ctxjax.data.task import Row
from ctxjax.types import Prompts

PLACEMENTS = ("system", "user")
# Prefixes shorter than this many tokens are read in every row. On one core an update of the tiny world with a context
# of 8, 16, 32 and 64 tokens takes 1.02, 1.22, 1.49 and 2.03 times as long so; but an accelerator's pass over a few
# tokens costs as much as one over hundreds, since it reads all weights.
SHORTEST_PREFIX = 32


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """``placement``: the context is the "system" message, or stands in the "user" turn ahead of the question.
    ``max_bare_tokens`` and ``max_context_tokens`` bound a prompt's length with the template's tokens, 0: as
    long as the longest row. ``overlong``: a longer row is an "error", or "drop": left out, and counted."""

    placement: str = "system"
    max_bare_tokens: int = 0
    max_context_tokens: int = 0
    overlong: str = "error"


def messages(row: Row, placement: str) -> list[dict[str, str]]:
    """The chat of a row. A context of None leaves the template its own default; "" is an empty block."""
    user = {"role": "user", "content": row.question}
    if row.context is None:
        return [user]
    if placement == "system":
        return [{"role": "system", "content": row.context}, user]
    return [{"role": "user", "content": f"{row.context}\n\n{row.question}" if row.context else row.question}]


def render(tokenizer, row: Row, placement: str) -> str:
    """The prompt's text up to and including the marker that opens the assistant's turn."""
    return tokenizer.apply_chat_template(messages(row, placement), tokenize=False, add_generation_prompt=True)


def encode(tokenizer, rows: list[Row], placement: str) -> list[list[int]]:
    """Token ids of every row's prompt."""
    texts = [render(tokenizer, row, placement) for row in rows]
    # The template has written the special tokens; the tokenizer must not add them a second time.
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def shared_prefix(token_lists: list[list[int]]) -> list[int]:
    """The tokens that all prompts start with, to be read once for all of them; [] where that saves too little.

    Each prompt keeps a token of its own, from which its response is predicted. A template's head of a few tokens is
    not worth the pass of its own through all layers that reading it apart costs.
    """
    if len(token_lists) < 2:
        return []
    first, last = min(token_lists), max(token_lists)  # in lexical order: what these two share, all share
    length = min(len(ids) for ids in token_lists) - 1
    common = next((place for place in range(length) if first[place] != last[place]), length)
    return first[:common] if common >= SHORTEST_PREFIX else []


def left_pad(token_lists: list[list[int]], length: int, pad_id: int, prefix: Sequence[int] = ()) -> Prompts:
    """Prompts of ``length`` tokens as numpy arrays; every row ends in the last column.

    ``prefix`` is what all rows start with: it is kept apart, and the columns hold the rest. Raises ValueError where a
    row is longer than ``length``: prompts are not cut; or where one does not start with the prefix.
    """
    prefix = list(prefix)
    columns = length - len(prefix)
    tokens = np.full((len(token_lists), columns), pad_id, np.int32)
    mask = np.zeros((len(token_lists), columns), bool)
    for row, ids in enumerate(token_lists):
        if len(ids) > length:
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit into {length} columns")
        if ids[: len(prefix)] != prefix:
            raise ValueError(f"prompt {row} does not start with the {len(prefix)} tokens that all prompts should share")
        own = ids[len(prefix) :]
        if own:
            tokens[row, columns - len(own) :] = own
            mask[row, columns - len(own) :] = True
    return Prompts(tokens, mask, np.asarray(prefix, np.int32) if prefix else None)


def keep_fitting(
    rows: list[Row], views: dict[str, list[list[int]]], config: PromptConfig
) -> tuple[list[int], dict[str, int]]:
    """The places of the rows that fit in every view, and the length of each view's prompts.

    ``views`` has "bare" and "context" token lists, parallel to ``rows``. Raises ValueError naming the first
    row that is too long where ``overlong`` is "error", or where no row is left.
    """
    limits = {"bare": config.max_bare_tokens, "context": config.max_context_tokens}
    kept = []
    for place, row in enumerate(rows):
        long = [
            (view, len(views[view][place])) for view, limit in limits.items() if 0 < limit < len(views[view][place])
        ]
        if not long:
            kept.append(place)
        elif config.overlong == "error":
            view, length = long[0]
            raise ValueError(
                f"row {row.id!r}: its {view} prompt has {length} tokens, more than prompt.max_{view}_tokens = "
                f"{limits[view]}; raise the limit, or set prompt.overlong=drop to leave such rows out"
            )
    if not kept:
        raise ValueError(f"none of {len(rows)} rows fits into prompt.max_bare_tokens and prompt.max_context_tokens")
    longest = {view: max(len(views[view][place]) for place in kept) for view in limits}
    return kept, {view: limits[view] or longest[view] for view in limits}
