"""``eval.select``: the metric by which the best checkpoint is chosen, such as "acc_xc" or "-distill"."""

from __future__ import annotations

from collections.abc import Collection

from ctxjax.config_sections import EvalConfig
from ctxjax.data.task import FURTHER_VIEWS, METERS
from ctxjax.evaluation import metrics as metrics_lib
from ctxjax.evaluation.metrics import ONE, SEVERAL, Metric


def check_select(select: str, measured: Collection[str] | None = None) -> None:
    """Raise ValueError if ``eval.select`` names no metric or, given the keys that were ``measured``, none of them."""
    known = {m.key: m for m in metrics_lib.METRICS if m.is_selectable and (measured is None or m.key in measured)}
    if parse_select(select)[0] not in known:
        names = ", ".join(f"-{key}" if known[key].better == "lower" else key for key in sorted(known))
        of_what = "" if measured is None else " of this task"
        raise ValueError(
            f"eval.select = {select!r} is not a metric{of_what}; choose from {names} (with a minus sign: the lower the "
            "better)"
        )


def check_select_is_measured(select: str, evaluation: EvalConfig) -> None:
    """Raise ValueError if ``evaluation`` leaves out a view or a meter that the metric of ``select`` needs, or draws
    another number of responses."""
    metric = _find(select)
    if metric.responses not in (None, ONE if evaluation.samples == 1 else SEVERAL):
        given = f"eval.samples = {evaluation.samples}"
        raise ValueError(f"eval.select = {select!r} needs {metric.responses} to a question, not {given}; change one")
    for field, known in (("views", FURTHER_VIEWS), ("meters", METERS)):
        for name in sorted({*metric.needs} & {*known} - {*getattr(evaluation, field)}):
            raise ValueError(
                f"eval.select = {select!r} needs {name!r} in eval.{field}, which is {getattr(evaluation, field)}"
            )


def describe_wrong_sign(select: str) -> str:
    """Return a warning if ``select`` takes the checkpoint that is worst by its metric; "" if not."""
    metric, (key, sign) = _find(select), parse_select(select)
    if metric.better is None or (sign > 0) == (metric.better == "higher"):
        return ""
    right = f"-{key}" if metric.better == "lower" else key
    return (
        f"eval.select = {select!r} keeps the checkpoint that is worst by it: of {metric.header}, {metric.better} is "
        f"better; that is eval.select = {right!r}"
    )


def _find(select: str) -> Metric:
    return next(metric for metric in metrics_lib.METRICS if metric.key == parse_select(select)[0])


def parse_select(select: str) -> tuple[str, int]:
    """Split ``eval.select`` into the metric's key and the sign of a score that is better if it is higher."""
    return select.removeprefix("-"), -1 if select.startswith("-") else 1
