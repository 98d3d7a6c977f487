"""Medical multiple choice: a question, four options, the letter of the right one.

    MedMCQA               question, opa, opb, opc, opd, cop (the right option's number)
    the reference's copy  content (a chat), answer (the letter)

Chats are asked as they stand. The test rows that MedMCQA publishes have no labels (cop = -1): hold out others.
"""

from __future__ import annotations

import dataclasses
import re

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading import graders
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import Asked, FileTask, RowsConfig, columns_of, single_turn

LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
FORMAT = "Give the letter of the right option between <answer> and </answer>."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedicalConfig(ContextConfig, RowsConfig):
    """See configs/base.py, ``config.medical``."""

    ask_format: bool
    first_label: int


class Medical(FileTask):
    """The task of one layout, which the columns tell."""

    def __init__(self, config: MedicalConfig):
        super().__init__(config, "medical", Contexts(config, "medical"))

    def asked(self, reader: Reader, record: Record) -> Asked | None:
        return (self._chat if "content" in columns_of(record) else self._options)(reader, record)

    def _options(self, reader: Reader, record: Record) -> Asked | None:
        texts = reader.texts(record, "question", *OPTIONS, *self.columns)
        if not texts:
            return None
        question, *options = texts[: 1 + len(OPTIONS)]
        label, first = record.value.get("cop"), self.config.first_label
        place = int(label) - first if re.fullmatch(r"-?\d+", str(label)) else -1
        if not 0 <= place < len(OPTIONS):
            why = (
                f"cop = {label!r} is not one of {first} to {first + 3}; option A is 0 in the Hub's files and 1 in the "
                "authors' (medical.first_label)"
            )
            reader.reject("label", record.where, why)
            return None
        text = "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])
        asked = f"{text}\n\n{FORMAT}" if self.config.ask_format else text
        return Asked(text, asked, LETTERS[place], *texts[1 + len(OPTIONS) :])

    def _chat(self, reader: Reader, record: Record) -> Asked | None:
        single = single_turn(reader, record, "content")
        texts = single and reader.texts(single, "content", "answer", *self.columns)
        if not texts:
            return None
        text, label, *own = texts
        letter = label.strip().strip("().").upper()
        if letter not in tuple(LETTERS):
            reader.reject("label", record.where, f"answer = {label!r} is not one of {', '.join(LETTERS)}")
            return None
        return Asked(text, text, letter, *own)

    def grade(self, response: str, reference: str) -> Grade:
        return graders.letter(response, reference, LETTERS)
