"""Contexts: where those to internalize come from, and the pool of others that a student should keep obeying.

A context is inline text, a file, one of several files drawn for each row, or a column of the data. The pool of others
is a file of the user's or the built-in ``other_contexts.jsonl``. Each of its contexts may carry a check, which says by
itself whether a response obeys it (data/checks.py); where none does, obedience is the task's own accuracy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from ctxjax.data.checks import parse_check
from ctxjax.data.task import Check, Row

BUILT_IN = "builtin"
BUILT_IN_FILE = Path(__file__).with_name("other_contexts.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """The fields that every task over files has; see configs/base.py. Exactly one of the first four is set."""

    context: str
    context_file: str
    context_files: tuple[str, ...]
    context_column: str
    context_seed: int
    other_contexts_file: str


def digest(text: str | bytes) -> str:
    """sha256 in hexadecimal: what a run notes of a text or a file that it depends on."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def read_context(path: str) -> str:
    """A context from a text file. A missing or empty file is an error: training on nothing looks like success."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"context file {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"context file {path} is a folder; give a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"context file {path} is not UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"context file {path} is empty; the teacher would see no context")
    return text


class Contexts:
    """The contexts to internalize. ``section`` is the task's name, for messages.

    Raises ValueError or FileNotFoundError where there is none, or more than one source.
    """

    def __init__(self, config: ContextConfig, section: str):
        sources = {
            "context": config.context,
            "context_file": config.context_file,
            "context_files": tuple(config.context_files),
            "context_column": config.context_column,
        }
        given = [name for name, value in sources.items() if value]
        if not given:
            raise ValueError(
                f"{section} has no context; set {section}.context_file (or {section}.context, .context_files or "
                ".context_column)"
            )
        if len(given) > 1:
            fields = " and ".join(f"{section}.{name}" for name in given)
            raise ValueError(f"{fields} are both set; give one of them")
        self._section, self._seed, self._column = section, config.context_seed, config.context_column
        if config.context:
            self._texts = {"inline": config.context}
        else:
            files = config.context_files or ((config.context_file,) if config.context_file else ())
            self._texts = {str(name): read_context(name) for name in files}

    def of(self, row_id: str, record: dict) -> str:
        """The context of a row: a pure function of the seed and its id, or the record's own.

        Raises ValueError where the record has no text in the column.
        """
        if not self._column:
            texts = list(self._texts.values())
            return texts[int(digest(f"{self._seed}:{row_id}"), 16) % len(texts)]
        text = record.get(self._column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"row {row_id}: no text in column {self._column!r}, which {self._section}.context_column names; "
                f"its columns are {sorted(record)}"
            )
        return text

    def facts(self) -> dict:
        """What a run notes: the file's name, or "inline", and the sha256 of its text; or the column's name."""
        if self._column:
            return {"column": self._column}
        return {name: digest(text) for name, text in self._texts.items()}


class OtherContexts:
    """The pool of other contexts: of its file, the first line, the third and so on are trained on, the rest held out.

    A line is a JSON string, or an object ``{"context": TEXT, "check": NAME, "argument": VALUE}``. Where any held-out
    context has a check, only those with one are evaluated: a mean over two kinds of measure would be neither.
    """

    def __init__(self, config: ContextConfig, section: str):
        self._checks: dict[str, Check | None] = {}
        self._source, self._digest = config.other_contexts_file, ""
        if not config.other_contexts_file:
            return
        built_in = config.other_contexts_file == BUILT_IN
        path = BUILT_IN_FILE if built_in else Path(config.other_contexts_file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{section}.other_contexts_file = {path} does not exist")
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        self._digest = digest(content)
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                self._add(line, f"{path}, line {number}")
        if len(self._checks) < 2:
            raise ValueError(f"{path} must hold at least two lines with a context each; one half is held out")

    def _add(self, line: str, where: str) -> None:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        entry = {"context": value} if isinstance(value, str) else value
        text = entry.get("context") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where}: must be a JSON string with a context, or an object with "context" and "check"')
        if text in self._checks:
            raise ValueError(f"{where}: this context stands there twice; it would be trained on and held out")
        self._checks[text] = parse_check(entry, where)

    def split(self, split: str) -> list[str]:
        """Contexts to train on, or held-out ones: for dev and test."""
        texts = list(self._checks)
        if split == "train":
            return texts[::2]
        held_out = texts[1::2]
        return [text for text in held_out if self._checks[text]] or held_out

    def under(self, row: Row, context: str) -> Row:
        """The question under a context of the pool, with the check that says whether it is obeyed."""
        return row._replace(context=context, check=self._checks.get(context))

    def facts(self) -> dict:
        return {self._source: self._digest} if self._source else {}


def one_each(rows: list[Row]) -> bool:
    """Whether every row has a context of its own: such hints often do not transfer to questions without one."""
    return len(rows) > 1 and len({row.context for row in rows}) == len(rows)
