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

RESAMPLES, SWAPS = 1000, 9999
LEAST = 20  # questions: harm among fewer right answers says nothing


class Measure(NamedTuple):
    """A ratio of sums over the questions of a run; ``needs``: the views that it reads.

    ``part`` and ``whole`` return numbers [n] from these views. ``is_rate``: each part is 0 or 1 of a whole of 1.
    ``least``: a run with fewer questions in the whole has no value.
    """

    needs: tuple[str, ...]
    part: Callable[..., np.ndarray]
    whole: Callable[..., np.ndarray]
    is_rate: bool = True
    least: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        """What the difference of two runs may be."""
        return over_seeds.RATE_DIFFERENCE if self.is_rate else over_seeds.ANY_NUMBER


def _everything(*views: Outcomes) -> np.ndarray:
    return np.ones_like(views[0].correct)


BOTH = ("bare", "context")
MEASURES = {  # by their key in evaluation/metrics.py, which defines them
    "acc_x": Measure(("bare",), lambda x: x.correct, _everything),
    "acc_xc": Measure(("context",), lambda xc: xc.correct, _everything),
    "harm": Measure(BOTH, lambda x, xc: x.correct & ~xc.correct, lambda x, xc: x.correct, least=LEAST),
    "benefit": Measure(BOTH, lambda x, xc: ~x.correct & xc.correct, lambda x, xc: ~x.correct, least=LEAST),
    "both_correct": Measure(BOTH, lambda x, xc: x.correct & xc.correct, _everything),
    "obedience": Measure(("other",), lambda other: other.correct, _everything),
    "acc_empty": Measure(("empty",), lambda empty: empty.correct, _everything),
    "dlen": Measure(BOTH, lambda x, xc: xc.length - x.length, lambda x, xc: x.length, is_rate=False),
    "truncated_xc": Measure(("context",), lambda xc: xc.truncated, _everything),
}
HEADERS = {metric.key: metric.header for metric in METRICS if metric.key in (*MEASURES, *VALUES)}
UNITS = {metric.key: metric.unit for metric in METRICS if metric.key in HEADERS}


class RunResult(NamedTuple):
    """One model of one run. ``sums``: by measure. ``values``: of the run as a whole, by key."""

    seed: int
    sums: dict[str, Sums]
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
    sums = {}
    for key, measure in MEASURES.items():
        if not record.views.keys() >= set(measure.needs):
            continue
        views = [record.views[view] for view in measure.needs]
        part, whole, clusters = measure.part(*views), measure.whole(*views), views[0].clusters
        if np.count_nonzero(whole) >= measure.least * views[0].samples:
            sums[key] = Sums(np.bincount(clusters, part), np.bincount(clusters, whole))
    return RunResult(seed, sums, record.values)


def runs_with(runs: Sequence[RunResult], key: str) -> list[RunResult]:
    """Return the runs that have a measure or value."""
    return [run for run in runs if key in run.sums or key in run.values]


def _value(run: RunResult, key: str) -> float:
    return run.values[key] if key in run.values else run.sums[key].value


def mean_over_seeds(runs: Sequence[RunResult], key: str) -> Rate:
    """Return the mean of a measure over the runs, and its interval for other seeds."""
    runs = runs_with(runs, key)
    if key not in MEASURES:
        return over_seeds.mean_value([run.values[key] for run in runs], [0.0] * len(runs), VALUES[key])
    sums = [run.sums[key] for run in runs]
    mean = over_seeds.mean_rate if MEASURES[key].is_rate else over_seeds.mean_ratio
    return mean(sums, RESAMPLES)


def list_metrics(results: Results) -> Iterator[dict]:
    """Yield a row for each configuration, model and measure."""
    for configuration, models in results.items():
        for model, runs in models.items():
            for key in HEADERS:
                found = [value for run in runs_with(runs, key) if np.isfinite(value := _value(run, key))]
                if found:
                    mean, interval = mean_over_seeds(runs, key)
                    low, high = interval or (None, None)
                    yield {
                        "configuration": configuration, "arm": model, "metric": key, "seeds": len(found), "mean": mean,
                        "low": low, "high": high, "lowest_seed": min(found), "highest_seed": max(found),
                    }  # fmt: skip


