"""The lessons of a response, and a context made of lessons: one line for each, which begins with LESSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import itertools
import re

from ctxjax.data.grading.reasoning import strip_reasoning
from ctxjax.data.task import LESSON

SIMILAR = 0.8  # texts whose similarity is at least this are near-duplicates


def read_items(response: str, is_cut: bool) -> list[str]:
    """Return the lines of a response that hold a lesson, in their order.

    What a model reasons before its reply does not count. ``is_cut``: the response ended at the length limit; its last
    line is then left out.
    """
    lines = [" ".join(line.split()) for line in strip_reasoning(response)[0].splitlines()]
    if is_cut:
        lines = lines[:-1]
    return [line for line in lines if line.startswith(LESSON) and line != LESSON]


def write_context(items: Iterable[str]) -> str:
    """Return the context that consists of the items; "" if there are none."""
    return "\n".join(items)


def append(items: list[str], new: list[str], limit: int, count: Callable[[str], int]) -> list[str]:
    """Return the items followed by the new ones, of which ``count`` gives at most ``limit`` tokens for the context.

    Of near-duplicates the latest stays: a lesson that returns counts as new. Beyond the limit the oldest items are
    dropped, each as a whole.
    """
    kept = remove_near_duplicates(reversed([*items, *new]))[::-1]
    while kept and count(write_context(kept)) > limit:
        kept = kept[1:]
    return kept


def remove_near_duplicates(texts: Iterable[str]) -> list[str]:
    """Return the texts without those that are near-duplicates of one before them."""
    kept: list[str] = []
    for text in texts:
        if all(similarity(text, other) < SIMILAR for other in kept):
            kept.append(text)
    return kept


def similarity(a: str, b: str) -> float:
    """Return the Jaccard similarity of two texts: of their pairs of neighbouring words, the share that both have.

    Upper and lower case, punctuation and LESSON do not count.
    """
    pairs_a, pairs_b = _list_word_pairs(a), _list_word_pairs(b)
    return len(pairs_a & pairs_b) / len(pairs_a | pairs_b) if pairs_a | pairs_b else 1.0


def _list_word_pairs(text: str) -> set[tuple[str, str]]:
    words = ["", *re.findall(r"\w+", text.replace(LESSON, " ").casefold()), ""]
    return set(itertools.pairwise(words))
