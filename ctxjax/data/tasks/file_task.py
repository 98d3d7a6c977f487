"""The base class of tasks over files: splits without repeats, limits, contexts, and the facts that a run records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

import numpy as np

from ctxjax.data import splits
from ctxjax.data.contexts import Contexts, OtherContexts, OtherContextsConfig, OtherRows
from ctxjax.data.records import Reader, Record, RecordsConfig, hash_text
from ctxjax.data.task import Row
from ctxjax.host.hub import find_data_files
from ctxjax.types import bounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTaskConfig(OtherContextsConfig):
    """The fields of every task over files; see configs/base.py. ``*_questions`` limit each split; 0: no limit."""

    path: str
    train_questions: int = bounded(zero=True)
    dev_questions: int = bounded(zero=True)
    test_questions: int = bounded(zero=True)
    records: RecordsConfig = RecordsConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(FileTaskConfig):
    """The fields of a task over rows of JSONL, Parquet or CSV files, local or on the Hub (host.hub.find_data_files)."""

    test_path: str
    limit: int = bounded(zero=True)


class Question(NamedTuple):
    """One question. Questions with equal ``text`` are repeats. ``context``: the question's own, or None.
    ``earlier``: as in Row."""

    text: str
    question: str
    reference: str
    context: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()


class FileTask:
    """A task without its grader. A subclass has ``grade``, and one of these: ``parse_question`` if each record is a
    question, else ``read_questions`` or ``read_splits``. ``contexts`` is None if every question has its own context.
    ``fields``: those of the section that say what the columns are."""

    fields: tuple[str, ...] = ()

    def __init__(self, config: FileTaskConfig, section: str, contexts: Contexts | None):
        self.config, self.section = config, section
        self.columns = contexts.columns if contexts else ()
        reader = Reader(config.records, tuple(f"{section}.{name}" for name in self.fields))
        internalized = list(contexts.texts.values()) if contexts else []
        self.pool = self.open_pool(reader, internalized)
        self.contexts = contexts
        self.splits, left_out = self.read_splits(reader)
        self.skipped = reader.skipped + left_out
        self.facts = {
            "data": reader.digests,
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "contexts": contexts.describe() if contexts else "each row's own",
        }

    def open_pool(self, reader: Reader, internalized: list[str]) -> OtherContexts | OtherRows:
        """Return the other contexts, without those to internalize."""
        return OtherContexts(self.config, self.section, reader, internalized)

    def read_splits(self, reader: Reader) -> tuple[dict[str, list[Row]], Counter[str]]:
        """Return the rows by split, without repeats and within the limits, and the counts of left-out repeats."""
        rows = (
            (split, question.text, self.make_row(row_id, question))
            for split, row_id, question in self.read_questions(reader)
        )
        unique, repeats = splits.remove_repeats(rows)
        limits = {split: getattr(self.config, f"{split}_questions") or None for split in unique}
        return {split: splits.shuffle(rows)[: limits[split]] for split, rows in unique.items()}, repeats

    def make_row(self, row_id: str, question: Question) -> Row:
        """Return the question as a row, with its own context or one of ``contexts``."""
        context = self.contexts.choose(row_id, question.context) if self.contexts else question.context
        return Row(row_id, question.question, context, question.reference, earlier=question.earlier)

    def read_questions(self, reader: Reader) -> Iterator[tuple[str, str, Question]]:
        """Yield (split, row id, question) of every usable record.

        The split follows from the hash of the question's text; records of ``test_path`` are all "test".
        """
        config = self.config
        for path, is_test in ((config.path, False), (config.test_path, True)):
            if is_test and not path:
                continue
            field = f"{self.section}.{'test_path' if is_test else 'path'}"
            for file in find_data_files(path, field):
                for record in reader.read(file, config.limit, field):
                    question = self.parse_question(reader, record)
                    if question is not None:
                        key = splits.normalize(question.text)
                        split = "test" if is_test else splits.assign_split(key)
                        if config.test_path and not is_test and split == "test":
                            split = "train"
                        yield split, hash_text(key)[:16], question

    def parse_question(self, reader: Reader, record: Record) -> Question | None:
        """Return the question of a record, or None if the reader left it out."""
        raise NotImplementedError

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def other_contexts(self, split: str) -> list[str]:
        return self.pool.select(split)

    def rows_under(self, row: Row, context: str) -> list[Row]:
        return self.pool.rows_under(row, context)

    def paraphrase(self, row: Row, rng: np.random.Generator) -> None:
        return None

    def unrelated(self) -> None:
        return None


def list_columns(record: Record) -> list[str]:
    """Return the sorted column names of a record; [] if it is not an object."""
    return sorted(map(str, record.value)) if isinstance(record.value, dict) else []


def unwrap_chat(reader: Reader, record: Record, column: str) -> Record | None:
    """Replace a chat ``[{"role": "user", "content": TEXT}]`` in ``column`` by its text.

    Return None if the reader left the record out, as it does for a chat with other roles: a system message would be a
    context in every view.
    """
    chat = record.value.get(column)
    if not isinstance(chat, list):
        return record
    roles = [message.get("role") if isinstance(message, dict) else None for message in chat]
    if roles != ["user"]:
        why = f"column {column!r} must have one message with the role user; the roles are {roles}"
        reader.reject("not_text", record.where, why)
        return None
    return record._replace(value=record.value | {column: chat[0].get("content")})
