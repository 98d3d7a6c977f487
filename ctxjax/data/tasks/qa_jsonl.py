"""Questions with reference answers in a local JSONL, Parquet or CSV file, under one context of the user's."""

from __future__ import annotations

from collections import Counter
import dataclasses

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.records import Reader, RecordsConfig, digest
from ctxjax.data.task import Row
from ctxjax.data.tasks.file_task import Asked, FileTask


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


class QaJsonl(FileTask):
    """The task over one file. So many questions are held out as the configuration says, those whose text has the
    smallest hash: which of them they are does not hang on the order of the file."""

    def __init__(self, config: QaConfig):
        super().__init__(config, "qa_jsonl", Contexts(config, "qa_jsonl"))

    def split(self, reader: Reader) -> tuple[dict[str, list[Row]], Counter[str]]:
        config, rows, seen = self.config, {}, {}
        for record in reader.records(config.path, config.limit, "qa_jsonl.path"):
            texts = reader.texts(record, config.question, config.reference, *self.columns)
            if texts is None:
                continue
            question, reference, *own = texts
            key = digest(question)[:16]
            if reader.is_new(record, seen, key, reference):
                rows[key] = self.row(key, Asked(question, question, reference, *own))
        ordered = [rows[key] for key in sorted(rows)]
        held_out = config.dev_questions + config.test_questions
        if len(ordered) <= held_out:
            raise ValueError(
                f"{config.path} has {len(ordered)} different questions, and qa_jsonl.dev_questions + test_questions = "
                f"{held_out} of them are to be held out; none would be left to train on"
            )
        dev, test, train = ordered[: config.dev_questions], ordered[config.dev_questions : held_out], ordered[held_out:]
        return {"dev": dev, "test": test, "train": train}, Counter()

    def grade(self, response: str, reference: str) -> Grade:
        return GRADERS[self.config.grading](response, reference)
