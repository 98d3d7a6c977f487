"""Questions with reference answers in a local JSONL, Parquet or CSV file, under one context of the user's."""

from __future__ import annotations

from collections import Counter
import dataclasses

import numpy as np

from ctxjax.data.contexts import ContextConfig, Contexts, OtherContexts
from ctxjax.data.graders import GRADERS
from ctxjax.data.records import Reader, RecordsConfig, digest
from ctxjax.data.task import Grade, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaConfig(ContextConfig):
    """See configs/base.py, ``config.qa_jsonl`` and, for ``records``, ``config.records``."""

    path: str
    question: str
    reference: str
    grading: str
    limit: int
    dev_questions: int
    test_questions: int
    records: RecordsConfig = RecordsConfig()


class QaJsonl:
    """The task over one file; a question's split is a hash of its text, so it never changes sides."""

    def __init__(self, config: QaConfig):
        self.config = config
        reader = Reader(config.records)
        contexts = Contexts(config, "qa_jsonl")
        self.others = OtherContexts(config, "qa_jsonl", reader, list(contexts.texts.values()))
        rows, seen = {}, {}
        for record in reader.records(config.path, config.limit, "qa_jsonl.path"):
            texts = reader.texts(record, config.question, config.reference, *contexts.columns)
            if texts is None:
                continue
            question, reference, *own = texts
            key = digest(question)[:16]
            if reader.is_new(record, seen, key, reference):
                rows[key] = Row(key, question, contexts.of(key, *own), reference)
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
        self.facts = {
            "data": reader.digests,
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "contexts": contexts.facts(),
        }

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def grade(self, response: str, reference: str) -> Grade:
        return GRADERS[self.config.grading](response, reference)

    def other_contexts(self, split: str) -> list[str]:
        return self.others.split(split)

    def under(self, row: Row, context: str) -> Row:
        return self.others.under(row, context)

    def paraphrase(self, row: Row, rng: np.random.Generator) -> None:
        return None
