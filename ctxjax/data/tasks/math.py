r"""Mathematical problems: the answer is a number or an expression.

    GSM8K                 question, answer (a solution that ends in "#### 72")
    DAPO-Math             prompt (a chat), reward_model.ground_truth
    the reference's copy  content (a chat), reward_model.ground_truth

A chat is asked unchanged, since it says itself how to write the answer; other questions ask for the answer in
``\boxed{}``. The answer is read from there, or after "####" or "Answer:", and compared by its value.
"""

from __future__ import annotations

import dataclasses

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading import graders, math_answers
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import FileTask, Question, RowsConfig, list_columns, unwrap_chat

FORMAT = "Reason step by step, and put the final answer into \\boxed{}."
GROUND_TRUTH = "reward_model.ground_truth"
LAYOUTS = {"question": "answer", "prompt": GROUND_TRUTH, "content": GROUND_TRUTH}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathConfig(ContextConfig, RowsConfig):
    """See configs/base.py, ``config.math``."""

    ask_format: bool


class Math(FileTask):
    """The task over files of one of LAYOUTS; the column names decide which."""

    def __init__(self, config: MathConfig):
        super().__init__(config, "math", Contexts(config, "math"))

    def parse_question(self, reader: Reader, record: Record) -> Question | None:
        column = next((column for column in LAYOUTS if column in list_columns(record)), None)
        if column is None:
            known = " or ".join(f"{question} and {reference}" for question, reference in LAYOUTS.items())
            reader.reject("missing", record.where, f"no columns {known}; its columns are {list_columns(record)}")
            return None
        is_chat = isinstance(record.value[column], list)
        single = unwrap_chat(reader, record, column)
        texts = single and reader.get_texts(single, column, LAYOUTS[column], *self.columns)
        if not texts:
            return None
        text, reference, *own = texts
        if column == "question":
            found = math_answers.find_answers(reference)
            if not found:
                reader.reject("label", record.where, 'column "answer" has no final answer after ####')
                return None
            reference = found[-1]
        if math_answers.parse_value(graders.normalize_width(reference)) is None:
            reader.reject("label", record.where, f"the answer {reference!r} is not a number or an expression")
            return None
        question = text if is_chat or not self.config.ask_format else f"{text}\n\n{FORMAT}"
        return Question(text, question, reference, *own)

    def grade(self, response: str, reference: str) -> Grade:
        return graders.grade_math(response, reference)
