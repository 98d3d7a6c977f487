"""Intervals and tests for paired yes/no outcomes on the same questions, from scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats


def wilson(successes: int, n: int) -> tuple[float, float] | None:
    """95 % Wilson interval of a rate; None where n is 0."""
    if n == 0:
        return None
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p-value that two outcomes [n] bool on the same items have the same rate."""
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(~a & b))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(statistic: Callable, arrays: tuple[np.ndarray, ...], resamples: int, seed: int = 0):
    """(estimate, low, high): 95 % percentile interval, items resampled with all their arrays together.

    ``statistic(*arrays, axis)`` must work along ``axis``; resamples where it is not finite (a rate among no
    items) are left out. None where the estimate itself is not finite, and for fewer than two items.
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
