"""What the finished runs of a study say: their outcomes by configuration, arm and seed, and the statistics of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ctxjax.evaluation import over_seeds
from ctxjax.evaluation.metrics import METRICS
from ctxjax.evaluation.outcomes import Outcomes
from ctxjax.evaluation.over_seeds import Sums
from ctxjax.evaluation.statistics import Rate
from ctxjax.study import grid
from ctxjax.study.record import VALUES, ModelRecord, read_facts
from ctxjax.study.worker import DONE, Folder

RESAMPLES = 1000


class Measure(NamedTuple):
    """A ratio of sums over the questions of a run; ``needs``: the views that it reads.

    ``part`` and ``whole`` return numbers [n] from these views. ``is_rate``: each part is 0 or 1 of a whole of 1, so
    that the ratio is a rate and two arms can be tested on the same questions.
    """

    needs: tuple[str, ...]
    part: Callable[..., np.ndarray]
    whole: Callable[..., np.ndarray]
    is_rate: bool = True


def _everything(*views: Outcomes) -> np.ndarray:
    return np.ones_like(views[0].correct)


BOTH = ("bare", "context")
MEASURES = {  # by their key in evaluation/metrics.py, which defines them
    "acc_x": Measure(("bare",), lambda x: x.correct, _everything),
    "acc_xc": Measure(("context",), lambda xc: xc.correct, _everything),
    "harm": Measure(BOTH, lambda x, xc: x.correct & ~xc.correct, lambda x, xc: x.correct),
    "benefit": Measure(BOTH, lambda x, xc: ~x.correct & xc.correct, lambda x, xc: ~x.correct),
    "obedience": Measure(("other",), lambda other: other.correct, _everything),
    "dlen": Measure(BOTH, lambda x, xc: xc.length - x.length, lambda x, xc: x.length, is_rate=False),
}
HEADERS = {metric.key: metric.header for metric in METRICS if metric.key in (*MEASURES, *VALUES)}
UNITS = {metric.key: metric.unit for metric in METRICS if metric.key in HEADERS}


class RunResult(NamedTuple):
    """One model of one run. ``sums``: by measure. ``events``: by measure that is a rate, which questions [n] are in
    the numerator. ``values``: of the run as a whole, by key."""

    seed: int
    sums: dict[str, Sums]
    events: dict[str, np.ndarray]
    values: dict[str, float]


Results = dict[str, dict[str, list[RunResult]]]  # configuration -> model -> runs


def read_results(folder: Folder) -> Results:
    """Read all finished runs of the second phase. Raises ValueError if there is none."""
    results: Results = {}
    for cell in folder.costs:
        if cell.phase != grid.FINAL or folder.state(cell) != DONE:
            continue
        for model, record in folder.record(cell).models.items():
            found = _reduce(cell.seed, record)
            results.setdefault(cell.configuration, {}).setdefault(model, []).append(found)
    if not results:
        raise ValueError(f"{folder.root}: no run of the phase {grid.FINAL!r} is done, so there is nothing to report")
    return results


def _reduce(seed: int, record: ModelRecord) -> RunResult:
    sums, events = {}, {}
    for key, measure in MEASURES.items():
        if not record.views.keys() >= set(measure.needs):
            continue
        views = [record.views[view] for view in measure.needs]
        part, clusters = measure.part(*views), views[0].clusters
        sums[key] = Sums(np.bincount(clusters, part), np.bincount(clusters, measure.whole(*views)))
        if measure.is_rate and views[0].samples == 1:
            events[key] = part
    return RunResult(seed, sums, events, record.values)


def _runs_with(runs: Sequence[RunResult], key: str) -> list[RunResult]:
    return [run for run in runs if key in run.sums or key in run.values]


def _value(run: RunResult, key: str) -> float:
    return run.values[key] if key in run.values else run.sums[key].value


def mean_over_seeds(runs: Sequence[RunResult], key: str) -> Rate:
    """Return the mean of a measure over the runs, and its interval for other seeds."""
    runs = _runs_with(runs, key)
    if key not in MEASURES:
        return over_seeds.mean_value([run.values[key] for run in runs], [0.0] * len(runs))
    sums = [run.sums[key] for run in runs]
    mean = over_seeds.mean_rate if MEASURES[key].is_rate else over_seeds.mean_ratio
    return mean(sums, RESAMPLES)


def list_metrics(results: Results) -> Iterator[dict]:
    """Yield a row for each configuration, model and measure."""
    for configuration, models in results.items():
        for model, runs in models.items():
            for key in HEADERS:
                found = [value for run in _runs_with(runs, key) if np.isfinite(value := _value(run, key))]
                if found:
                    mean, interval = mean_over_seeds(runs, key)
                    low, high = interval or (None, None)
                    yield {
                        "configuration": configuration, "arm": model, "metric": key, "seeds": len(found), "mean": mean,
                        "low": low, "high": high, "lowest_seed": min(found), "highest_seed": max(found),
                    }  # fmt: skip


def list_tests(results: Results, first: str) -> list[dict]:
    """Return a row for each configuration, arm and rate: the arm against the arm ``first`` on the same questions.

    ``p``: over_seeds.combined_mcnemar, of the events of the numerator: for harm, which questions are harmed.
    ``p_holm``: adjusted for the number of configurations that this arm and measure were tested in.
    """
    rows = []
    for configuration, models in results.items():
        for model, runs in models.items():
            for key in MEASURES if model != first and first in models else ():
                pairs = [
                    (run, other)
                    for run in runs
                    for other in models[first]
                    if run.seed == other.seed
                    and all(key in one.sums and one.sums[key].whole.sum() for one in (run, other))
                ]
                sums = [[run.sums[key] for run in side] for side in zip(*pairs)] or [[], []]
                mean, interval = over_seeds.mean_difference(*sums, RESAMPLES)
                if mean is None:
                    continue
                events = [(a.events[key], b.events[key]) for a, b in pairs if key in a.events and key in b.events]
                low, high = interval or (None, None)
                rows.append({
                    "configuration": configuration, "arm": model, "metric": key, "seeds": len(pairs),
                    "difference": mean, "low": low, "high": high,
                    "p": over_seeds.combined_mcnemar(events) if events else None, "p_holm": None,
                })  # fmt: skip
    for own in _by_arm_and_metric(rows).values():
        tested = [row for row in own if row["p"] is not None]
        for row, adjusted in zip(tested, over_seeds.holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = adjusted
    return rows


def list_signs(tests: list[dict]) -> Iterator[dict]:
    """Yield a row for each arm and measure: in how many configurations it is below and above the first arm.

    The mean difference counts every configuration once; its interval, ``low`` to ``high``, is for other configurations
    of this kind: Student's t between them.
    """
    for (arm, metric), own in _by_arm_and_metric(tests).items():
        differences = [row["difference"] for row in own]
        below, above, p = over_seeds.sign_test(differences)
        mean, interval = over_seeds.mean_value(differences, [0.0] * len(differences))
        low, high = interval or (None, None)
        yield {
            "arm": arm, "metric": metric, "configurations": len(own), "below": below, "above": above, "p": p,
            "mean_difference": mean, "low": low, "high": high,
            "significant": sum((row["p_holm"] or 1) < 0.05 for row in own),
        }  # fmt: skip


def _by_arm_and_metric(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["arm"], row["metric"]), []).append(row)
    return found


def list_runs(folder: Folder) -> Iterator[dict]:
    """Yield a row for each cell: what became of it, and what code and machine its run had."""
    for cell in folder.costs:
        state = folder.state(cell)
        facts = folder.record(cell).facts if state == DONE else read_facts(folder.run_of(cell))
        yield {
            "configuration": cell.configuration, "phase": cell.phase, "seed": cell.seed, "state": state, **facts,
        }  # fmt: skip


def list_rates(folder: Folder) -> Iterator[dict]:
    """Yield a row for each configuration and arm whose rate is chosen."""
    for configuration in folder.study.configurations:
        if folder.is_rated(configuration):
            for arm, rate in folder.rates(configuration).items():
                yield {"configuration": configuration, "arm": arm, "rate": rate}
