"""Questions with reference answers in a local JSONL, Parquet or CSV file, under one context of the user's."""

from __future__ import annotations

from collections import Counter
import dataclasses
import hashlib
import re

import numpy as np

from ctxjax.data.records import Reader, RecordsConfig, read_context
from ctxjax.data.task import Grade, Row

GRADINGS = ("numeric", "exact")


@dataclasses.dataclass(frozen=True)
class QaConfig:
    """See configs/base.py, ``config.qa_jsonl`` and, for ``records``, ``config.records``; ``other_contexts_file`` is a
    JSONL file of strings."""

    path: str
    question: str
    reference: str
    grading: str
    limit: int
    context: str
    context_file: str
    other_contexts_file: str
    dev_questions: int
    test_questions: int
    records: RecordsConfig = RecordsConfig()


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
        if config.context and config.context_file:
            raise ValueError("qa_jsonl.context and qa_jsonl.context_file are both set; give one of them")
        if not config.context and not config.context_file:
            raise ValueError("qa_jsonl has no context; set qa_jsonl.context_file (or qa_jsonl.context)")
        self.context = config.context or read_context(config.context_file)
        reader = Reader(config.records)
        self.others = self._read_others(reader) if config.other_contexts_file else []
        rows, seen = {}, {}
        for record in reader.records(config.path, config.limit, "qa_jsonl.path"):
            texts = reader.texts(record, config.question, config.reference)
            if texts is None:
                continue
            question, reference = texts
            key = hashlib.sha256(question.encode()).hexdigest()[:16]
            if reader.is_new(record, seen, key, reference):
                rows[key] = Row(key, question, self.context, reference)
        self.skipped: Counter[str] = reader.skipped
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

    def _read_others(self, reader: Reader) -> list[str]:
        path, texts, seen = self.config.other_contexts_file, [], {}
        for record in reader.records(path, field="qa_jsonl.other_contexts_file"):
            text = reader.text(record)
            if text is None:
                continue
            if text.strip() == self.context.strip():
                raise ValueError(f"{record.where}: the context that is to be internalized; leave it out of this file")
            if reader.is_new(record, seen, text):
                texts.append(text)
        if len(texts) < 2:
            raise ValueError(f"{path} has {len(texts)} contexts; half of them are held out, so give at least two")
        return texts

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def grade(self, response: str, reference: str) -> Grade:
        if self.config.grading == "numeric":
            parsed = last_number(response)
            return Grade(parsed, parsed is not None and parsed == last_number(reference))
        parsed = " ".join(response.split()).casefold()
        return Grade(parsed or None, bool(parsed) and parsed == " ".join(reference.split()).casefold())

    def other_contexts(self, split: str) -> list[str]:
        """The even lines of the file are trained on, the odd ones are held out."""
        return self.others[::2] if split == "train" else self.others[1::2]

    def under(self, row: Row, context: str) -> Row:
        return row._replace(context=context)

    def paraphrase(self, row: Row, rng: np.random.Generator) -> None:
        return None
