"""Contexts: where those to internalize come from, and the pool of others that a student should keep obeying.

A context is inline text, a file, one of several files drawn for each row, or a column of the data. The pool of others
is a file of the user's or the built-in ``other_contexts.jsonl``. Each of its contexts may carry a check, which says by
itself whether a response obeys it (data/grading/response_checks.py). For a context without one, obedience is the
task's own accuracy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ctxjax.data.grading.response_checks import Check, parse_check
from ctxjax.data.records import Reader, digest, read_context
from ctxjax.data.task import Row

BUILT_IN = "builtin"
BUILT_IN_FILE = Path(__file__).with_name("other_contexts.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherContextsConfig:
    """See configs/base.py: "builtin", a file, or ""."""

    other_contexts_file: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig(OtherContextsConfig):
    """Where contexts come from; see configs/base.py. Exactly one of the sources is set: ``context``, ``context_file``,
    ``context_files`` or ``context_column``, which needs data with columns; or none, where it is not ``required``."""

    context: str
    context_file: str
    context_files: tuple[str, ...]
    context_seed: int
    context_column: str = ""
    required: bool = True


class Contexts:
    """The contexts to internalize. ``section`` is the task's name, for messages; ``columns`` are those of the data that
    a row's context stands in, one or none; ``texts`` are the others by their source.

    Raises ValueError or FileNotFoundError where there is no context, or more than one source.
    """

    def __init__(self, config: ContextConfig, section: str):
        fields = ("context", "context_file", "context_files", "context_column")
        given = [f"{section}.{field}" for field in fields if getattr(config, field)]
        if not given and config.required:
            raise ValueError(f"{section} has no context; set {section}.context_file (or {section}.context)")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; give one of them")
        self._seed = config.context_seed
        self.columns = (config.context_column,) if config.context_column else ()
        files = config.context_files or ((config.context_file,) if config.context_file else ())
        self.texts = {"inline": config.context} if config.context else {str(f): read_context(f) for f in files}

    def of(self, row_id: str, own: str | None = None) -> str | None:
        """The context of a row: its ``own``, from the column, or a draw that is a pure function of the seed and its
        id. None where there are no contexts."""
        if own is not None or not self.texts:
            return own
        texts = list(self.texts.values())
        return texts[int(digest(f"{self._seed}:{row_id}"), 16) % len(texts)]

    def facts(self) -> dict:
        """What a run notes: the sha256 of each text under its file's name, or "inline"; or the column's name."""
        return {"column": self.columns[0]} if self.columns else {name: digest(t) for name, t in self.texts.items()}


class OtherContexts:
    """The pool of other contexts: of its file, the first row, the third and so on are trained on, the rest held out.

    A row is a JSON string, or an object ``{"context": TEXT, "check": NAME, "argument": VALUE}``. Where any held-out
    context has a check, only those with one are evaluated: a mean over two kinds of measure would be neither.
    """

    def __init__(self, config: OtherContextsConfig, section: str, reader: Reader, internalized: list[str]):
        self._checks: dict[str, Check | None] = {}
        if not config.other_contexts_file:
            return
        path = BUILT_IN_FILE if config.other_contexts_file == BUILT_IN else config.other_contexts_file
        own, seen = {text.strip() for text in internalized}, {}
        for record in reader.records(path, field=f"{section}.other_contexts_file"):
            is_object = isinstance(record.value, dict)
            text = (reader.texts(record, "context") or [None])[0] if is_object else reader.text(record)
            if text is None:
                continue
            if text.strip() in own:
                raise ValueError(f"{record.where}: the context that is to be internalized; leave it out of this file")
            check = parse_check(record.value, record.where) if is_object else None
            if reader.is_new(record, seen, text, check):
                self._checks[text] = check
        if len(self._checks) < 2:
            raise ValueError(
                f"{path} has {len(self._checks)} contexts; half of them are held out, so give at least two"
            )

    def split(self, split: str) -> list[str]:
        """Contexts to train on, or held-out ones: for dev and test."""
        texts = list(self._checks)
        if split == "train":
            return texts[::2]
        held_out = texts[1::2]
        return [text for text in held_out if self._checks[text]] or held_out

    def swap_context(self, row: Row, context: str) -> Row:
        """The question under a context of the pool, with the check that says whether it is obeyed."""
        return row._replace(context=context, check=self._checks.get(context))


def has_context_per_row(rows: list[Row]) -> bool:
    """Whether every row has a context of its own: such hints often do not transfer to questions without one."""
    return len(rows) > 1 and len({row.context for row in rows}) == len(rows)
