r"""Mathematical problems: the answer is a number or an expression.

    GSM8K                 question, answer (a solution that ends in "#### 72")
    MATH, AIME            problem, answer, or else solution (with the answer in \boxed{})
    DAPO-Math             prompt (a chat), reward_model.ground_truth
    the reference's copy  content (a chat), reward_model.ground_truth

A chat is asked unchanged, since it says itself how to write the answer; other questions ask for the answer in
``\boxed{}``. The answer is read from there, or after "####" or "Answer:", and compared by its value.
"""

from __future__ import annotations

import dataclasses

from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading import graders
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import Reader, Record
from ctxjax.data.tasks.file_task import FileTask, Question, RowsConfig, list_columns, unwrap_chat

FORMAT = "Reason step by step, and put the final answer into \\boxed{}."
GROUND_TRUTH = "reward_model.ground_truth"
# Columns of the question -> of the reference, in order of preference. Upper and lower case are the same.
LAYOUTS = {
    "question": ("answer",), "problem": ("answer", "solution"), "prompt": (GROUND_TRUTH,), "content": (GROUND_TRUTH,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathConfig(ContextConfig, RowsConfig):
    """See configs/base.py, ``config.math``."""

    ask_format: bool


class Math(FileTask):
    """The task over files of one of LAYOUTS; the column names decide which."""

    def __init__(self, config: MathConfig):
        super().__init__(config, "math", Contexts(config, "math"))

    def parse_question(self, reader: Reader, record: Record) -> Question | None:
        columns = {column.casefold(): column for column in list_columns(record)}
        layout = next((layout for layout in LAYOUTS if layout in columns), None)
        if layout is None:
            known = " or ".join(f"{question} and {' or '.join(names)}" for question, names in LAYOUTS.items())
            reader.reject("missing", record.where, f"no columns {known}; its columns are {list_columns(record)}")
            return None
        column = columns[layout]
        is_chat = isinstance(record.value[column], list)
        single = unwrap_chat(reader, record, column)
        texts = single and reader.get_texts(single, column, *self.columns)
        names = [columns[name] for name in LAYOUTS[layout] if name in columns] or LAYOUTS[layout]
        reference = texts and reader.get_reference(record, names[0], graders.read_math)
        if not reference:
            return None
        text, *own = texts
        question = text if is_chat or not self.config.ask_format else f"{text}\n\n{FORMAT}"
        return Question(text, question, reference, *own)

    def grade(self, response: str, reference: str) -> Grade:
        return graders.grade_math(response, reference)
