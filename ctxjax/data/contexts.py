"""The contexts to internalize, and the pool of other contexts that a student should keep obeying.

The context to internalize is inline text, a text file, one of several files drawn for each row, or a column of the
data. The pool is a file of the user or the built-in ``other_contexts.jsonl``. A context of the pool may have a check,
which decides from the response alone whether the context is obeyed (data/grading/response_checks.py). For a context
without a check, obedience is the accuracy of the task, if that says anything (``require_checks``).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

from ctxjax.data import splits
from ctxjax.data.grading.response_checks import Check, parse_check
from ctxjax.data.records import Reader, Record, hash_text, read_context
from ctxjax.data.task import Row
from ctxjax.types import bounded

BUILT_IN = "builtin"
# Further sources that some tasks have: how each row's context is made of its columns.
FROM_ROWS = ("context_template", "teacher_messages")
POOLS = ("other_contexts_file", "other_rows")  # the fields that give other contexts, of the sections that have them
BUILT_IN_FILE = Path(__file__).with_name("other_contexts.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherContextsConfig:
    """``other_contexts_file``: "builtin", a file, or "" for no pool; see configs/base.py."""

    other_contexts_file: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig(OtherContextsConfig):
    """The source of the context to internalize; see configs/base.py.

    Exactly one source is set: ``context``, ``context_file``, ``context_files`` or ``context_column`` (which needs data
    with columns). If not ``required``, all may be empty.
    """

    context: str
    context_file: str
    context_files: tuple[str, ...]
    context_seed: int = bounded(zero=True)
    context_column: str = ""
    required: bool = True


class Contexts:
    """The contexts to internalize.

    ``section``: the name of the task, for messages. ``columns``: the data column that holds each row's context, as a
    tuple of one name or none. ``texts``: the texts that do not come from a column, by file name or "inline".

    Raises ValueError or FileNotFoundError if there is no context or more than one source.
    """

    def __init__(self, config: ContextConfig, section: str):
        fields = ("context", "context_file", "context_files", "context_column", *FROM_ROWS)
        given = [f"{section}.{field}" for field in fields if getattr(config, field, "")]
        if not given and config.required:
            raise ValueError(f"{section} has no context; set {section}.context_file (or {section}.context)")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; set only one of them")
        self._seed, self._given = config.context_seed, given
        self.columns = (config.context_column,) if config.context_column else ()
        files = config.context_files or ((config.context_file,) if config.context_file else ())
        self.texts = {"inline": config.context} if config.context else {str(f): read_context(f) for f in files}

    def choose(self, row_id: str, own: str | None = None) -> str | None:
        """Return the context of a row: ``own``, its text from the column, or one of ``texts``.

        The choice among several texts is a pure function of the seed and the row id. None if there are no contexts.
        """
        if own is not None or not self.texts:
            return own
        texts = list(self.texts.values())
        return texts[int(hash_text(f"{self._seed}:{row_id}"), 16) % len(texts)]

    def describe(self) -> dict:
        """Return what a run records: the sha256 of each text by its file name or "inline"; or the column's name, or the
        field that makes them of the rows."""
        if self.columns:
            return {"column": self.columns[0]}
        made = {"made by": self._given} if self._given else {}
        return {name: hash_text(t) for name, t in self.texts.items()} or made


class OtherContexts:
    """The pool of other contexts. Rows 1, 3, 5, ... of its file are for training; rows 2, 4, 6, ... are held out, every
    third of these for dev and the others for test.

    A row is a JSON string, or an object ``{"context": TEXT, "check": NAME, "argument": VALUE}``. If any held-out
    context has a check, only held-out contexts with a check are evaluated: a check and the task's accuracy are
    different measures, and their mean has no meaning.

    Raises ValueError if a line cannot be read, or if there are too few contexts for three splits.
    """

    def __init__(self, config: OtherContextsConfig, section: str, reader: Reader, internalized: list[str]):
        self._checks: dict[str, Check | None] = {}
        self._splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        if not config.other_contexts_file:
            return
        path = BUILT_IN_FILE if config.other_contexts_file == BUILT_IN else config.other_contexts_file
        own, seen = {text.strip() for text in internalized}, {}
        for record in reader.read(path, field=f"{section}.other_contexts_file"):
            is_object = isinstance(record.value, dict)
            text = (reader.get_texts(record, "context") or [None])[0] if is_object else reader.get_text(record)
            if text is None:
                continue
            _refuse_internalized(record, text, own)
            check = parse_check(record.value, record.where) if is_object else None
            if reader.is_new(record, seen, text, check):
                self._checks[text] = check
        texts = list(self._checks)
        with_check = [text for text in texts[1::2] if self._checks[text]]
        held_out = with_check or texts[1::2]
        if len(held_out) < 2:
            has = f"{len(texts)} contexts"
            if with_check:
                has += " and, of those in its rows 2, 4, 6, ..., one that has a check"
            raise ValueError(
                f"{path} has {has}: too few to hold out different contexts for dev and for test. Give at least four"
                f"{', two of rows 2, 4, 6, ... with a check' if with_check else ''}, or set "
                f"{section}.other_contexts_file to builtin, or to nothing for no pool"
            )
        self._splits = _split_contexts(texts[::2], held_out)

    def require_checks(self, field: str) -> None:
        """Raise ValueError if a held-out context has no check: for tasks whose own grade is of no use under others."""
        for context in (*self._splits["dev"], *self._splits["test"]):
            if self._checks[context] is None:
                raise ValueError(
                    f"{field}: the context {context[:60]!r} has no check, and how this task grades responses says "
                    "nothing about other contexts; give those in rows 2, 4, 6, ... a check each (docs/contexts.md), or "
                    "set the field to builtin, or to nothing for no pool"
                )

    def select(self, split: str) -> list[str]:
        """Return the contexts of "train", "dev" or "test". No two splits share one."""
        return self._splits[split]

    def rows_under(self, row: Row, context: str) -> list[Row]:
        """Return the question under a context of the pool, with the context's check."""
        return [row._replace(context=context, check=self._checks.get(context))]


