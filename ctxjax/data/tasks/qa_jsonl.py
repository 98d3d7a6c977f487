"""Questions with reference answers in a local JSONL, Parquet or CSV file, with a context of the user."""

from __future__ import annotations

from collections import Counter
import dataclasses
import re

from ctxjax.data import splits
from ctxjax.data.contexts import BUILT_IN, ContextConfig, Contexts, OtherContexts, OtherRows
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.prompts import build_messages
from ctxjax.data.records import Reader, Record, RecordsConfig, hash_text
from ctxjax.data.task import Row, write_chat_context
from ctxjax.data.tasks.chats import read_chat, read_teacher_chat
from ctxjax.data.tasks.file_task import FileTask
from ctxjax.host.hub import find_data_files
from ctxjax.types import bounded

PLACE = re.compile(r"\{([\w.]+)\}")  # of a column's text in a template


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaConfig(ContextConfig):
    """See configs/base.py, ``config.qa_jsonl`` and, for ``records``, ``config.records``."""

    path: str
    question: str
    reference: str
    messages: str
    grading: str
    limit: int = bounded(zero=True)
    dev_questions: int
    test_questions: int
    other_rows: str = ""
    context_template: str = ""
    teacher_messages: str = ""
    records: RecordsConfig = RecordsConfig()


class QaJsonl(FileTask):
    """The task over one file. The questions whose text has the smallest hash are held out, as many as configured, so
    the choice does not depend on the order of the file. Questions that differ in case, width or white space only are
    one question (splits.normalize). Of a conversation this is the text of all turns."""

    fields = ("question", "reference", "grading")

    def __init__(self, config: QaConfig):
        super().__init__(config, "qa_jsonl", Contexts(config, "qa_jsonl"))
        if config.messages and config.other_rows:
            raise ValueError("qa_jsonl.messages and qa_jsonl.other_rows are both set; give only one of them")

    def _make_context(self, reader: Reader, record: Record, row: Row) -> str | None:
        """Return the row's own context, as ``context_template`` or ``teacher_messages`` makes it of the record; None if
        the reader left the record out."""
        config = self.config
        if config.teacher_messages:
            return read_teacher_chat(reader, record, config.teacher_messages)
        texts = {}
        for column in dict.fromkeys(PLACE.findall(config.context_template)):
            texts[column] = reader.get_reference(record, column, str, "text")
            if texts[column] is None:
                return None
        made = PLACE.sub(lambda place: texts[place[1]], config.context_template)
        if config.question not in texts:
            return made
        return write_chat_context(build_messages(row._replace(question=made), "system"))

    def open_pool(self, reader: Reader, internalized: list[str]) -> OtherContexts | OtherRows:
        config = self.config
        if not config.other_rows:
            return super().open_pool(reader, internalized)
        if config.other_contexts_file not in ("", BUILT_IN):
            raise ValueError(
                "qa_jsonl.other_rows and qa_jsonl.other_contexts_file are both set; set only one of them, since "
                "a check and the accuracy of the task are different measures"
            )
        columns, read = (config.question, config.reference), GRADERS[config.grading].read_reference
        return OtherRows(config.other_rows, "qa_jsonl.other_rows", columns, read, reader, internalized)

    def read_splits(self, reader: Reader) -> tuple[dict[str, list[Row]], Counter[str]]:
        config, rows, seen = self.config, {}, {}
        template, files = config.context_template, find_data_files(config.path, "qa_jsonl.path")
        if template and not PLACE.search(template):
            raise ValueError(
                f"qa_jsonl.context_template = {template!r} names no column in braces, such as {{notes}}; a text "
                "for all rows is qa_jsonl.context"
            )
        for record in (record for file in files for record in reader.read(file, config.limit, "qa_jsonl.path")):
            chat = read_chat(reader, record, config.messages, config.question, config.reference, self.columns)
            texts = chat and reader.get_texts(chat.record, config.question, *chat.columns)
            read = GRADERS[config.grading].read_reference
            reference = texts and reader.get_reference(chat.record, config.reference, read)
            if not reference:
                continue
            question, *own = texts
            row = Row("", question, None, reference, earlier=chat.earlier)
            if config.context_template or config.teacher_messages:
                own = [self._make_context(reader, chat.record, row)]
                if own == [None]:
                    continue
            key = hash_text(splits.normalize(row.conversation))[:16]
            if reader.is_new(record, seen, key, reference):
                context = self.contexts.choose(key, *own)
                rows[key] = row._replace(id=key, context=context)
        ordered = [rows[key] for key in sorted(rows)]
        held_out = config.dev_questions + config.test_questions
        if len(ordered) <= held_out:
            raise ValueError(
                f"{config.path} has {len(ordered)} different questions, and qa_jsonl.dev_questions + test_questions = "
                f"{held_out} hold out all of them; lower these, so that some are left for training"
            )
        dev, test, train = ordered[: config.dev_questions], ordered[config.dev_questions : held_out], ordered[held_out:]
        return {"dev": dev, "test": test, "train": train}, Counter()

    def grade(self, response: str, reference: str) -> Grade:
        return GRADERS[self.config.grading].grade(response, reference)
