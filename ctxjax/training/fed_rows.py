"""What an arm's steps were given, so that a run can be audited: a line for each step in rows.jsonl::

    {"step": 1, "bare": [17, 4], "context": [17, 4], "other": [[3, 29, 0], [11, 5, 8]], "tokens": "8d02..."}

Numbers are those of the rows and contexts in the run's data.jsonl (inputs/data_record.py). Those of the two views are
found by the tokens of the prompts in the batch, null for a prompt of no training row. ``other`` has a pipeline.OtherRow
for each retention row. ``tokens`` is the digest of all prompts of the step, padding left out.
"""

from __future__ import annotations

from ctxjax.data.digests import digest_context, digest_rows, digest_tokens
from ctxjax.data.pipeline import Drawn
from ctxjax.host.checksum import compute_digest
from ctxjax.inputs.data_record import DataRecord
from ctxjax.inputs.run_inputs import Inputs


class FedRows:
    """Describes the steps of all arms of a run."""

    def __init__(self, inputs: Inputs, record: DataRecord):
        rows, retention = inputs.rows, inputs.retention
        self._numbers = [record.row_numbers.get(row.id) for row in rows.rows]
        self._by_tokens = {
            view: dict(zip(map(digest_tokens, getattr(rows, view)), self._numbers)) for view in ("bare", "context")
        }
        others = [] if retention is None else retention.contexts
        self._other_contexts = [record.context_numbers.get(digest_context(text)) for text in others]

    def describe(self, step: int, drawn: Drawn) -> dict:
        """Return the line of rows.jsonl for a step, whose number starts at 1."""
        digests = {view: digest_rows(getattr(drawn.batch, view)) for view in self._by_tokens}
        line = {view: [self._by_tokens[view].get(digest) for digest in found] for view, found in digests.items()}
        if drawn.batch.other is not None:
            line["other"] = [
                [self._numbers[other.row], self._other_contexts[other.context], other.question]
                for other in drawn.others
            ]
            digests["other"] = digest_rows(drawn.batch.other)
        return {"step": step} | line | {"tokens": compute_digest(list(digests.values()))}
