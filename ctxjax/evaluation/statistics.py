"""Rates with their intervals, and tests for paired yes/no outcomes on the same questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000  # of a bootstrap over the questions of one model


class Rate(NamedTuple):
    """A rate and its 95 % interval (low, high). Both are None if there is nothing to take a rate of."""

    value: float | None
    interval: tuple[float, float] | None


def share(part: np.ndarray, whole: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return sum(part) / sum(whole) along ``axis``; NaN if the sum of ``whole`` is 0."""
    total = np.sum(whole, axis=axis)
    return np.where(total > 0, np.sum(part, axis=axis) / np.where(total > 0, total, 1), np.nan)


def rate(successes: np.ndarray, among: np.ndarray | None = None, samples: int = 1) -> Rate:
    """Return the share of ``successes`` [n * samples] bool in ``among`` (all by default).

    The interval is Wilson's. Several samples of a question are not independent: with them it is a bootstrap interval
    over questions.
    """
    among = np.ones_like(successes) if among is None else among
    if samples > 1:
        return bootstrap_rate(mean_by_question(successes & among, samples), mean_by_question(among, samples))
    chosen = successes[among]
    n = len(chosen)
    return Rate(float(np.mean(chosen)) if n else None, wilson(int(np.sum(chosen)), n))


def mean_by_question(values: np.ndarray, samples: int) -> np.ndarray:
    """Return the means [n] over the samples of each question; ``values`` is [n * samples]."""
    return np.mean(np.reshape(values, (-1, samples)), axis=1)


def bootstrap_rate(part_n: np.ndarray, whole_n: np.ndarray) -> Rate:
    """Return sum(part) / sum(whole) with a bootstrap interval over questions."""
    interval = paired_bootstrap(share, (part_n, whole_n), RESAMPLES)
    value = float(share(part_n, whole_n))
    return Rate(value if np.isfinite(value) else None, interval and interval[1:])


def wilson(successes: int, n: int) -> tuple[float, float] | None:
    """Return the 95 % Wilson interval of a rate; None if n is 0."""
    if n == 0:
        return None
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the exact two-sided p-value that two outcomes [n] bool on the same items have the same rate."""
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(~a & b))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(
    statistic: Callable, arrays: tuple[np.ndarray, ...], resamples: int, seed: int = 0
) -> tuple[float, float, float] | None:
    """Return (estimate, low, high), a 95 % percentile interval; an item is resampled with its entry in every array.

    ``statistic(*arrays, axis)`` works along ``axis``. Resamples with a value that is not finite (a rate among no items)
    are left out. None if the estimate is not finite, or if there are fewer than two items.
    """
    estimate = float(statistic(*arrays, axis=-1))
    if not np.isfinite(estimate) or arrays[0].shape[-1] < 2:
        return None
    result = stats.bootstrap(
        arrays, statistic, paired=True, vectorized=True, n_resamples=resamples, method="percentile",
        rng=np.random.default_rng(seed), batch=256,
    )  # fmt: skip
    values = result.bootstrap_distribution
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return estimate, float(low), float(high)
