"""Questions with reference answers in a local JSONL or Parquet file, under one context of the user's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
import re

import numpy as np
import pyarrow.lib
import pyarrow.parquet

from ctxjax.data.contexts import ContextConfig, Contexts, OtherContexts, digest
from ctxjax.data.task import Grade, Row

GRADINGS = ("numeric", "exact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaConfig(ContextConfig):
    """See configs/base.py, ``config.qa_jsonl``."""

    path: str
    question: str
    reference: str
    grading: str
    limit: int
    dev_questions: int
    test_questions: int


def _read_jsonl(path: Path, limit: int) -> list:
    values = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit and len(values) >= limit:
                break
            if not line.strip():
                continue
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    return values


def read_records(path: str, limit: int) -> list[dict]:
    """The first ``limit`` rows (0: all) of a .jsonl or .parquet file, as dicts."""
    file = Path(path)
    if not path or not file.is_file():
        raise FileNotFoundError(f"data file {path!r} does not exist; set qa_jsonl.path to a .jsonl or .parquet file")
    try:
        if file.suffix == ".parquet":
            table = pyarrow.parquet.read_table(file)
            records = table.slice(0, limit or None).to_pylist()
        else:
            records = _read_jsonl(file, limit)
    except (UnicodeDecodeError, pyarrow.lib.ArrowInvalid) as error:
        raise ValueError(f"data file {path} cannot be read: {error}") from None
    if not records:
        raise ValueError(f"data file {path} has no rows")
    return records


def last_number(text: str) -> str | None:
    """The last number of a text in a canonical form ("1,234.50" -> "1234.5"), or None.

    It stands where a solution's answer stands in GSM8K ("#### 72") and in most chat answers.
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = float(found[-1].replace(",", ""))
    return str(int(number)) if number.is_integer() else repr(number)


class QaJsonl:
    """The task over one file; a question's split is a hash of its text, so it never changes sides."""

    def __init__(self, config: QaConfig):
        self.config = config
        self.contexts = Contexts(config, "qa_jsonl")
        self.others = OtherContexts(config, "qa_jsonl")
        records = read_records(config.path, config.limit)
        for column in (config.question, config.reference):
            for number, record in enumerate(records):
                if not isinstance(record, dict) or not isinstance(record.get(column), str):
                    has = f"its columns are {sorted(record)}" if isinstance(record, dict) else "it is not an object"
                    raise ValueError(f"{config.path}, row {number}: no text in column {column!r}; {has}")
        rows = {}
        for record in records:
            question = record[config.question]
            key = digest(question)[:16]
            rows[key] = Row(key, question, self.contexts.of(key, record), record[config.reference])
        ordered = [rows[key] for key in sorted(rows)]
        held_out = config.dev_questions + config.test_questions
        if len(ordered) <= held_out:
            raise ValueError(
                f"{config.path} has {len(ordered)} different questions, and qa_jsonl.dev_questions + test_questions = "
                f"{held_out} of them are to be held out; none would be left to train on"
            )
        self.splits = {
            "dev": ordered[: config.dev_questions],
            "test": ordered[config.dev_questions : held_out],
            "train": ordered[held_out:],
        }
        self.facts = {
            "data": {config.path: digest(Path(config.path).read_bytes())},
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "left out": {"repeated": len(records) - len(ordered)},
            "contexts": self.contexts.facts(),
            "other contexts": self.others.facts(),
        }

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def grade(self, response: str, reference: str) -> Grade:
        if self.config.grading == "numeric":
            parsed = last_number(response)
            return Grade(parsed, parsed is not None and parsed == last_number(reference))
        parsed = " ".join(response.split()).casefold()
        return Grade(parsed or None, bool(parsed) and parsed == " ".join(reference.split()).casefold())

    def other_contexts(self, split: str) -> list[str]:
        return self.others.split(split)

    def under(self, row: Row, context: str) -> Row:
        return self.others.under(row, context)

    def paraphrase(self, row: Row, rng: np.random.Generator) -> None:
        return None
