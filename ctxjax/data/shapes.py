"""The shapes of prompts in a batch: as long as the longest row, and rounded up so that programs are few."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

COARSEST = 128  # columns; the largest multiple that lengths are rounded up to
CHAT_COARSEST = 1024  # the same of a conversation
# Views that a limit can leave rows out of -> the limit's field.
LIMITS = {"bare": "prompt.max_bare_tokens", "context": "prompt.max_context_tokens"}
# Rows that are this many times as long as 99 % of all rows are reported, if these have at least NOTABLE tokens.
OUTLIER, NOTABLE = 2, 32


class ViewShape(NamedTuple):
    """The shape of one view's prompts, in tokens.

    ``prefix``: C, the tokens that all rows start with and that are stored once. ``columns``: P, the columns of each
    row's own tokens, padding included. ``longest``: the longest prompt, the prefix included.
    """

    prefix: int
    columns: int
    longest: int


def round_columns(tokens: int) -> int:
    """Round a length up: to one of eight sizes between two powers of two, or to a multiple of COARSEST.

    Lengths that are near to each other share a compiled program, and at most an eighth is added.
    """
    multiple = min(2 ** max(tokens.bit_length() - 4, 0), COARSEST)
    return -(-tokens // multiple) * multiple


def round_conversation(tokens: int) -> int:
    """Round the length of a conversation up: to a power of two from 256 on, or to a multiple of CHAT_COARSEST.

    It grows with every turn, and waiting for two rows of padding is shorter than for another program.
    """
    power = max(256, 1 << (tokens - 1).bit_length())
    return min(power, -(-tokens // CHAT_COARSEST) * CHAT_COARSEST)


def make_shape(longest: int, prefix: int) -> ViewShape:
    """Return the shape of prompts of at most ``longest`` tokens that share their first ``prefix`` tokens."""
    return ViewShape(prefix, round_columns(longest - prefix), longest)


def find_shapes(views: dict[str, list[list[int]]], prefixes: dict[str, list[int]]) -> dict[str, ViewShape]:
    """Return the shape of each view's prompts in a batch. The arguments are those of ``describe_outliers``."""
    return {view: make_shape(max(map(len, lists)), len(prefixes[view])) for view, lists in views.items()}


def describe_outliers(views: dict[str, list[list[int]]], prefixes: dict[str, list[int]]) -> str:
    """Return a warning about the first view that a few long prompts pad to more than OUTLIER times the length that 99 %
    of them need; "" if there is none.

    ``views``: the prompts of each view, token by token. ``prefixes``: the tokens that all prompts of a view share.
    """
    for view, token_lists in views.items():
        lengths, shared = np.array([len(ids) for ids in token_lists]), len(prefixes[view])
        usual = np.percentile(lengths - shared, 99, method="lower")
        fits = lengths - shared <= OUTLIER * max(usual, NOTABLE)
        if fits.all():
            continue
        remedy = "shorten their contexts, or leave them out of their file"
        if view in LIMITS:
            remedy = f"{LIMITS[view]}={lengths[fits].max()} with prompt.overlong=drop leaves them out"
        return (
            f"{(~fits).sum()} of {len(lengths)} {view} prompts pad all others: the longest has {lengths.max()} tokens, "
            f"the median {np.median(lengths):.0f}, of which {shared} are shared; {remedy}"
        )
    return ""
