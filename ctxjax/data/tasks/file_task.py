"""What tasks over files of rows have in common: splits without repeats, limits, contexts, and facts for the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

import numpy as np

from ctxjax.data import splits
from ctxjax.data.contexts import Contexts, OtherContexts, OtherContextsConfig
from ctxjax.data.records import Reader, Record, RecordsConfig, digest
from ctxjax.data.task import Row
from ctxjax.host.hub import data_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTaskConfig(OtherContextsConfig):
    """The fields of every such task; see configs/base.py. Counts of 0 are no limit."""

    path: str
    train_questions: int
    dev_questions: int
    test_questions: int
    records: RecordsConfig = RecordsConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(FileTaskConfig):
    """Those of a task over the rows of JSONL, Parquet or CSV files, here or on the Hub (hub.data_files)."""

    test_path: str
    limit: int


class Asked(NamedTuple):
    """One question: ``text`` is what makes it the same as another, and ``context`` its own, where it has one."""

    text: str
    question: str
    reference: str
    context: str | None = None


class FileTask:
    """A task but for its grader. A subclass reads rows by ``asked`` or, where they are not single records, overrides
    ``examples`` or ``split``. ``contexts`` is None where every question brings its own."""

    def __init__(self, config: FileTaskConfig, section: str, contexts: Contexts | None):
        self.config, self.section = config, section
        self.columns = contexts.columns if contexts else ()
        reader = Reader(config.records)
        internalized = list(contexts.texts.values()) if contexts else []
        self.others = OtherContexts(config, section, reader, internalized)
        self.contexts = contexts
        self.splits, left_out = self.split(reader)
        self.skipped = reader.skipped + left_out
        self.facts = {
            "data": reader.digests,
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "contexts": contexts.facts() if contexts else "each row's own",
        }

    def split(self, reader: Reader) -> tuple[dict[str, list[Row]], Counter[str]]:
        """The rows by split, without repeats and within the limits, and what was left out beside the reader's."""
        pooled = {split: [] for split in splits.SPLITS}
        for split, row_id, asked in self.examples(reader):
            pooled[split].append((asked.text, self.row(row_id, asked)))
        unique, repeats = splits.without_repeats(pooled)
        limits = {split: getattr(self.config, f"{split}_questions") or None for split in unique}
        return {split: splits.shuffled(rows)[: limits[split]] for split, rows in unique.items()}, repeats

    def row(self, row_id: str, asked: Asked) -> Row:
        """The question under its context: its own, or a drawn one."""
        context = self.contexts.of(row_id, asked.context) if self.contexts else asked.context
        return Row(row_id, asked.question, context, asked.reference)

    def examples(self, reader: Reader) -> Iterator[tuple[str, str, Asked]]:
        """(split, row id, question) of every usable row: by the hash of its text, or "test" for rows of test_path."""
        config = self.config
        for path, is_test in ((config.path, False), (config.test_path, True)):
            if is_test and not path:
                continue
            field = f"{self.section}.{'test_path' if is_test else 'path'}"
            for file in data_files(path, field):
                for record in reader.records(file, config.limit, field):
                    asked = self.asked(reader, record)
                    if asked is not None:
                        key = splits.folded(asked.text)
                        split = "test" if is_test else splits.split_of(key)
                        if config.test_path and not is_test and split == "test":
                            split = "train"
                        yield split, digest(key)[:16], asked

    def asked(self, reader: Reader, record: Record) -> Asked | None:
        """The question of a record; None where the reader left it out."""
        raise NotImplementedError

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def other_contexts(self, split: str) -> list[str]:
        return self.others.split(split)

    def swap_context(self, row: Row, context: str) -> Row:
        return self.others.swap_context(row, context)

    def paraphrase(self, row: Row, rng: np.random.Generator) -> None:
        return None


def columns_of(record: Record) -> list[str]:
    """The columns that a record has; [] where it is not an object."""
    return sorted(map(str, record.value)) if isinstance(record.value, dict) else []


def single_turn(reader: Reader, record: Record, column: str) -> Record | None:
    """The record with a chat ``[{"role": "user", "content": TEXT}]`` in ``column`` replaced by its text.

    Chats of other roles are left out or refused: a system message would be a context that no view knows of.
    """
    chat = record.value.get(column)
    if not isinstance(chat, list):
        return record
    roles = [message.get("role") if isinstance(message, dict) else None for message in chat]
    if roles != ["user"]:
        why = f"column {column!r} must have one message, of the user; the roles are {roles}"
        reader.reject("not_text", record.where, why)
        return None
    return record._replace(value=record.value | {column: chat[0].get("content")})