def list_tests(results: Results, first: str) -> list[dict]:
    """Return a row for each configuration, arm and measure: the arm against the arm ``first`` on the same questions.

    ``p``: over_seeds.swap_test of the difference. ``p_holm``: adjusted for the number of configurations in which this
    arm was tested by this measure. ``of_seeds``: the seeds that both arms have; in some of them an arm may have no harm
    to compare, since it answers too little.
    """
    rows = []
    for configuration, models in results.items():
        for model, runs in models.items():
            for key in MEASURES if model != first and first in models else ():
                both = [(run, other) for run in runs for other in models[first] if run.seed == other.seed]
                pairs = [p for p in both if all(key in one.sums and one.sums[key].whole.sum() for one in p)]
                sums = [[run.sums[key] for run in side] for side in zip(*pairs)] or [[], []]
                mean, interval = over_seeds.mean_difference(*sums, RESAMPLES, MEASURES[key].bounds)
                if mean is None:
                    continue
                low, high = interval or (None, None)
                rows.append({
                    "configuration": configuration, "arm": model, "metric": key, "seeds": len(pairs),
                    "of_seeds": len(both), "difference": mean, "low": low, "high": high,
                    "p": over_seeds.swap_test(*sums, SWAPS), "p_holm": None,
                })  # fmt: skip
    for own in _by_arm_and_metric(rows).values():
        for row, adjusted in zip(own, over_seeds.holm([row["p"] for row in own]), strict=True):
            row["p_holm"] = adjusted
    return rows


def list_signs(tests: list[dict]) -> Iterator[dict]:
    """Yield a row for each arm and measure: in how many configurations it is below and above the first arm.

    Only configurations count in which all seeds have the measure: the others are a choice by the outcome.
    The mean difference counts every configuration once; its interval, ``low`` to ``high``, is for other configurations
    of this kind: Student's t between them. ``significant``: in how many the adjusted p is below 0.05 and the interval
    for other seeds leaves out 0.
    """
    whole = [row for row in tests if row["seeds"] == row["of_seeds"]]
    for (arm, metric), own in _by_arm_and_metric(whole).items():
        differences = [row["difference"] for row in own]
        below, above, p = over_seeds.sign_test(differences)
        mean, interval = over_seeds.mean_value(differences, [0.0] * len(differences), MEASURES[metric].bounds)
        low, high = interval or (None, None)
        yield {
            "arm": arm, "metric": metric, "configurations": len(own), "below": below, "above": above, "p": p,
            "mean_difference": mean, "low": low, "high": high,
            "significant": sum(row["p_holm"] < 0.05 and _leaves_out_zero(row) for row in own),
        }  # fmt: skip


def _leaves_out_zero(row: dict) -> bool:
    if row["low"] is None:  # one seed, or all seeds agree and no question varies
        return row["seeds"] > 1 and row["difference"] != 0
    return not row["low"] <= 0 <= row["high"]


def _by_arm_and_metric(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["arm"], row["metric"]), []).append(row)
    return found


def list_runs(folder: Folder) -> Iterator[dict]:
    """Yield a row for each cell: what became of it, what code and machine its run had, and the alarms of its arms.

    A run that is not evaluated on dev while it trains says so: the alarms that read these evaluations, as
    ``context_use``, cannot be raised in it.
    """
    for cell in folder.costs:
        state = folder.state(cell)
        record = folder.record(cell) if state == DONE else None
        facts = record.facts if record else read_facts(folder.run_of(cell))
        rows = {name: model.row for name, model in record.models.items()} if record else {}
        alarms = [f"{name}: {', '.join(row['alarms'])}" for name, row in rows.items() if row.get("alarms")]
        if rows and not any("lowest_acc_xc" in row for row in rows.values()):
            alarms.append("not evaluated on dev")
        yield {
            "configuration": cell.configuration, "phase": cell.phase, "seed": cell.seed, "state": state, **facts,
            "alarms": "; ".join(alarms),
        }  # fmt: skip


def list_rates(folder: Folder) -> Iterator[dict]:
    """Yield a row for each configuration that chooses rates, each arm, rate and seed: what dev said at the end."""
    study = folder.study
    for configuration in study.configurations:
        cells = grid.first_cells(study, configuration)
        if study.rated_in(configuration) != configuration or not folder.is_rated(configuration):
            continue
        chosen = folder.rates(configuration)
        for cell in cells:
            models = folder.record(cell).models
            for arm in study.arms_of(configuration):
                for place, rate in enumerate(study.rates):
                    dev = models[grid.name_at_rate(arm, place)].dev
                    yield {
                        "configuration": configuration, "arm": arm, "seed": cell.seed, "rate": rate,
                        "chosen": int(rate == chosen[arm]),
                        **{key: dev.get(f"dev/{key}") for key in ("acc_x", "acc_xc", "harm", "distill")},
                    }  # fmt: skip
