r"""Problems with a number or an expression as their answer.

    GSM8K                 question, answer (a solution that ends in "#### 72")
    DAPO-Math             prompt (a chat), reward_model.ground_truth
    the reference's copy  content (a chat), reward_model.ground_truth

Chats are asked as they stand, since their authors' wording says where the answer goes; other questions are told to put
it into ``\boxed{}``. An answer is read from there, or behind "####" or "Answer:", and compared by its value.
"""

from __future__ import annotations

import dataclasses

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading import graders, math_answers
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import Asked, FileTask, RowsConfig, columns_of, single_turn

FORMAT = "Reason step by step, and put the final answer into \\boxed{}."
GROUND_TRUTH = "reward_model.ground_truth"
LAYOUTS = {"question": "answer", "prompt": GROUND_TRUTH, "content": GROUND_TRUTH}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathConfig(ContextConfig, RowsConfig):
    """See configs/base.py, ``config.math``."""

    ask_format: bool


class Math(FileTask):
    """The task of one layout, which the columns tell."""

    def __init__(self, config: MathConfig):
        super().__init__(config, "math", Contexts(config, "math"))

    def asked(self, reader: Reader, record: Record) -> Asked | None:
        column = next((column for column in LAYOUTS if column in columns_of(record)), None)
        if column is None:
            known = " or ".join(f"{question} and {reference}" for question, reference in LAYOUTS.items())
            reader.reject("missing", record.where, f"no columns {known}; its columns are {columns_of(record)}")
            return None
        is_chat = isinstance(record.value[column], list)
        single = single_turn(reader, record, column)
        texts = single and reader.texts(single, column, LAYOUTS[column], *self.columns)
        if not texts:
            return None
        text, reference, *own = texts
        if column == "question":
            found = math_answers.answers(reference)
            if not found:
                reader.reject("label", record.where, 'column "answer" has no final answer behind ####')
                return None
            reference = found[-1]
        if math_answers.value(graders.plain(reference)) is None:
            reader.reject("label", record.where, f"the answer {reference!r} is not a number or an expression")
            return None
        question = text if is_chat or not self.config.ask_format else f"{text}\n\n{FORMAT}"
        return Asked(text, question, reference, *own)

    def grade(self, response: str, reference: str) -> Grade:
        return graders.math(response, reference)
