"""Statistics over seeds: against independent references, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import intervals
from ctxjax.evaluation import over_seeds
from ctxjax.evaluation.over_seeds import Sums
from ctxjax.evaluation.statistics import binomial_interval, mcnemar, share
from ctxjax.study import results


def runs_of(*rates, n=400):
    return [Sums((np.arange(n) < round(rate * n)).astype(float), np.ones(n)) for rate in rates]


def test_the_variance_by_resampling_questions_is_that_of_a_binomial_and_of_whole_clusters():
    rng = np.random.default_rng(1)
    right = (rng.random(500) < 0.3).astype(float)
    single = over_seeds.bootstrap_variance(share, (right, np.ones(500)), 4000)
    assert single == pytest.approx(right.var() / 500, rel=0.08)
    clusters = (rng.random(50) < 0.3) * 10.0  # ten equal outcomes each say as much as one
    tens = over_seeds.bootstrap_variance(share, (clusters, np.full(50, 10.0)), 4000)
    assert tens == pytest.approx((clusters / 10).var() / 50, rel=0.08)
    # A ratio's variance by the delta method.
    part, whole = rng.random(400), 1 + rng.random(400)
    residual = part - part.sum() / whole.sum() * whole
    ratio = over_seeds.bootstrap_variance(share, (part, whole), 4000)
    assert ratio == pytest.approx((residual**2).sum() / whole.sum() ** 2, rel=0.08)


def test_the_interval_of_values_that_differ_between_seeds_is_students():
    values = [0.1, 0.4, 0.25, 0.3]
    mean, interval = over_seeds.mean_value(values, [1e-9] * 4)
    assert mean == pytest.approx(0.2625)
    assert interval == pytest.approx(stats.t.interval(0.95, 3, np.mean(values), stats.sem(values)))
    # Seeds that agree by chance: the questions alone make it this wide.
    _, (low, high) = over_seeds.mean_value([0.3, 0.3, 0.3], [0.0004] * 3)
    assert (low, high) == pytest.approx((0.3 - 1.96 * math.sqrt(0.0004 / 3), 0.3 + 1.96 * math.sqrt(0.0004 / 3)), 1e-4)
    assert over_seeds.mean_value([0.3], [0.01]) == (0.3, None) and over_seeds.mean_value([], []) == (None, None)
    assert over_seeds.mean_value([0.3, 0.3], [0.0, 0.0]) == (0.3, None)


def test_a_thousand_questions_of_three_seeds_are_not_three_thousand_questions():
    mean, (low, high) = over_seeds.mean_rate(runs_of(0.2, 0.5, 0.8, n=1000), 200)
    assert mean == pytest.approx(0.5) and low < 0.15 and high > 0.85
    # Seeds that agree: about as wide as the questions make it, never narrower.
    mean, (low, high) = over_seeds.mean_rate(runs_of(0.5, 0.5, 0.5, n=1000), 2000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 3000), rel=0.1)
    # Nothing happened in 3 x 400 questions: the exact bound of 1,200.
    assert over_seeds.mean_rate(runs_of(0.0, 0.0, 0.0), 50).interval == pytest.approx(
        (0, 1 - 0.05 ** (1 / 1200)), rel=0.3
    )
    undefined = Sums(np.zeros(4), np.zeros(4))
    assert over_seeds.mean_rate([undefined, *runs_of(0.5)], 50) == (0.5, None)
    assert over_seeds.mean_rate([undefined], 50) == (None, None)


def test_runs_of_few_questions_widen_an_interval_as_they_count():
    """None of 20, 512 and 512 is as little as none of 167 if each run is a third of the mean."""
    runs = [*runs_of(0.0, n=20), *runs_of(0.0, 0.0, n=512)]
    expected = binomial_interval(np.array(0.0), np.array(9 / (1 / 20 + 2 / 512)))
    assert over_seeds.mean_rate(runs, 50).interval == pytest.approx(expected)


def test_every_run_counts_once_however_many_questions_it_has():
    runs = [*runs_of(0.2, n=100), *runs_of(0.6, n=900)]
    assert over_seeds.mean_rate(runs, 50).value == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", intervals.SEEDS[::2], ids=str)
def test_the_interval_over_seeds_covers_and_is_not_half_wider_than_needed(cell):
    found = intervals.simulate_seeds(*cell, runs=1000)
    assert found["coverage"] >= 0.93
    assert found["coverage_of_two_thirds"] < 0.955  # an interval of two thirds of the width does not cover


def test_resampling_three_seeds_with_their_questions_covers_far_too_seldom():
    """Why the usual hierarchical bootstrap is not used."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        observed = rng.binomial(500, rng.beta(4.5, 4.5, 3)) / 500
        seeds = observed[rng.integers(3, size=(300, 3))]
        low, high = np.percentile((rng.binomial(500, seeds) / 500).mean(axis=1), [2.5, 97.5])
        covered += low <= 0.5 <= high
    assert covered / 300 < 0.85


def test_the_difference_of_arms_is_taken_on_the_same_questions_of_each_run():
    rng = np.random.default_rng(2)
    hard = [rng.random(300) for _ in range(3)]  # what both arms find hard is taken out by pairing
    arm, first = ([Sums((h < cut).astype(float), np.ones(300)) for h in hard] for cut in (0.55, 0.5))
    value, (low, high) = over_seeds.mean_difference(arm, first, 1000)
    each = [float(a.part.mean() - b.part.mean()) for a, b in zip(arm, first)]
    assert value == pytest.approx(np.mean(each)) and low > 0
    within = sum((a.part - b.part).var() / 300 for a, b in zip(arm, first)) / 9
    between = (stats.t.ppf(0.975, 2) / 1.96) ** 2 * np.var(each, ddof=1) / 3
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(max(within, between)), rel=0.1)
    assert over_seeds.mean_difference(arm, arm, 100) == (0.0, None)


