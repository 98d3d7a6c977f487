"""Statistics over several runs that differ in their seed: intervals of means over seeds, and a paired test.

Seeds and questions are two levels. The questions of one run share its base and its training, so a thousand questions of
three seeds say as much about a fourth seed as three numbers do, and are never pooled. Each run gives one value and,
from a bootstrap of its own questions, the variance that another draw of questions would add. Resampling the seeds too,
the usual hierarchical bootstrap, covers 74 % instead of 95 % with three of them, which have only ten different
resamples; Student's t of the seeds' values takes the place of that level. benchmarks/intervals.py measures how often
the intervals cover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ctxjax.evaluation.statistics import Rate, Z, binomial_interval, share

ANY_NUMBER, RATE_DIFFERENCE = (-np.inf, np.inf), (-1.0, 1.0)  # what a value may be


class Sums(NamedTuple):
    """A ratio of sums in one run: what each cluster of questions adds to the numerator and the denominator, [K]."""

    part: np.ndarray
    whole: np.ndarray

    @property
    def value(self) -> float:
        """NaN if the denominator is 0."""
        return float(share(self.part, self.whole))


def bootstrap_variance(statistic: Callable, arrays: Sequence[np.ndarray], resamples: int, seed: int = 0) -> float:
    """Return the variance of ``statistic(*arrays, axis)`` if the clusters are drawn anew; each keeps its entry in every
    array. Draws with a value that is not finite are left out."""
    rng, count = np.random.default_rng(seed), len(arrays[0])
    index = rng.integers(count, size=(resamples, count))
    values = statistic(*(np.asarray(array)[index] for array in arrays), axis=-1)
    values = values[np.isfinite(values)]
    return float(np.var(values)) if len(values) else 0.0


def mean_rate(runs: Sequence[Sums], resamples: int) -> Rate:
    """Return the mean over runs of a rate, each run counted once, and its 95 % interval for other seeds.

    The interval is that of a binomial rate for as many independent outcomes as have the variance of ``mean_variance``.
    They are at most as many as the clusters of these runs say of a mean in which each run counts once. If nothing
    varies, as when all runs have no event, they are that many: the interval then knows nothing of other seeds.
    Runs without a denominator are left out. The interval is None for fewer than two runs.
    """
    runs = [run for run in runs if run.whole.sum() > 0]
    if not runs:
        return Rate(None, None)
    values = np.array([run.value for run in runs])
    variance = mean_variance(values, [bootstrap_variance(share, run, resamples) for run in runs])
    mean = float(values.mean())
    if variance is None:
        return Rate(mean, None)
    most = len(runs) ** 2 / sum(1 / np.count_nonzero(run.whole) for run in runs)
    n = min(mean * (1 - mean) / variance, most) if variance > 0 else most
    low, high = binomial_interval(np.array(mean * n), np.array(float(n)))
    return Rate(mean, (float(low), float(high)))


def mean_value(values: Sequence[float], variances: Sequence[float], bounds: tuple = ANY_NUMBER) -> Rate:
    """Return the mean over runs of any value and its 95 % interval for other seeds.

    ``variances``: of each value, by drawing other questions. ``bounds``: what the value may be; the interval ends
    there. The interval is None for fewer than two runs, and if nothing varies.
    """
    if not len(values):
        return Rate(None, None)
    mean, variance = float(np.mean(values)), mean_variance(values, variances)
    if not variance:
        return Rate(mean, None)
    half = float(Z * np.sqrt(variance))
    return Rate(mean, (max(mean - half, bounds[0]), min(mean + half, bounds[1])))


def mean_ratio(runs: Sequence[Sums], resamples: int) -> Rate:
    """Return the mean over runs of a ratio that need not be a rate, and its 95 % interval for other seeds."""
    runs = [run for run in runs if run.whole.sum() > 0]
    return mean_value([run.value for run in runs], [bootstrap_variance(share, run, resamples) for run in runs])


def mean_difference(arm: Sequence[Sums], first: Sequence[Sums], resamples: int, bounds: tuple = ANY_NUMBER) -> Rate:
    """Return the mean over runs of arm minus first, and its 95 % interval for other seeds, which ends at ``bounds``.

    Both were asked the same questions in each run, and are resampled together.
    """
    pairs = [(a, b) for a, b in zip(arm, first, strict=True) if a.whole.sum() > 0 and b.whole.sum() > 0]

    def difference(a_part, a_whole, b_part, b_whole, axis):
        return share(a_part, a_whole, axis) - share(b_part, b_whole, axis)

    variances = [bootstrap_variance(difference, (*a, *b), resamples) for a, b in pairs]
    return mean_value([a.value - b.value for a, b in pairs], variances, bounds)


def mean_variance(values: Sequence[float], variances: Sequence[float]) -> float | None:
    """Return the variance of the mean of S values, such that 1.96 standard deviations are half of a 95 % interval.

    It is the larger one of two: of the values between seeds, which holds the noise of questions, too, with Student's t
    for S - 1 degrees of freedom; and of the questions alone, since few seeds may agree by chance. None if S is 1.
    """
    count = len(values)
    if count < 2:
        return None
    between = (stats.t.ppf(0.975, count - 1) / Z) ** 2 * np.var(values, ddof=1) / count
    return float(max(between, np.sum(variances) / count**2))


def swap_test(arm: Sequence[Sums], first: Sequence[Sums], resamples: int, seed: int = 0) -> float:
    """Return the two-sided p-value of ``mean_difference`` if the arms are alike (a paired randomisation test).

    If they are, a cluster of questions could as well have come out the other way round. The null distribution swaps the
    arms in each cluster at random, in all runs. It says whether these runs differ, not whether other seeds would. The
    smallest value is 1 / (resamples + 1).
    """
    rng = np.random.default_rng(seed)
    differences = np.zeros(resamples + 1)  # of the runs as they are, and then with each draw of swaps
    for a, b in zip(arm, first, strict=True):
        if a.whole.sum() > 0 and b.whole.sum() > 0:
            differs = (a.part != b.part) | (a.whole != b.whole)
            size = (resamples + 1, np.count_nonzero(differs))
            kept_RxK = rng.integers(2, size=size, dtype=np.int8).astype(np.float32)  # exact for sums below 2^24
            kept_RxK[0] = 1
            differences += _swapped_share(a, b, differs, kept_RxK) - _swapped_share(b, a, differs, kept_RxK)
    return float(np.mean(np.abs(differences) >= abs(differences[0]) - 1e-9))


def _swapped_share(own: Sums, other: Sums, differs: np.ndarray, kept_RxK: np.ndarray) -> np.ndarray:
    """The ratios [R] if of the clusters that differ those that are kept add as in ``own``, and those that are not as in
    ``other``."""
    change = np.stack([own.part - other.part, own.whole - other.whole], axis=-1)[differs]
    part, whole = (kept_RxK @ change.astype(np.float32) + [other.part.sum(), other.whole.sum()]).T
    return part / np.maximum(whole, 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's method, in the given order."""
    order, adjusted, highest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = float(highest)
    return adjusted


def sign_test(differences: Sequence[float]) -> tuple[int, int, float]:
    """Return how many differences are below 0, how many above, and the exact two-sided p-value that both are as likely.

    Differences of 0 are left out.
    """
    below, above = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return below, above, float(stats.binomtest(below, below + above).pvalue) if below + above else 1.0
