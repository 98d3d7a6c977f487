"""Questions with a context each: a worked solution, feedback, a hint that only the teacher may see.

Any rows with a question, a reference and a column for the hint. What such contexts teach often does not carry over to
questions without one, as what a shared context teaches does (inputs.open_inputs says so).
"""

from __future__ import annotations

import dataclasses

from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import Asked, FileTask, RowsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HintsConfig(RowsConfig):
    """See configs/base.py, ``config.hints``. ``template`` has ``{hint}`` where the column's text goes."""

    question: str
    reference: str
    hint: str
    template: str
    grading: str


class Hints(FileTask):
    """The task of one file's rows, each under its own context."""

    def __init__(self, config: HintsConfig):
        if "{hint}" not in config.template:
            raise ValueError(f"hints.template = {config.template!r} must have {{hint}} where the hint goes")
        super().__init__(config, "hints", contexts=None)

    def asked(self, reader: Reader, record: Record) -> Asked | None:
        config = self.config
        texts = reader.texts(record, config.question, config.reference, config.hint)
        if not texts:
            return None
        question, reference, hint = texts
        return Asked(question, question, reference, config.template.replace("{hint}", hint))

    def grade(self, response: str, reference: str) -> Grade:
        return GRADERS[self.config.grading](response, reference)
