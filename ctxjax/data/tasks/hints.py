"""Questions that each have their own context: a worked solution, feedback, or a hint that only the teacher sees.

A row has a question, a reference and a hint. What such contexts teach often does not transfer to questions without a
hint, unlike what a shared context teaches (inputs.open_inputs warns of this).
"""

from __future__ import annotations

import dataclasses

from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import FileTask, Question, RowsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HintsConfig(RowsConfig):
    """See configs/base.py, ``config.hints``. ``{hint}`` in ``template`` is replaced by the text of the hint column."""

    question: str
    reference: str
    hint: str
    template: str
    grading: str


class Hints(FileTask):
    """The task over files of rows that each have their own context."""

    fields = ("question", "reference", "hint", "grading")

    def __init__(self, config: HintsConfig):
        if "{hint}" not in config.template:
            raise ValueError(f"hints.template = {config.template!r} must contain {{hint}}, for the hint's text")
        super().__init__(config, "hints", contexts=None)

    def parse_question(self, reader: Reader, record: Record) -> Question | None:
        config = self.config
        texts = reader.get_texts(record, config.question, config.hint)
        reference = texts and reader.get_reference(record, config.reference, GRADERS[config.grading].read_reference)
        if not reference:
            return None
        question, hint = texts
        return Question(question, question, reference, config.template.replace("{hint}", hint))

    def grade(self, response: str, reference: str) -> Grade:
        return GRADERS[self.config.grading].grade(response, reference)