class OtherRows:
    """Other contexts that come with their own questions and references: a file of the user's rows.

    The contexts are split, in the order of their first rows, as those of ``OtherContexts``; a context's questions go
    with it. ``columns``: those of the question and the reference; the context is in "context". ``read``: a value ->
    reference.

    Raises ValueError if a row cannot be used, or if there are fewer than four contexts.
    """

    def __init__(
        self,
        path: str,
        field: str,
        columns: tuple[str, str],
        read: Callable[[Any], str],
        reader: Reader,
        internalized: list[str],
    ):
        self._rows: dict[str, list[Row]] = {}
        own, seen = {text.strip() for text in internalized}, {}
        for record in reader.read(path, field=field):
            texts = reader.get_texts(record, columns[0], "context")
            reference = texts and reader.get_reference(record, columns[1], read)
            if not reference:
                continue
            question, context = texts
            _refuse_internalized(record, context, own)
            key = hash_text(f"{context}\n{splits.normalize(question)}")[:16]
            if reader.is_new(record, seen, key, reference):
                self._rows.setdefault(context, []).append(Row(key, question, context, reference))
        if len(self._rows) < 4:
            raise ValueError(
                f"{path} has rows under {len(self._rows)} contexts: too few to hold out different ones for dev and for "
                f"test; give at least four, or set {field} to nothing"
            )
        self._splits = _split_contexts(list(self._rows)[::2], list(self._rows)[1::2])

    def select(self, split: str) -> list[str]:
        """Return the contexts of "train", "dev" or "test". No two splits share one."""
        return self._splits[split]

    def rows_under(self, row: Row, context: str) -> list[Row]:
        """Return the context's own questions."""
        return self._rows[context]


def _refuse_internalized(record: Record, context: str, internalized: set[str]) -> None:
    if context.strip() in internalized:
        raise ValueError(f"{record.where}: this is the context to internalize; remove it from this file")


def _split_contexts(train: list[str], held_out: list[str]) -> dict[str, list[str]]:
    """Return the contexts by split; every third of ``held_out`` is for dev, the others are for test."""
    dev = held_out[1::3]
    return {"train": train, "dev": dev, "test": [text for text in held_out if text not in dev]}


def check_retention(contexts: list[str], section: str, config) -> None:
    """Raise ValueError if there are no other contexts to train on, which an arm with retention needs.

    ``config``: the section of the task; ``section``: its name.
    """
    if contexts:
        return
    fields = " or ".join(f"{section}.{field}" for field in POOLS if hasattr(config, field))
    raise ValueError(
        f"loss.mu > 0 needs other contexts to retain, and task {section} has none; "
        f"{f'set {fields}, or ' if fields else ''}leave out the arms with retention (run_arms)"
    )


def has_context_per_row(rows: list[Row]) -> bool:
    """Whether every row has a different context. What such hints teach often does not transfer to bare questions."""
    return len(rows) > 1 and len({row.context for row in rows}) == len(rows)