def test_the_interval_of_a_difference_of_rates_ends_where_such_a_difference_does():
    ones = np.ones(50)
    arm, first = [Sums(ones, ones), Sums(0 * ones, ones)], [Sums(0 * ones, ones), Sums(0 * ones, ones)]
    value, (low, high) = over_seeds.mean_difference(arm, first, 100)
    assert value == 0.5 and low < -1 and high > 1  # Student's t of two seeds
    assert over_seeds.mean_difference(arm, first, 100, over_seeds.RATE_DIFFERENCE) == (0.5, (-1.0, 1.0))
    both = {"seeds": 2, "of_seeds": 2}
    found = results.list_signs(
        [{"arm": "a", "metric": "harm", "difference": d, "p_holm": 1.0} | both for d in (0.0, 0.9)]
    )
    assert next(found)["high"] == 1.0


def harm_of(right, harmed):
    return Sums((right & harmed).astype(float), right.astype(float))


def draw_arms(rng, harms, runs=3, n=120):
    """Two arms with a harm each, in which the same questions are hard."""
    pairs = []
    for _ in range(runs):
        hard = rng.random(n)
        pairs.append([harm_of(rng.random(n) < 0.9, 0.5 * hard + 0.5 * rng.random(n) < harm) for harm in harms])
    return list(zip(*pairs, strict=True))


def test_the_swap_test_is_that_of_scipy_over_all_runs_together():
    rng = np.random.default_rng(5)
    for harms in ((0.3, 0.38), (0.3, 0.3), (0.5, 0.4)):
        arm, first = draw_arms(rng, harms)
        parts, wholes = (np.concatenate([getattr(run, name) for run in (*arm, *first)]) for name in ("part", "whole"))
        n = len(parts) // 2

        def statistic(x, y, axis=-1, parts=parts, wholes=wholes):
            def mean(chosen):
                part, whole = (array[chosen].reshape(*chosen.shape[:-1], 3, -1).sum(-1) for array in (parts, wholes))
                return (part / whole).mean(-1)

            return mean(x) - mean(y)

        places = (np.arange(n), n + np.arange(n))
        known = stats.permutation_test(
            places, statistic, permutation_type="samples", vectorized=True, n_resamples=4000, batch=200, rng=rng
        )
        assert known.statistic == pytest.approx(over_seeds.mean_difference(arm, first, 10).value)
        p = over_seeds.swap_test(arm, first, 4000)
        assert p == pytest.approx(known.pvalue, abs=4 * math.sqrt(known.pvalue / 4000) + 1e-3)


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 9), (12, 1), (5, 5), (0, 8)])
def test_the_swap_test_of_a_rate_in_one_run_is_mcnemars(only_a, only_b):
    a = np.repeat([True, False, True, False], [only_a, only_b, 5, 5])
    b = np.repeat([False, True, True, False], [only_a, only_b, 5, 5])
    arm, first = (Sums(side.astype(float), np.ones(len(side))) for side in (a, b))
    assert over_seeds.swap_test([arm], [first], 20_000) == pytest.approx(mcnemar(a, b), abs=0.012)
    assert over_seeds.swap_test([arm], [arm], 100) == 1.0


def test_the_swap_test_sees_the_share_and_not_the_count():
    """Three of four right answers harmed, against nine of 115: fewer events, and far more harm."""
    right, harmed = np.arange(128) < 4, np.arange(128) < 3
    worse, better = harm_of(right, harmed), harm_of(np.arange(128) < 115, np.arange(128) >= 106)
    assert (worse.part.sum(), better.part.sum()) == (3, 9)
    assert over_seeds.mean_difference([worse], [better], 10).value > 0.6
    assert over_seeds.swap_test([worse], [better], 999) <= 0.01


def test_what_hangs_together_is_swapped_together():
    """Ten contexts of fifty answers each: two runs of five hundred answers would differ, ten contexts do not."""
    part = np.tile([50.0, 0.0], 5)
    arm, first = Sums(part, np.full(10, 50.0)), Sums(part[::-1].copy(), np.full(10, 50.0))
    first.part[1] -= 50
    assert over_seeds.swap_test([arm], [first], 999) > 0.5


def test_the_swap_test_rejects_equal_arms_in_at_most_five_of_a_hundred_cases():
    rng = np.random.default_rng(3)
    rejected = sum(over_seeds.swap_test(*draw_arms(rng, (0.3, 0.3), n=60), 199) < 0.05 for _ in range(600))
    assert 10 <= rejected <= 45


def test_holms_method_on_the_example_of_its_definition_and_by_its_definition():
    assert over_seeds.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(4)
    for _ in range(50):
        p = rng.random(7) ** 3
        adjusted = over_seeds.holm(p)
        for level in (0.01, 0.05, 0.2):  # step down: stop at the first p above level / (number left)
            rejected, ordered = set(), sorted(range(7), key=lambda i: p[i])
            for rank, i in enumerate(ordered):
                if p[i] > level / (7 - rank):
                    break
                rejected.add(i)
            assert {i for i in range(7) if adjusted[i] <= level} == rejected


def test_the_sign_test_counts_by_hand():
    assert over_seeds.sign_test([-1.0] * 12) == (12, 0, pytest.approx(2 / 2**12))
    assert over_seeds.sign_test([-1.0] * 11 + [2.0, 0.0]) == (11, 1, pytest.approx(2 * 13 / 2**12))
    assert over_seeds.sign_test([0.0, 0.0]) == (0, 0, 1.0)
