"""The rows of a file in each format: JSONL, Parquet, CSV and plain lines, by the ending of its name."""

from __future__ import annotations

from collections.abc import Iterator
import csv
import json
from pathlib import Path
import sys
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet


class Unreadable(NamedTuple):
    """In place of a row's value: why it could not be read."""

    why: str


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                value = Unreadable(f"not UTF-8 text: {error}")
            except (ValueError, RecursionError) as error:  # numbers with thousands of digits; deep nesting
                torn = "" if line.endswith(b"\n") else " (the file ends here: is it complete?)"
                value = Unreadable(f"not valid JSON: {error}{torn}")
            yield f"line {number}", value


def _read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # records.max_text limits the length, as for other files
    # Bytes that are not UTF-8 become lone surrogates, which Reader finds.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        delimiter = max(",;\t", key=lines.readline().count)
        lines.seek(0)
        rows = csv.reader(lines, strict=True, delimiter=delimiter)
        header = next(rows, [])
        if len(set(header)) != len(header):
            raise ValueError(f"data file {file}: the header names a column twice: {header}")
        while True:
            start = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {start}", Unreadable(f"not valid CSV: {error}")
                continue
            if not row:
                continue
            value: Any = dict(zip(header, row))
            if len(row) != len(header):
                value = Unreadable(f"not valid CSV: {len(row)} fields, but the header names {len(header)}")
            yield f"line {start}", value


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Return every line as a text, empty lines too: such files often come in pairs of parallel lines."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value: Any = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                value = Unreadable(f"not UTF-8 text: {error}")
            yield f"line {number}", value


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    with pyarrow.parquet.ParquetFile(file) as table:
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            columns = {name: _to_python(column) for name, column in zip(batch.schema.names, batch.columns)}
            for index in range(batch.num_rows):
                number += 1
                row = {name: values[index] for name, values in columns.items()}
                broken = [(name, v.why) for name, v in row.items() if isinstance(v, Unreadable)]
                yield f"row {number}", Unreadable("column {!r}: {}".format(*broken[0])) if broken else row


def _to_python(column: pyarrow.Array) -> list:
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, times out of range: find the bad rows
        values = [_to_python_value(scalar) for scalar in column]
    return [_shorten_floats(value, column.type) for value in values]


def _to_python_value(scalar: pyarrow.Scalar):
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return Unreadable(str(error))


def _shorten_floats(value, kind: pyarrow.DataType):
    """Return the value with the shortest decimals that are its 16- and 32-bit floats: 0.1, not 0.10000000149011612."""
    types = pyarrow.types
    if value is None or isinstance(value, Unreadable):
        return value
    if types.is_float16(kind) or types.is_float32(kind):
        return float(str(kind.to_pandas_dtype()(value)))
    if types.is_struct(kind):
        return {field.name: _shorten_floats(value[field.name], field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_shorten_floats(item, kind.value_type) for item in value]
    return value


READERS = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet,
    ".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_lines,
}  # fmt: skip
