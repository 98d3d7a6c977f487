"""The interface of a task: rows (question, context, reference) and a grader. The tasks are in data/tasks."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import json
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.response_checks import Check, grade_check

# The views of an evaluation that may be left out (``make_evaluation_views``): "bare" and "context" are always asked.
FURTHER_VIEWS = ("empty", "other", "paraphrase", "unrelated")
# What an evaluation measures besides, if asked to (eval.meters, evaluation/meters.py).
METERS = ("trace_gap", "drift")
# How a line begins in which a model writes down a lesson from experience (ctxjax/experience).
LESSON = "- EXPERIENCE ITEM:"

_CHAT = "\ufdd4"  # a noncharacter of Unicode, which no text has; a context that begins with it is a whole chat


def write_chat_context(chat: list[dict[str, str]]) -> str:
    """Return the context of a view in which the model reads ``chat`` in place of the row's turns: {"role", "content"}
    each, ending with the user's. It is a text, as other contexts are."""
    return _CHAT + json.dumps(chat, ensure_ascii=False)


def read_chat_context(context: str | None) -> list[dict[str, str]] | None:
    """Return the chat that ``write_chat_context`` wrote; None for any other context."""
    return json.loads(context.removeprefix(_CHAT)) if context and context.startswith(_CHAT) else None


def describe_context(context: str) -> str:
    """Return a context as people read it."""
    chat = read_chat_context(context)
    return context if chat is None else "\n\n".join(f"{message['role']}: {message['content']}" for message in chat)


class Row(NamedTuple):
    """A question in one view.

    ``context``: None for no context block, "" for an empty one; or a whole chat (``write_chat_context``).
    ``default``: the answer that the base gives without a context, if the task knows it. ``check``: grades the response
    in place of ``reference``, if the context has one.
    ``earlier``: the turns of the conversation before the question, (what the user said, the response) each.
    """

    id: str
    question: str
    context: str | None
    reference: str
    default: str | None = None
    check: Check | None = None
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def conversation(self) -> str:
        """All turns up to and including the question; without earlier turns the question itself."""
        return "\n".join([*itertools.chain.from_iterable(self.earlier), self.question])


def describe_earlier(row: Row) -> dict:
    """Return the earlier turns of a conversation as files of a run have them; {} if there are none."""
    return {"earlier": [list(turn) for turn in row.earlier]} if row.earlier else {}


def read_row(line: dict) -> Row:
    """Return what was asked, from a line of a run's file; ``describe_earlier`` wrote its earlier turns."""
    earlier = tuple(map(tuple, line.get("earlier", ())))
    return Row(line["id"], line["question"], line.get("context"), "", earlier=earlier)


class Task(Protocol):
    skipped: dict[str, int]  # how many rows of its files were left out, by kind (data.records.KINDS)
    facts: dict  # what a run records of data and contexts: names with sha256 digests, rows by split

    def rows(self, split: str) -> list[Row]:
        """Return the rows of "train", "dev" or "test", each with the context to internalize. Splits are disjoint."""

    def grade(self, response: str, reference: str) -> Grade:
        """Read the answer from a response and compare it with a row's reference."""

    def other_contexts(self, split: str) -> list[str]:
        """Return contexts that the student should keep obeying; may be empty.

        The context to internalize is not among them. No two splits share one.
        """

    def rows_under(self, row: Row, context: str) -> list[Row]:
        """Return what may be asked under another context, in place of ``row``, with what is right there.

        It is the row's own question, or the questions that the data have for this context.
        """

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str | None:
        """Return the row's context in other words, or None if the task has no paraphrase."""

    def unrelated(self) -> str | None:
        """Return a context that bears on no question of the task, or None if the task has none."""


@runtime_checkable
class GameTask(Protocol):
    """A task whose rows are episodes of several turns: a row is the first turn of its episode.

    An episode is a function of its row and of the responses; nothing else is kept.
    """

    max_turns: int  # most responses of an episode

    def play(self, row: Row, responses: Sequence[str]) -> Row | Grade:
        """Return what the player reads after these responses, or the episode's grade if it has ended.

        The returned row differs from ``row`` in its question only. No response follows the end.
        """

    def longest_turn(self, row: Row) -> Row:
        """Return a row with at least as many tokens as any turn of the episode, which begins as the turns do."""

    def trace(self, row: Row, responses: Sequence[str]) -> str:
        """Return what happened in an episode that has ended: what was read, said, and how it ended."""


@runtime_checkable
class GroupedTask(Protocol):
    """A task with rows that are not independent, such as wordings of one fact or texts of one template."""

    def group(self, row: Row) -> str:
        """Return the name of the row's group, which intervals and tests take as a whole; "" if it is in none."""


def longest_turns(task: Task, rows: list[Row]) -> list[Row]:
    """Return the longest turn of every row; ``rows`` themselves if the task's episodes have one turn."""
    return [task.longest_turn(row) for row in rows] if isinstance(task, GameTask) else rows


def grade_response(task: Task, response: str, row: Row) -> Grade:
    """Grade a response by the row's check if it has one, else by the task."""
    return grade_check(row.check, response) if row.check else task.grade(response, row.reference)


class PretrainingRow(NamedTuple):
    """One row of a base model's training text. ``context``: as in Row."""

    question: str
    context: str | None
    response: str


@runtime_checkable
class World(Protocol):
    """A task that can also write the training text of its own base model (inputs/base_model.py)."""

    def tokenizer(self):
        """Return the base's tokenizer: a transformers tokenizer with a chat template."""

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """Draw a row with ``rng``. It has no question of a dev or test row."""

    def longest_pretraining_row(self) -> PretrainingRow:
        """Return a row with the longest prompt and the longest response that can be drawn, in tokens.

        It need not be a row that can itself be drawn.
        """

    def pretraining_facts(self) -> dict:
        """Return everything that determines the tokenizer and the rows, as JSON. A change trains a new base."""


def _choose_under(task: Task, row: Row, others: list[str], index: int) -> Row:
    """Return the question of the view "other" in place of row ``index``: contexts in rotation, and their questions."""
    number, place = divmod(index, len(others))
    asked = task.rows_under(row, others[place])
    return asked[number % len(asked)]._replace(id=row.id)


def make_evaluation_views(task: Task, rows: list[Row], split: str) -> dict[str, list[Row]]:
    """Build the views in which a split is evaluated, each a list parallel to ``rows``.

    - bare: no context.
    - context: the context to internalize; left out if no row has one.
    - empty: a context block without content.
    - other: another context of this split, with the reference or check that is right for it (obedience); left out if
      the task has no other contexts.
    - paraphrase: the context in other words; left out if the task has no paraphrases.
    - unrelated: a context that bears on no question; left out if the task has none.

    The other context of a row depends only on its index, so all arms and all steps see the same prompts.
    """
    views = {"bare": [row._replace(context=None) for row in rows]}
    if any(row.context is not None for row in rows):
        views["context"] = list(rows)
    views["empty"] = [row._replace(context="") for row in rows]
    others = task.other_contexts(split)
    if others:
        views["other"] = [_choose_under(task, row, others, index) for index, row in enumerate(rows)]
    paraphrases = [task.paraphrase(row, np.random.default_rng(index)) for index, row in enumerate(rows)]
    if rows and all(text is not None for text in paraphrases):
        views["paraphrase"] = [row._replace(context=text) for row, text in zip(rows, paraphrases)]
    if (unrelated := task.unrelated()) is not None:
        views["unrelated"] = [row._replace(context=unrelated) for row in rows]
    return views
