"""What a run writes down of its data, so that it can be audited: data.jsonl.

One line for each row of train, dev and test, then one for each other context of these splits::

    {"split": "train", "id": "q17", "question": "52ab...", "context": "90fe..."}
    {"other_context_of": "train", "context": "7c11..."}

Texts are digests (data/digests.py). ``left_out``: a training row that is too long, or a context that does not fit. A
row's number is its line's, from 0; a context's number is that of its line among the contexts.
"""

from __future__ import annotations

import json

from ctxjax.data.digests import digest_context, digest_question
from ctxjax.data.pipeline import EncodedRows, RetentionRows
from ctxjax.data.splits import SPLITS
from ctxjax.data.task import Row, Task
from ctxjax.host.checksum import compute_digest

FILE = "data.jsonl"
ROWS_FILE = "rows.jsonl"  # of an arm: the numbers of the rows that each step was given (training/fed_rows.py)


class DataRecord:
    """The rows and the other contexts of a task, numbered.

    ``encoded`` and ``retention``: what training reads of them; None in an evaluation.
    """

    def __init__(self, task: Task, encoded: EncodedRows | None = None, retention: RetentionRows | None = None):
        read = None if encoded is None else {row.id for row in encoded.rows}
        fitting = None if retention is None else set(retention.contexts)
        self.rows = [
            _describe_row(row, split) | _mark(split == "train" and read is not None and row.id not in read)
            for split in SPLITS
            for row in task.rows(split)
        ]
        self.contexts = [
            {"other_context_of": split, "context": digest_context(text)}
            | _mark(split == "train" and fitting is not None and text not in fitting)
            for split in SPLITS
            for text in task.other_contexts(split)
        ]
        self.row_numbers = {row["id"]: number for number, row in enumerate(self.rows)}
        self.context_numbers = {one["context"]: number for number, one in enumerate(self.contexts)}

    @property
    def text(self) -> str:
        """The content of data.jsonl."""
        return "".join(json.dumps(line) + "\n" for line in [*self.rows, *self.contexts])

    @property
    def facts(self) -> dict:
        """What run.json says of the record: that there is one, and its digest."""
        return {"record": {FILE: compute_digest(self.text)}}


def _describe_row(row: Row, split: str) -> dict:
    context = None if row.context is None else digest_context(row.context)
    return {"split": split, "id": row.id, "question": digest_question(row.conversation), "context": context}


def _mark(is_left_out: bool) -> dict:
    return {"left_out": True} if is_left_out else {}
