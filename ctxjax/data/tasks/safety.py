"""Offensive and hateful language: yes-or-no questions over the pooled sets of data/safety_sets.py."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import grade_yes_no
from ctxjax.data.records import Reader
from ctxjax.data.safety_sets import read_examples
from ctxjax.data.task import Row
from ctxjax.data.tasks.file_task import FileTask, FileTaskConfig, Question

QUESTIONS = {
    "tweeteval": "Is this tweet offensive?",
    "hatecheck": "Is this text hateful towards people for the group that they belong to?",
    "ethos": "Is this comment hateful?",
}
FORMAT = "Answer yes or no, as <answer>yes</answer> or <answer>no</answer>."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig(ContextConfig, FileTaskConfig):
    """See configs/base.py, ``config.safety``."""

    sets: tuple[str, ...]
    ask_format: bool


class Safety(FileTask):
    """The task over the pooled sets, with a context of the user."""

    def __init__(self, config: SafetyConfig):
        self._templates: dict[str, str] = {}
        super().__init__(config, "safety", Contexts(config, "safety"))

    def read_questions(self, reader: Reader) -> Iterator[tuple[str, str, Question]]:
        for example in read_examples(self.config.path, self.config.sets, reader):
            question = f"{QUESTIONS[example.set]}\n\n{example.text}"
            if self.config.ask_format:
                question += f"\n\n{FORMAT}"
            self._templates[example.id] = example.template
            yield example.split, example.id, Question(example.text, question, "yes" if example.harmful else "no")

    def group(self, row: Row) -> str:
        return self._templates[row.id]

    def grade(self, response: str, reference: str) -> Grade:
        return grade_yes_no(response, reference)
