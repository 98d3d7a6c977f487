"""Rates with their intervals, and tests for paired outcomes on the same questions.

Outcomes of one cluster are not independent: samples of one question, or questions under one held-out context. An
interval of a rate is Wilson's for the number of independent outcomes that say as much as the clustered ones.
benchmarks/intervals.py measures how often it covers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

Z = stats.norm.ppf(0.975)
# How many clusters with events the largest design effect counts as. Chosen by benchmarks/intervals.py.
PRIOR_CLUSTERS = 1.5


class Rate(NamedTuple):
    """A rate and its 95 % interval (low, high).

    Both are None if there is nothing to take a rate of. The interval alone is None if it cannot be estimated.
    """

    value: float | None
    interval: tuple[float, float] | None


def share(part: np.ndarray, whole: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return sum(part) / sum(whole) along ``axis``; NaN if the sum of ``whole`` is 0."""
    total = np.sum(whole, axis=axis)
    return np.where(total > 0, np.sum(part, axis=axis) / np.where(total > 0, total, 1), np.nan)


def rate(successes: np.ndarray, clusters: np.ndarray, among: np.ndarray | None = None) -> Rate:
    """Return the share of ``successes`` [N] bool in ``among`` (all by default).

    ``clusters``: the number of each outcome's cluster, [N] int. If each outcome is a cluster of its own, the interval
    is the binomial one. [2, N]: of two kinds that cross, as contexts and facts do.
    """
    among = np.ones_like(successes) if among is None else among
    if not among.any():
        return Rate(None, None)
    n, hits, effects, most = np.sum(among), np.sum(successes & among), [], 1.0
    for of_kind in np.atleast_2d(clusters):
        whole = np.bincount(of_kind, among)
        effects.append(design_effect(np.bincount(of_kind, successes & among, len(whole)), whole))
        most = max(most, np.sum(whole**2) / n)
    # The variances by each kind add up, and that of independent outcomes is in each (Cameron, Gelbach and Miller 2011).
    deff = min(sum(effects) - (len(effects) - 1), most)
    low, high = binomial_interval(hits / deff, n / deff)
    return Rate(float(hits / n), (float(low), float(high)))


