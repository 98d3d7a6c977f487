"""Read rows of data files: JSONL, Parquet, CSV and plain lines.

A bad row has a kind (KINDS). ``config.records`` says what happens: rows of the kinds in ``skip`` are left out and
counted, up to a limit; any other bad row is an error that names the file and the row. What an answer may be is up to
each task's ``parse_question``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
import csv
import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from ctxjax.data.formats import READERS, Unreadable
from ctxjax.host.retry import retry
from ctxjax.types import bounded

ROWS_AT_A_TIME = 4096
_ENDINGS = " or ".join([", ".join(list(READERS)[:-1]), list(READERS)[-1]])
KINDS = {
    "unreadable": "not valid JSON or CSV, or not UTF-8",
    "missing": "no such column, null, or an empty text",
    "not_text": "a value that is not text",
    "huge": "a text longer than records.max_text",
    "duplicate": "the same as an earlier row",
    "label": "a label or an answer that its column cannot have",
    "conflict": "the same question as an earlier row, with another answer",
}


@dataclasses.dataclass(frozen=True)
class RecordsConfig:
    """See configs/base.py, ``config.records``. ``skip``: names of KINDS. ``max_skipped`` does not count duplicates."""

    skip: tuple[str, ...] = ("duplicate",)
    max_skipped: int = bounded(100, zero=True)
    max_text: int = 1_000_000


class Record(NamedTuple):
    """One row: ``where`` names its file and line, for messages; ``value`` is a dict of columns in most files."""

    where: str
    value: Any


class Reader:
    """Reads files with one configuration. ``fields``: the fields that say what the columns are, for messages.
    ``skipped``: how many rows were left out, by kind. ``digests``: the sha256 of every file, by its path."""

    def __init__(self, config: RecordsConfig, fields: tuple[str, ...] = ()):
        self.config, self.fields, self.skipped, self.digests = config, fields, Counter(), {}

    def read(self, path: str | Path, limit: int = 0, field: str = "path") -> Iterator[Record]:
        """Iterate over the readable rows among the first ``limit`` rows of a file (0: all rows).

        Only some rows are in memory at one time. ``field``: the configuration field that holds the path, for messages.
        Raises FileNotFoundError, or ValueError that names the file and, if one row is the cause, the row.
        """
        file = Path(path).expanduser()
        if not str(path) or not file.is_file():
            raise FileNotFoundError(f"data file {str(path)!r} does not exist; set {field} to a {_ENDINGS} file")
        if file.suffix.lower() not in READERS:
            raise ValueError(f"data file {path}: {file.suffix!r} is not known; set {field} to a {_ENDINGS} file")
        return self._read(path, file, limit)

    def _read(self, path: str | Path, file: Path, limit: int) -> Iterator[Record]:
        is_empty = True
        for where, value in _read_rows(path, file, limit):
            if isinstance(value, Unreadable):
                self.reject("unreadable", f"{path}, {where}", value.why)
            else:
                is_empty = False
                yield Record(f"{path}, {where}", value)
        if is_empty:
            raise ValueError(f"data file {path} has no rows")
        with file.open("rb") as content:
            self.digests[str(path)] = hashlib.file_digest(content, "sha256").hexdigest()

    def get_texts(self, record: Record, *columns: str) -> list[str] | None:
        """Return the texts of these columns; None if the row was left out. Column "a.b" is key b of the dict in a."""
        if not isinstance(record.value, dict):
            self.reject("not_text", record.where, f"no text in column {columns[0]!r}; the row is not an object")
            return None
        found = []
        for column in columns:
            value = _look_up(record.value, column)
            if not self.is_usable(value, record.where, f"no text in column {column!r}", record.value):
                return None
            found.append(value)
        return found

    def get_reference(
        self, record: Record, column: str, read: Callable[[Any], str], what: str = "reference"
    ) -> str | None:
        """Return ``read`` of the value in ``column``, which may be a text, a number or a boolean; None if the row was
        left out. A value that ``read`` refuses (ValueError) is a bad "label". ``what``: its name in messages."""
        value = _look_up(record.value, column)
        is_text = value is None or isinstance(value, (str, list, dict))
        if is_text and not self.is_usable(value, record.where, f"no {what} in column {column!r}", record.value):
            return None
        try:
            return read(value)
        except ValueError as error:
            self.reject("label", record.where, f"column {column!r}: {error}")
            return None

    def get_text(self, record: Record) -> str | None:
        """Return the row if it is itself a text; None if it was left out."""
        return record.value if self.is_usable(record.value, record.where, "not a text") else None

    def is_new(self, record: Record, seen: dict[str, tuple[str, Any]], key: str, content: Any = None) -> bool:
        """Whether no earlier row had ``key``. ``seen`` stores the keys; start with an empty dict.

        A repeated key is rejected as a "duplicate", or as a "conflict" if ``content`` differs. The first row stays.
        """
        where, before = seen.setdefault(key, (record.where, content))
        if where == record.where:
            return True
        place = where.rsplit(", ", 1)[-1]
        if before == content:
            self.reject("duplicate", record.where, f"the same as {place}")
        else:
            self.reject("conflict", record.where, f"the same as {place}, with another answer")
        return False

    def reject(self, kind: str, where: str, why: str) -> None:
        """Count a bad row, or raise ValueError, as configured for its kind."""
        if kind not in self.config.skip:
            skip = (*self.config.skip, kind)
            is_setting = self.fields and kind in ("missing", "label")
            remedy = f"set {', '.join(self.fields)} to what the file has, " if is_setting else ""
            raise ValueError(
                f'{where}: {why}; {remedy}fix the row, or leave such rows out: --config.records.skip="{skip}"'
            )
        self.skipped[kind] += 1
        total = self.skipped.total() - self.skipped["duplicate"]  # a repeated row loses nothing
        if total > self.config.max_skipped:
            raise ValueError(
                f"{where}: {why}; with this row {total} rows are left out ({format_counts(self.skipped)}), more than "
                f"records.max_skipped = {self.config.max_skipped}; fix them, or raise the limit"
            )

    def is_usable(self, value, where: str, complaint: str, row: dict | None = None) -> bool:
        """Whether a value is a usable text; if not, reject its row. ``complaint`` begins the message."""
        if value is None or (isinstance(value, str) and not value.strip()):
            is_there = row is None or value is not None
            has = "it is empty" if is_there else f"its columns are {sorted(map(str, row))}"
            self.reject("missing", where, f"{complaint}; {has}")
        elif not isinstance(value, str):
            self.reject("not_text", where, f"{complaint}, but {_shorten(value)}")
        elif len(value) > self.config.max_text:
            size = f"{len(value)} characters are more than records.max_text = {self.config.max_text}"
            self.reject("huge", where, f"{complaint} of a usable length: {size}")
        elif not _is_unicode(value):
            self.reject("unreadable", where, f"{complaint} that is valid Unicode; it begins {_shorten(value)}")
        else:
            return True
        return False


def hash_text(text: str) -> str:
    """Return the sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def format_counts(skipped: dict[str, int]) -> str:
    """Format counts as text, such as "huge 1, missing 3"."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))


def describe_left_out(overlong: dict[str, int], skipped: dict[str, int]) -> str:
    """Return what is not asked: ``overlong`` prompts by split, ``skipped`` rows of data files by kind; or "none"."""
    counts = {"prompts that are too long": {name: count for name, count in overlong.items() if count}}
    counts["rows of data files"] = skipped
    return "; ".join(f"{what}: {format_counts(found)}" for what, found in counts.items() if found) or "none"


def read_context(path: str) -> str:
    """Read a context from a text file. A missing or empty file is an error: training without a context would look like
    success."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"context file {path} does not exist, seen from {Path.cwd()}") from None
    except IsADirectoryError:
        raise ValueError(f"context file {path} is a folder; name the text file itself") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"context file {path} is not UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"context file {path} is empty; the teacher would see no context")
    return text


def _read_rows(path: str | Path, file: Path, limit: int) -> Iterator[tuple[str, Any]]:
    """Iterate over (where, value), a few thousand rows at a time. After a transient error it opens the file again and
    continues behind the rows that it has returned."""
    read, rows, count = READERS[file.suffix.lower()], None, 0

    def read_some() -> list[tuple[str, Any]]:
        nonlocal rows
        try:
            if rows is None:
                rows = itertools.islice(read(file), count, limit or None)
            return list(itertools.islice(rows, ROWS_AT_A_TIME))
        except BaseException:
            rows = None
            raise

    while True:
        try:
            some = retry(read_some, f"data file {path}")
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException, csv.Error) as error:
            raise ValueError(f"data file {path} cannot be read: {error}") from None
        if not some:
            return
        count += len(some)
        yield from some


def _look_up(row: dict, column: str):
    """Return the value of a column. If there is no column "a.b", look up b in the dict in column a."""
    if column in row or "." not in column:
        return row.get(column)
    first, rest = column.split(".", 1)
    inner = row.get(first)
    return _look_up(inner, rest) if isinstance(inner, dict) else None


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON may contain half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shorten(value) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:60]}{'...' if len(shown) > 60 else ''}"
