"""What a task is: rows (question, context, reference) and a grader. The tasks themselves are in data/tasks."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.response_checks import Check, obeys


class Row(NamedTuple):
    """A question as one view shows it. ``context`` None: no context block at all; "": an empty one.
    ``default`` is the answer that the base gives when nobody tells it otherwise, where a task knows it.
    ``check`` is what the response is judged by instead of the reference, where the context says what it demands."""

    id: str
    question: str
    context: str | None
    reference: str
    default: str | None = None
    check: Check | None = None


class Task(Protocol):
    skipped: dict[str, int]  # rows of its files that were left out, by kind (data.records.KINDS)
    facts: dict  # what a run notes of its data and contexts: names with sha256 digests, rows by split

    def rows(self, split: str) -> list[Row]:
        """The rows of "train", "dev" or "test", each with the context to internalize. Splits are disjoint."""

    def grade(self, response: str, reference: str) -> Grade:
        """Reads the answer from a response and compares it with a row's reference."""

    def other_contexts(self, split: str) -> list[str]:
        """Contexts that the student should keep obeying, none of them the one to internalize, those of "train"
        disjoint from the others; may be empty."""

    def swap_context(self, row: Row, context: str) -> Row:
        """The same question under another context, with the reference or the check that holds there."""

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str | None:
        """The row's context in other words, or None where the task cannot tell."""


def graded(task: Task, response: str, row: Row) -> Grade:
    """A response's grade: by the check that the row's context carries, or else by the task."""
    return obeys(row.check, response) if row.check else task.grade(response, row.reference)


class PretrainingRow(NamedTuple):
    """A row of a base model's training text; ``context`` as in Row."""

    question: str
    context: str | None
    response: str


@runtime_checkable
class World(Protocol):
    """What a task has besides, if it can write the training text of a base model of its own (inputs/base_model.py)."""

    def tokenizer(self):
        """The base's tokenizer, a transformers one with a chat template."""

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """A row drawn by ``rng``; its text shares no question with dev and test rows."""

    def longest_pretraining_row(self) -> PretrainingRow:
        """A row whose prompt and response have as many tokens as any that is drawn, possibly none of those."""

    def pretraining_facts(self) -> dict:
        """All that shapes the tokenizer and the rows, as JSON: a base is trained again when it changes."""


def evaluation_views(task: Task, rows: list[Row], split: str) -> dict[str, list[Row]]:
    """The views in which a split is evaluated, each a list parallel to ``rows``.

    bare: no context; context: the one internalized; empty: a context block without content; other: another
    context of this split, with the reference or check that holds under it (obedience); paraphrase: the context in
    other words. A view that a task cannot give is left out, as "context" is where no row has one. Which other
    context a row gets depends on its place alone, so all arms and all steps are asked the same.
    """
    views = {"bare": [row._replace(context=None) for row in rows]}
    if any(row.context is not None for row in rows):
        views["context"] = list(rows)
    views["empty"] = [row._replace(context="") for row in rows]
    others = task.other_contexts(split)
    if others:
        views["other"] = [task.swap_context(row, others[place % len(others)]) for place, row in enumerate(rows)]
    paraphrases = [task.paraphrase(row, np.random.default_rng(place)) for place, row in enumerate(rows)]
    if rows and all(text is not None for text in paraphrases):
        views["paraphrase"] = [row._replace(context=text) for row, text in zip(rows, paraphrases)]
    return views