def clustered_interval(part: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval [...] of sum(part) / sum(whole); ``part`` of ``whole`` outcomes of each cluster [..., K]
    are successes."""
    deff = design_effect(part, whole)
    return binomial_interval(np.sum(part, axis=-1) / deff, np.sum(whole, axis=-1) / deff)


def design_effect(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return by how much clusters [..., K] increase the variance of sum(part) / sum(whole), with a margin for few
    clusters.

    The estimate is the variance of the ratio between clusters over that of independent outcomes, times the squared
    quotient of Student's t and the normal quantile (Korn and Graubard 1998). It is at least 1 and at most ``most``, the
    effect if the outcomes of each cluster are equal. If few clusters have events there is little to estimate from, so
    it is shrunk to ``most``, which it is if there are no events, and if there is one cluster.
    """
    count, n = np.sum(whole > 0, axis=-1), np.sum(whole, axis=-1)
    most = np.sum(whole**2, axis=-1) / n
    p = np.sum(part, axis=-1) / n
    residual = part - p[..., None] * whole
    between = np.sum(residual**2, axis=-1) * count / np.maximum(count - 1, 1) / n
    t = stats.t.ppf(0.975, np.maximum(count - 1, 1))
    independent = p * (1 - p)
    raw = np.where(independent > 0, between / np.where(independent > 0, independent, 1), most) * (t / Z) ** 2
    events = np.minimum(np.sum(part > 0, axis=-1), np.sum(part < whole, axis=-1))
    weight = np.where(count > 1, events / (events + PRIOR_CLUSTERS), 0)
    return np.clip(raw, 1, most) ** weight * most ** (1 - weight)


def difference_interval(
    part_a: np.ndarray, whole_a: np.ndarray, part_b: np.ndarray, whole_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval [...] of sum(part_a) / sum(whole_a) - sum(part_b) / sum(whole_b), over the same clusters
    [..., K].

    Each share's own interval says how far it may be off, and these distances add up as standard deviations do, with the
    correlation of both shares (Newcombe 1998; Zou and Donner 2008). A bootstrap, in which a share of one outcome or of
    no event never varies, takes it for exactly known.
    """
    a, b, r = share(part_a, whole_a), share(part_b, whole_b), _correlation(part_a, whole_a, part_b, whole_b)
    (low_a, high_a), (low_b, high_b) = clustered_interval(part_a, whole_a), clustered_interval(part_b, whole_b)

    def add(x, y):
        return np.sqrt(np.maximum(x**2 + y**2 - 2 * r * x * y, 0.0))

    return a - b - add(a - low_a, high_b - b), a - b + add(high_a - a, b - low_b)


def _correlation(part_a: np.ndarray, whole_a: np.ndarray, part_b: np.ndarray, whole_b: np.ndarray) -> np.ndarray:
    """Return the correlation of two shares over the same clusters [..., K], shrunk to 0 if few clusters differ."""
    of_a, of_b = (
        part - share(part, whole)[..., None] * whole for part, whole in ((part_a, whole_a), (part_b, whole_b))
    )
    scale = np.sqrt(np.sum(of_a**2, axis=-1) * np.sum(of_b**2, axis=-1))
    r = np.where(scale > 0, np.sum(of_a * of_b, axis=-1) / np.where(scale > 0, scale, 1), 0.0)
    differ = np.sum((part_a != part_b) | (whole_a != whole_b), axis=-1)
    return r * differ / (differ + PRIOR_CLUSTERS)


def binomial_interval(successes: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of a rate: Wilson's, its ends moved out to the exact one-sided 5 % bounds.

    Only rates of less than about ten successes or failures change. With one to three of them Wilson's interval covers
    as little as 84 % (Brown, Cai and DasGupta 2001, whose modification this is). Counts need not be whole.
    """
    low, high = wilson(successes, n)
    failures = n - successes
    exact_low = np.where(successes > 0, stats.beta.ppf(0.05, np.where(successes > 0, successes, 1), failures + 1), 0)
    exact_high = np.where(failures > 0, stats.beta.ppf(0.95, successes + 1, np.where(failures > 0, failures, 1)), 1)
    return np.minimum(low, exact_low), np.maximum(high, exact_high)


def wilson(successes: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % Wilson interval of a rate. Counts need not be whole, ``n`` is above 0."""
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return np.where(p > 0, centre - half, 0.0), np.where(p < 1, centre + half, 1.0)


def mean_by_question(values: np.ndarray, samples: int) -> np.ndarray:
    """Return the means [n] over the samples of each question; ``values`` is [n * samples]."""
    return np.mean(np.reshape(values, (-1, samples)), axis=1)


def bootstrap_ratio(part_n: np.ndarray, whole_n: np.ndarray, resamples: int) -> Rate:
    """Return sum(part) / sum(whole), which need not be a rate, with a bootstrap interval over questions."""
    value = float(share(part_n, whole_n))
    if not np.isfinite(value):
        return Rate(None, None)
    return Rate(value, paired_bootstrap(share, (part_n, whole_n), resamples))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the exact two-sided p-value that two outcomes [n] bool on the same items have the same rate."""
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(~a & b))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(
    statistic: Callable, arrays: tuple[np.ndarray, ...], resamples: int, seed: int = 0
) -> tuple[float, float] | None:
    """Return a 95 % percentile interval (low, high); an item is resampled with its entry in every array.

    ``statistic(*arrays, axis)`` works along ``axis``. Resamples with a value that is not finite (a rate among no items)
    are left out. None if there are fewer than two items, or if all resamples are equal: that the items at hand do not
    vary is no proof that others do not.
    """
    rng, count = np.random.default_rng(seed), arrays[0].shape[-1]
    if count < 2:
        return None
    draws = (rng.integers(count, size=(min(256, resamples - done), count)) for done in range(0, resamples, 256))
    values = np.concatenate([statistic(*(array[index] for array in arrays), axis=-1) for index in draws])
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (0.0, 0.0)
    return (float(low), float(high)) if high > low else None


def sign_flip_p(difference_n: np.ndarray, resamples: int, seed: int = 0) -> float:
    """Return the two-sided p-value that paired differences [n] of questions are as often above 0 as below it.

    The null distribution of their mean flips the sign of each: all combinations if there are at most ``resamples``,
    else that many. For differences of -1, 0 and 1 this is McNemar's test.
    """
    changed = difference_n[difference_n != 0]
    if len(changed) < 2:
        return 1.0
    result = stats.permutation_test(
        (changed,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples, batch=256,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)
