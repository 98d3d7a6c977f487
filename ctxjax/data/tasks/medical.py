"""Medical multiple choice: a question with four options; the answer is a letter.

    MedMCQA               question, opa, opb, opc, opd, cop (the right option's number)
    the reference's copy  content (a chat), answer (the letter)

A chat is asked unchanged. The published test rows of MedMCQA have no labels (cop = -1); use other rows for testing.
"""

from __future__ import annotations

import dataclasses
import re

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading import graders
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import FileTask, Question, RowsConfig, list_columns, unwrap_chat
from ctxjax.types import bounded

LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
FORMAT = "Give the letter of the right option between <answer> and </answer>."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedicalConfig(ContextConfig, RowsConfig):
    """See configs/base.py, ``config.medical``."""

    ask_format: bool
    first_label: int = bounded(zero=True)


class Medical(FileTask):
    """The task over files of one of the layouts above; the column names decide which."""

    def __init__(self, config: MedicalConfig):
        super().__init__(config, "medical", Contexts(config, "medical"))

    def parse_question(self, reader: Reader, record: Record) -> Question | None:
        return (self._parse_chat if "content" in list_columns(record) else self._parse_options)(reader, record)

    def _parse_options(self, reader: Reader, record: Record) -> Question | None:
        texts = reader.get_texts(record, "question", *OPTIONS, *self.columns)
        if not texts:
            return None
        question, *options = texts[: 1 + len(OPTIONS)]
        label, first = record.value.get("cop"), self.config.first_label
        index = int(label) - first if re.fullmatch(r"-?\d+", str(label)) else -1
        if not 0 <= index < len(OPTIONS):
            why = (
                f"cop = {label!r} is not one of {first} to {first + 3}; option A is 0 in the files on the Hub and 1 "
                "in the authors' files (medical.first_label)"
            )
            reader.reject("label", record.where, why)
            return None
        text = "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])
        prompt = f"{text}\n\n{FORMAT}" if self.config.ask_format else text
        return Question(text, prompt, LETTERS[index], *texts[1 + len(OPTIONS) :])

    def _parse_chat(self, reader: Reader, record: Record) -> Question | None:
        single = unwrap_chat(reader, record, "content")
        texts = single and reader.get_texts(single, "content", *self.columns)
        letter = texts and reader.get_reference(record, "answer", graders.read_letter)
        if not letter:
            return None
        text, *own = texts
        return Question(text, text, letter, *own)

    def grade(self, response: str, reference: str) -> Grade:
        return graders.grade_letter(response, reference, LETTERS)
