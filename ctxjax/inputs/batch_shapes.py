"""The shapes of a training batch. A run prints them from its encoded rows, and a plan compiles for the same shapes."""

from __future__ import annotations

from typing import NamedTuple

from ctxjax.config_sections import Experiment
from ctxjax.data.pipeline import EncodedRows, RetentionRows
from ctxjax.data.shapes import ViewShape


class BatchShapes(NamedTuple):
    """``rows``: of a batch, ``parts`` of which are computed one after the other. ``responses``: their columns.

    ``other``: the view of the retention rows, of which a batch has ``retention_rows``; None if no arm has retention.
    """

    rows: int
    parts: int
    responses: int
    retention_rows: int
    bare: ViewShape
    context: ViewShape
    other: ViewShape | None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt of all views."""
        return max(view.longest for view in (self.bare, self.context, self.other) if view is not None)

    def describe(self) -> str:
        """Return one line: rows, response columns, and the columns and shared tokens of each view."""
        views = {"bare": self.bare, "context": self.context}
        if self.other is not None:
            views[f"other, {self.retention_rows} rows,"] = self.other
        prompts = [
            f"{name} {view.columns} after {view.prefix} shared tokens (longest {view.longest})"
            for name, view in views.items()
        ]
        return (
            f"{self.rows} rows in {self.parts} micro-batches; responses of {self.responses} columns; prompts of: "
            f"{'; '.join(prompts)}"
        )


def make_batch_shapes(
    config: Experiment, bare: ViewShape, context: ViewShape, other: ViewShape | None, turns: int = 1
) -> BatchShapes:
    """Return the shapes of a run's batches, given those of its prompts. ``turns``: most turns of a question."""
    train = config.train
    rows, retained = turns * train.batch_size, turns * train.retention_rows
    return BatchShapes(rows, train.micro_batches, config.rollout.max_tokens, retained, bare, context, other)


def find_batch_shapes(
    config: Experiment, rows: EncodedRows, retention: RetentionRows | None, turns: int = 1
) -> BatchShapes:
    """Return the shapes of a run's batches, given its encoded rows."""
    return make_batch_shapes(config, **rows.shapes, other=retention.shape if retention else None, turns=turns)
