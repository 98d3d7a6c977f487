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
        """Return one line: rows, the longest response, and the longest prompt of each view with what is padded."""
        views = {"without the context": self.bare, "with it": self.context}
        if self.other is not None:
            views[f"in {self.retention_rows} rows under other contexts"] = self.other
        prompts = [f"{view.longest} {name}{_describe_columns(view)}" for name, view in views.items()]
        parts = f" in {self.parts} micro-batches" if self.parts > 1 else ""
        return (
            f"{self.rows} rows a step{parts}; responses of up to {self.responses} tokens; the longest prompts have "
            f"{', '.join(prompts)}"
        )


def _describe_columns(view: ViewShape) -> str:
    """Return what a view's length does not say, in brackets: tokens that all rows share, and the padded length."""
    notes = [f"{view.prefix} shared by all rows"] if view.prefix else []
    notes += [f"padded to {view.prefix + view.columns}"] if view.prefix + view.columns != view.longest else []
    return f" ({', '.join(notes)})" if notes else ""


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
