"""Removability: metrics and statistics by hand, and the views decoded and compared."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import intervals
from ctxjax import config as config_lib, sharding
from ctxjax.configs import tiny
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation import metrics, outcomes as outcomes_lib, select as select_lib, statistics, views
from ctxjax.evaluation.outcomes import Comparison, Learning, Outcomes
from ctxjax.inputs import decoding
from ctxjax.types import Prompts, Rollout
from tests import reference


def outcomes(correct, length=None, truncated=None, parsed=None) -> Outcomes:
    correct = np.array(correct, bool)
    ones = np.ones(len(correct))
    return Outcomes(
        correct=correct,
        parsed=ones.astype(bool) if parsed is None else np.array(parsed, bool),
        truncated=~ones.astype(bool) if truncated is None else np.array(truncated, bool),
        length=ones if length is None else np.array(length),
    )


def paired(right_right, right_wrong, wrong_right, wrong_wrong):
    """(right without context, right with context) of so many questions each."""
    counts = (right_right, right_wrong, wrong_right, wrong_wrong)
    return np.repeat([1, 1, 0, 0], counts).astype(bool), np.repeat([1, 0, 1, 0], counts).astype(bool)


def both_views(bare: Outcomes, context: Outcomes) -> dict:
    return metrics.compute_metrics({"bare": bare, "context": context}, 500)


# --- Metrics ---


def test_metrics_of_ten_questions_by_hand():
    x, xc = paired(3, 2, 4, 1)
    bare = outcomes(x, length=[2, 4, 6] * 3 + [4], truncated=[1] + [0] * 9)
    context = outcomes(xc, length=[5] * 10, truncated=[1, 1] + [0] * 8, parsed=[0] * 3 + [1] * 7)
    result = both_views(bare, context)
    expected = {
        "n": 10, "acc_x": 0.5, "acc_xc": 0.7, "gap": 0.2, "harm": 0.4, "benefit": 0.8, "both_correct": 0.3,
        "dlen": 0.25, "length_x": 4.0, "length_xc": 5.0, "truncated_x": 0.1, "truncated_xc": 0.2, "parse_x": 1.0,
        "parse_xc": 0.7, "mcnemar_p": 0.6875,
    }  # fmt: skip
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert result["flips"] == {"right_right": 3, "right_wrong": 2, "wrong_right": 4, "wrong_wrong": 1}
    assert result["regime"] == "agreement"
    assert result["harm_ci"] == pytest.approx((0.0764, 0.8107), abs=1e-4)  # of 2 in 5
    assert result["acc_x_ci"] == pytest.approx((0.2224, 0.7776), abs=1e-4)  # of 5 in 10


@pytest.mark.parametrize(
    ("base", "accuracies", "lowest", "lost"),
    [
        (0.9, (0.8, 0.2, 0.6), 0.2, 0.7), (0.9, (0.3, 0.8), 0.3, 0.6), (0.9, (0.8, 0.3), 0.3, 0.6),
        (0.5, (0.7, 0.6, 0.8), 0.6, 0.0), (0.9, (), None, None),
    ],
)  # fmt: skip
def test_context_use_is_lost_from_the_base_to_the_lowest_evaluation(base, accuracies, lowest, lost):
    learning = Learning(base, accuracies)
    assert outcomes_lib.lowest_accuracy(learning) == lowest
    assert outcomes_lib.context_loss(learning) == (None if lost is None else pytest.approx(lost))
    found = metrics.compute_metrics({"learning": learning}, 10)
    assert (found.get("lowest_acc_xc"), found.get("context_loss")) == (lowest, outcomes_lib.context_loss(learning))


def test_a_share_of_nothing_is_none():
    all_wrong = both_views(outcomes([0, 0, 0]), outcomes([1, 0, 0]))
    assert all_wrong["harm"] is None and all_wrong["harm_ci"] is None and all_wrong["benefit"] == pytest.approx(1 / 3)
    all_right = both_views(outcomes([1, 1, 1]), outcomes([1, 0, 0]))
    assert all_right["benefit"] is None and all_right["benefit_ci"] is None
    assert all_right["harm"] == pytest.approx(2 / 3)


def test_results_are_plain_numbers_that_json_can_hold():
    result = both_views(outcomes([1, 0, 1]), outcomes([1, 1, 0]))
    assert json.loads(json.dumps(result))["n"] == 3


@pytest.mark.parametrize(
    "counts, regime",
    [
        ((5, 9, 1, 5), "perturbation"),  # p = 22/1024
        ((5, 1, 9, 5), "scaffold"),
        ((5, 8, 2, 5), "agreement"),  # p = 112/1024
        ((20, 0, 0, 0), "agreement"),
    ],
)
def test_regimes_follow_the_sign_of_a_significant_change(counts, regime):
    assert outcomes_lib.regime(*map(outcomes, paired(*counts)), 0) == regime


def test_harm_is_among_the_questions_right_without_context_along_any_axis():
    x = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    xc = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_allclose(statistics.share(x & ~xc, x), [2 / 3, np.nan])
    np.testing.assert_allclose(statistics.share((x & ~xc).T, x.T, axis=0), [2 / 3, np.nan])


def test_the_view_kl_counts_response_tokens_only():
    kl = np.array([[1.0, 3.0, np.nan], [5.0, 99.0, np.nan]])
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    comparison = Comparison(kl, {}, mask)
    assert outcomes_lib.view_kl(comparison) == 3.0
    assert outcomes_lib.view_kl_by_position(comparison) == [3.0, 3.0, None]


def test_layer_cosines_are_means_over_response_tokens_by_layer():
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    cosine = np.array([[[0.5, 0.6, -9.0], [0.7, -9.0, -9.0]], [[0.1, 0.2, -9.0], [0.3, -9.0, -9.0]]])
    cosines = {"cosine": cosine, "control": cosine / 2, "centred": cosine / 10}
    cka = {"context": np.array([1.0, 0.5]), "control": np.array([0.9, 0.4])}
    result = metrics.compute_metrics({"comparison": Comparison(np.zeros((2, 3)), cosines, mask, cka)}, 0)
    assert (result["cka_by_layer"], result["cka_control_by_layer"]) == ([1.0, 0.5], [0.9, 0.4])
    assert result["cosine_by_layer"] == pytest.approx([0.6, 0.2])
    assert result["cosine_control_by_layer"] == pytest.approx([0.3, 0.1])
    assert result["cosine_centred_by_layer"] == pytest.approx([0.06, 0.02])
    assert result["cosine_p5_by_layer"] == pytest.approx([0.51, 0.11])


def test_what_is_not_measured_has_no_metrics():
    assert set(metrics.compute_metrics({"other": outcomes([1, 0])}, 0)) == {"obedience", "obedience_ci"}
    assert "harm_floor" not in both_views(outcomes([1]), outcomes([1]))  # two samples a question, at least


def test_one_entry_of_the_table_is_a_metric(monkeypatch):
    long = metrics.Metric(
        "long", "long", "share", "Responses of more than 10 tokens.", ("bare",),
        lambda bare: statistics.rate(bare.length > 10, bare.clusters), better="lower",
    )  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, long))
    result = both_views(outcomes([1, 1], length=[10, 11]), outcomes([1, 1]))
    assert result["long"] == 0.5 and result["long_ci"] == pytest.approx(statistics.binomial_interval(1, 2))
    select_lib.check_select("-long")
    with pytest.raises(ValueError, match="length_xc, -long, "):
        select_lib.check_select("short")


def test_keys_are_unique_and_metrics_of_one_header_share_unit_table_and_definition():
    assert len({metric.key for metric in metrics.METRICS}) == len(metrics.METRICS)
    by_header = {metric.header: metric for metric in metrics.METRICS}
    for metric in metrics.METRICS:
        if metric.unit is not None:
            same = by_header[metric.header]
            assert (metric.unit, metric.table, metric.definition) == (same.unit, same.table, same.definition)


@pytest.mark.parametrize("samples", [1, 2])
def test_every_number_of_one_model_selects_even_if_the_base_has_no_value_for_it(samples):
    view = Outcomes(*np.eye(4, dtype=bool), lenient=np.zeros(4, bool), samples=samples)
    cosines = dict.fromkeys(("cosine", "control", "centred"), np.zeros((2, 4, 3)))
    measured = dict.fromkeys(("bare", "context", "empty", "other", "paraphrase", "default"), view)
    measured |= {"comparison": Comparison(np.zeros((4, 3)), cosines, np.ones((4, 3), bool)), "distill": 0.5}
    result = metrics.compute_metrics(measured, 20)
    numbers = {key for key, value in result.items() if isinstance(value, float)}
    assert {"acc_x_lenient", "harm", "distill", "acc_default", "view_kl"} < numbers
    for key in numbers:
        select_lib.check_select(key)
        select_lib.check_select(f"-{key}", result | {key: None})


@pytest.mark.parametrize(
    "select", ["", "-", "--harm", "accuracy", "n", "regime", "flips", "cosine_by_layer", "harm_ci"]
)
def test_what_is_no_number_of_one_model_does_not_select(select):
    with pytest.raises(ValueError, match=rf"eval.select = '{select}' is not a metric; choose from -acc_.*, -harm, "):
        select_lib.check_select(select)


def test_a_metric_that_a_task_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"'-obedience' is not a metric of this task; choose from acc_x, -harm \("):
        select_lib.check_select("-obedience", {"acc_x": 1.0, "harm": None, "regime": "agreement"})


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("obedience", "eval.select = 'obedience' needs 'other' in eval.views, which is .'empty'"),
        ("-drift", "eval.select = '-drift' needs 'drift' in eval.meters, which is ..$"),
    ],
)
def test_a_selection_by_what_is_not_measured_is_refused(select, message):
    evaluation = config_lib.experiment(tiny.get_config(), 8).eval
    select_lib.check_select_is_measured("obedience", evaluation)
    select_lib.check_select_is_measured(select, dataclasses.replace(evaluation, meters=("drift",)))
    with pytest.raises(ValueError, match=message):
        select_lib.check_select_is_measured(select, dataclasses.replace(evaluation, views=("empty",), meters=()))


@pytest.mark.parametrize(
    ("select", "samples", "message"),
    [
        ("-excess_harm", 1, "'-excess_harm' needs several responses to a question, not eval.samples = 1"),
        ("-harm_floor", 1, "'-harm_floor' needs several responses"),
        ("mcnemar_p", 2, "'mcnemar_p' needs one response to a question, not eval.samples = 2"),
    ],
)
def test_a_selection_that_the_number_of_samples_excludes_is_refused(select, samples, message):
    evaluation = config_lib.experiment(tiny.get_config(), 8).eval
    select_lib.check_select_is_measured(select, dataclasses.replace(evaluation, samples=3 - samples))
    with pytest.raises(ValueError, match=message):
        select_lib.check_select_is_measured(select, dataclasses.replace(evaluation, samples=samples))


@pytest.mark.parametrize(("select", "wrong"), [("harm", True), ("-acc_x", True), ("-harm", False), ("gap", False)])
def test_a_selection_that_keeps_the_worst_checkpoint_is_warned_of(select, wrong):
    warning = select_lib.describe_wrong_sign(select)
    assert ("eval.select" in warning and "better" in warning) if wrong else warning == ""


# --- Statistics ---


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombe_1998_table_i(successes, n, low, high):
    assert statistics.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_no_trials_is_none():
    nothing = np.zeros(3, bool)
    assert statistics.rate(nothing, np.arange(3), nothing) == (None, None)


@pytest.mark.parametrize("n", [20, 50, 128])
def test_the_interval_of_independent_outcomes_covers_every_rate(n):
    """Exactly, by all outcomes. Wilson's covers 0.176 / n in 84 % of the runs."""
    counts = np.arange(n + 1)
    low, high = statistics.binomial_interval(counts, np.full(n + 1, n))
    for p in np.linspace(0.001, 0.999, 500):
        assert stats.binom.pmf(counts, n, p)[(low <= p) & (p <= high)].sum() > 0.928


CELLS = [(p, n, m, icc) for p, n in ((0.01, 20), (0.05, 50), (0.3, 20)) for m in (2, 8) for icc in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("p, n, samples, correlation", CELLS)
def test_intervals_of_rates_cover_whatever_samples_of_a_question_have_in_common(p, n, samples, correlation):
    cell = intervals.simulate(p, n, samples, correlation, 1500)
    assert cell["coverage"] >= 0.93 and cell["narrowest"] > 0
    assert cell["width"] <= max(1.5, 1.6 * cell["least"])


@pytest.mark.parametrize("cell", [cell for cell in intervals.CROSSED if cell[3] == 0.3][::2], ids=str)
def test_intervals_of_outcomes_that_share_facts_and_contexts_cover(cell):
    found = intervals.simulate_crossed(*cell, 300)
    assert found["coverage"] >= 0.92 and found["width"] < 1.7


def test_an_interval_depends_on_questions_and_not_on_their_samples_if_nothing_happened():
    one = statistics.rate(np.zeros(20, bool), np.arange(20))
    eight = statistics.rate(np.zeros(160, bool), np.repeat(np.arange(20), 8))
    assert one == eight and one.interval == pytest.approx((0, 0.1611), abs=1e-4)


def test_clusters_widen_an_interval_by_their_common_variance_and_their_order_does_not_matter():
    """Eighteen contexts, each obeyed always or never, and the same outcomes without an order."""
    obeyed = np.repeat(np.arange(18) < 9, 28)
    clusters = np.repeat(np.arange(18), 28)
    random = np.random.default_rng(0)
    assert statistics.rate(obeyed, clusters).interval == pytest.approx(statistics.binomial_interval(9, 18))
    order = random.permutation(len(obeyed))
    assert statistics.rate(obeyed[order], clusters[order]) == statistics.rate(obeyed, clusters)
    low, high = statistics.rate(random.permutation(obeyed), clusters).interval
    assert high - low < 0.15


def test_a_bootstrap_of_questions_that_do_not_differ_has_no_interval():
    same = np.full(20, 0.25)
    assert statistics.bootstrap_ratio(same, np.ones(20), 100) == (0.25, None)
    assert statistics.bootstrap_ratio(np.zeros(20), np.zeros(20), 100) == (None, None)


def test_the_sign_flip_test_of_pairs_is_mcnemars():
    for only_a, only_b in ((0, 5), (2, 7), (0, 1), (0, 0)):
        a, b = paired(3, only_a, only_b, 3)
        assert statistics.sign_flip_p(a.astype(float) - b, 1000) == pytest.approx(statistics.mcnemar(a, b))


@pytest.mark.parametrize(
    "only_a, only_b, p", [(10, 2, 158 / 4096), (2, 10, 158 / 4096), (0, 5, 2 / 32), (0, 0, 1.0), (3, 3, 1.0)]
)
def test_mcnemar_is_exact_and_ignores_agreement(only_a, only_b, p):
    for agreeing in (0, 7):
        a, b = paired(agreeing, only_a, only_b, agreeing)
        assert statistics.mcnemar(a, b) == pytest.approx(p, rel=1e-12)


def arms(seed, n, harm_a, harm_b):
    """Outcomes by view of two arms, which harm their right answers with these probabilities."""
    rng = np.random.default_rng(seed)
    pairs = [(right := rng.random(n) < 0.8, right & (rng.random(n) >= harm)) for harm in (harm_a, harm_b)]
    return tuple({"bare": outcomes(x), "context": outcomes(xc)} for x, xc in pairs)


def test_the_difference_of_two_arms_is_that_of_their_harm_and_its_interval_encloses_it():
    a, b = arms(0, 200, 0.3, 0.1)
    estimate, low, high = outcomes_lib.harm_difference(a, b)
    assert metrics.compare_arms(a, b, "sft") == {"harm_minus_sft": [estimate, low, high]}
    harm_a, harm_b = (outcomes_lib.harm(arm["bare"], arm["context"]).value for arm in (a, b))
    assert estimate == pytest.approx(harm_a - harm_b)
    assert 0 < low < estimate < high < 0.4
    assert outcomes_lib.harm_difference(b, a) == pytest.approx([-estimate, -high, -low])


def with_harm(harmed: int, right: int, n: int = 512) -> dict[str, Outcomes]:
    """Outcomes by view: ``right`` questions are right without the context, and ``harmed`` of them wrong with it."""
    x, xc = np.arange(n) < right, (np.arange(n) < right) & (np.arange(n) >= harmed)
    return {"bare": outcomes(x), "context": outcomes(xc)}


@pytest.mark.parametrize(
    ("arm", "first"),
    [((1, 1), (489, 512)), ((0, 11), (483, 512)), ((0, 512), (4, 512)), ((0, 1), (1, 1)), ((0, 20), (0, 20))],
)
def test_few_right_answers_and_few_harmed_ones_prove_no_exact_difference(arm, first):
    """A bootstrap, in which 1 of 1 and 0 of 11 never vary, called the first three certain."""
    estimate, low, high = outcomes_lib.harm_difference(with_harm(*arm), with_harm(*first))
    assert estimate == pytest.approx(arm[0] / arm[1] - first[0] / first[1])
    own = [outcomes_lib.harm(*with_harm(*counts).values()).interval for counts in (arm, first)]
    assert high - low >= max(end - start for start, end in own)  # one arm alone is not better known than that
    if arm != (0, 11):  # 94 points of harm, of which 0 of 11 may hide 26
        assert low < 0 < high


def test_the_interval_of_a_paired_difference_is_newcombes():
    """Newcombe 1998 (Stat. Med. 17:2635), method 10 without its correction, on all-right arms: 0.2 to 0.1."""
    n, counts = 400, {(1, 1): 20, (1, 0): 60, (0, 1): 20, (0, 0): 300}
    a, b = (np.repeat([pair[i] for pair in counts], list(counts.values())).astype(float) for i in (0, 1))
    low, high = statistics.difference_interval(a, np.ones(n), b, np.ones(n))
    (l1, u1), (l2, u2) = statistics.wilson(80, n), statistics.wilson(40, n)
    phi = (20 * 300 - 60 * 20) / np.sqrt(80.0 * 320 * 40 * 360)
    below = np.sqrt((0.2 - l1) ** 2 - 2 * phi * (0.2 - l1) * (u2 - 0.1) + (u2 - 0.1) ** 2)
    above = np.sqrt((u1 - 0.2) ** 2 - 2 * phi * (u1 - 0.2) * (0.1 - l2) + (0.1 - l2) ** 2)
    assert (low, high) == pytest.approx((0.1 - below, 0.1 + above), abs=2e-3)


@pytest.mark.parametrize("cell", intervals.DIFFERENCES[::5], ids=str)
def test_the_interval_of_a_difference_covers(cell):
    found = intervals.simulate_difference(*cell, 1000)
    assert found["coverage"] >= 0.92  # 93 % in benchmarks/intervals.py, which takes more runs
    assert found["width"] < 1.5 or cell[3] <= 0.1  # rare events, about which little can be known


def test_a_difference_of_a_rate_that_does_not_exist_is_none():
    never_right = {"bare": outcomes([0] * 5), "context": outcomes([1] * 5)}
    assert outcomes_lib.harm_difference(never_right, arms(0, 5, 0.5, 0.5)[0]) is None


# --- Views ---

SAMPLING = SamplingConfig(max_tokens=6, eos_ids=(2, 5, 11), pad_id=0)


def rows(tree, index):
    return jax.tree.map(lambda array: array[index], tree)


def wider(prompts, columns):
    return Prompts(*(np.pad(array, [(0, 0), (columns, 0)]) for array in (prompts.tokens_BxP, prompts.mask_BxP)))


@pytest.fixture
def prompts(make_prompts):
    """Bare, context and control views of three questions."""
    return make_prompts(0, 3, 5), make_prompts(1, 3, 8), make_prompts(2, 3, 9)


@pytest.fixture
def rollout(make_rollout) -> Rollout:
    """Responses of 6, 2 and 3 tokens: a batch filled up with copies of the last row has another mean."""
    rollout = make_rollout(3, 3, 6)
    return rollout.replace(mask_BxT=np.arange(6) < np.array([6, 2, 3])[:, None])


@pytest.mark.slow
def test_decoding_does_not_depend_on_the_batch_size(params, tiny_model, make_prompts, mesh):
    prompts, key = make_prompts(0, 5, 7), jax.random.key(0)
    whole, parts = (decoding.decode(params, tiny_model, SAMPLING, prompts, key, size, mesh) for size in (5, 2))
    assert whole.tokens_BxT.shape == (5, 6)
    np.testing.assert_array_equal(parts.mask_BxT, whole.mask_BxT)
    np.testing.assert_array_equal(parts.tokens_BxT, whole.tokens_BxT)
    np.testing.assert_allclose(parts.logprobs_BxT, whole.logprobs_BxT, atol=1e-5)
    again = decoding.decode(params, tiny_model, SAMPLING, prompts, jax.random.key(1), 2, mesh)
    assert (again.tokens_BxT != whole.tokens_BxT).any()


@pytest.mark.parametrize(
    ("rows", "most", "expected"), [(1000, 256, 250), (512, 256, 256), (257, 256, 130), (128, 256, 128), (5, 256, 6)]
)
def test_batches_are_as_few_and_as_even_as_they_can_be(rows, most, expected):
    mesh = sharding.make_mesh(data=2, devices=jax.devices()[:2])
    size = decoding.batch_size(rows, most, mesh)
    assert size == expected and -(-rows // size) == -(-rows // most)


def test_identical_views_have_no_distance_and_cosine_one(params, tiny_model, prompts, rollout, mesh):
    bare, _, control = prompts
    kl, cosines, cka = views.compare(params, tiny_model, bare, wider(bare, 3), control, rollout, 3, mesh)
    mask = rollout.mask_BxT
    assert kl.shape == (3, 6) and cosines["cosine"].shape == (tiny_model.layers + 1, 3, 6)
    np.testing.assert_allclose(kl[mask], 0, atol=1e-5)
    np.testing.assert_allclose(cosines["cosine"][:, mask], 1, atol=1e-5)
    np.testing.assert_allclose(cosines["centred"][:, mask], 1, atol=1e-4)
    # The embedding of a response token is the same in every view; the first window column is a prompt token.
    np.testing.assert_allclose(cosines["control"][0][:, 1:][mask[:, 1:]], 1, atol=1e-5)
    assert cosines["control"][-1][mask].max() < 0.999
    np.testing.assert_allclose(cka["context"], 1, atol=1e-5)
    assert cka["control"][-1] < 0.999


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_comparison_does_not_depend_on_the_batch_size(params, tiny_model, prompts, rollout, mesh, size):
    """Batches of 2 and 4 are filled with copies of the last row."""
    mask = rollout.mask_BxT
    whole, filled = (views.compare(params, tiny_model, *prompts, rollout, size, mesh) for size in (3, size))
    assert whole[0][mask].min() > 1e-3
    np.testing.assert_allclose(filled[0][mask], whole[0][mask], rtol=1e-4, atol=1e-5)
    for name in ("cosine", "control", "centred"):
        np.testing.assert_allclose(filled[1][name][:, mask], whole[1][name][:, mask], atol=1e-5, err_msg=name)
    for name in ("context", "control"):
        np.testing.assert_allclose(filled[2][name], whole[2][name], atol=1e-4, err_msg=name)


def test_cka_ignores_rotations_and_scale_and_is_small_for_states_that_have_nothing_in_common():
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(2, 500, 6)) * np.arange(1, 7)
    turned = 3 * x @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for states, expected in ((turned, 1.0), (x[:, ::-1], 1.0), (x + other, None), (other, None)):
        products = {name: (a - a.mean(0)).T @ (b - b.mean(0)) for name, (a, b) in
                    {"xx": (x, x), "xc": (x, states), "cc": (states, states)}.items()}  # fmt: skip
        found = views.linear_cka(products["xx"], products["cc"], products["xc"])
        assert found == pytest.approx(reference.cka(x, states) if expected is None else expected)
    assert found < 0.05


@pytest.mark.slow
def test_cka_of_a_wide_model_is_estimated(monkeypatch, params, tiny_model, prompts, rollout, mesh):
    exact = views.compare(params, tiny_model, *prompts, rollout, 3, mesh)[2]
    monkeypatch.setattr(views, "MOST_FEATURES", tiny_model.width - 1)
    near = views.compare(params, tiny_model, *prompts, rollout, 3, mesh)[2]
    for name, values in exact.items():
        assert near[name].shape == values.shape and not np.array_equal(near[name], values)
        np.testing.assert_allclose(near[name], values, atol=0.2)


@pytest.mark.slow
def test_distillation_on_given_responses_counts_every_row_once(params, frozen, tiny_model, prompts, rollout, mesh):
    bare, context, _ = prompts

    def kl(index, batch_size):
        data = rows((bare, context, rollout), index)
        return views.distillation_kl(params, frozen, tiny_model, tiny_model, LossConfig(), *data, batch_size, mesh)

    by_row = [kl(slice(row, row + 1), 2) for row in range(3)]
    assert np.ptp(by_row) > 1e-2
    expected = np.average(by_row, weights=[6, 2, 3])
    assert kl(slice(3), 2) == pytest.approx(expected, rel=1e-4)
    assert kl(slice(3), 4) == pytest.approx(expected, rel=1e-4)


def sampled(correct, samples):
    nothing = np.zeros(len(correct), bool)
    return Outcomes(correct, ~nothing, nothing, np.ones(len(correct), int), samples=samples)


def test_harm_above_its_floor_is_nothing_where_two_views_are_equally_unsure_and_all_of_it_where_they_are_sure():
    """Four questions, eight samples; independent draws of views with the same chances disagree, and only the floor says
    that this is no harm."""
    random, chances = np.random.default_rng(0), np.repeat(np.tile([0.2, 0.5, 0.8, 1.0], 200), 8)
    x, xc = (random.random(chances.size) < chances for _ in range(2))
    result = both_views(sampled(x, 8), sampled(xc, 8))
    expected = np.mean(chances * (1 - chances)) / np.mean(chances)
    assert result["n"] == 800 and result["samples"] == 8
    assert result["harm"] == pytest.approx(expected, abs=0.02) and result["harm_floor"] == pytest.approx(
        expected, abs=0.02
    )
    assert abs(result["excess_harm"]) < 0.02 and result["regime"] == "agreement"
    low, high = result["harm_ci"]
    assert low < result["harm"] < high
    sure = np.ones(800, bool)
    result = both_views(sampled(sure, 8), sampled(np.repeat(np.arange(100) >= 30, 8), 8))
    assert result["harm_floor"] == 0 and result["harm"] == result["excess_harm"] == pytest.approx(0.3)
    assert result["regime"] == "perturbation"


def test_samples_of_a_question_do_not_make_an_interval_narrower_than_questions_do():
    """Eight equal samples of a question say no more than one."""
    right = np.random.default_rng(1).random(60) < 0.5
    one, eight = (statistics.rate(np.repeat(right, m), np.repeat(np.arange(60), m)).interval for m in (1, 8))
    assert eight[1] - eight[0] == pytest.approx(one[1] - one[0], rel=1e-6)


def test_all_samples_right_without_and_wrong_with_the_context_is_a_perturbation_of_exactly_known_gap():
    everything = np.ones(160, bool)
    result = both_views(sampled(everything, 8), sampled(~everything, 8))
    assert result["regime"] == "perturbation" and result["excess_harm"] == 1.0 and result["excess_harm_ci"] is None


def test_bootstraps_of_samples_take_the_configured_number_of_resamples():
    random = np.random.default_rng(0)
    x, xc = (sampled(random.random(160) < 0.7, 8) for _ in range(2))
    few, many = (metrics.compute_metrics({"bare": x, "context": xc}, resamples) for resamples in (10, 2000))
    for key in ("harm_floor_ci", "excess_harm_ci"):
        assert few[key] != many[key]
    assert few["harm_ci"] == many["harm_ci"]


def test_wordings_of_one_fact_say_no_more_than_the_fact():
    """Three of twelve facts are known, each in all of its sixteen wordings."""
    facts = [f"fact {index % 12}" for index in range(192)]
    known = np.array([index % 12 < 3 for index in range(192)])
    views = {"bare": dataclasses.replace(outcomes(known), groups=facts)}
    views["context"] = dataclasses.replace(outcomes(np.ones(192)), groups=facts)
    result = metrics.compute_metrics(views, 1000)
    assert result["acc_x_ci"] == pytest.approx(statistics.binomial_interval(3, 12)) and result["n"] == 192
    assert result["harm_ci"] == pytest.approx(statistics.binomial_interval(0, 3))
    assert "mcnemar_p" not in result and result["regime"] == "scaffold"  # nine facts better, none worse
    few = {view: dataclasses.replace(own, groups=[f"fact {i % 4}" for i in range(192)]) for view, own in views.items()}
    few["bare"] = dataclasses.replace(few["bare"], correct=np.array([i % 4 < 1 for i in range(192)]))
    assert metrics.compute_metrics(few, 1000)["regime"] == "agreement"  # three facts may be chance


def test_arms_are_compared_by_facts_and_not_by_their_wordings():
    rng = np.random.default_rng(0)
    facts = [f"fact {index // 16}" for index in range(192)]
    lost = np.repeat(rng.random(12) < 0.5, 16)

    def harmed(correct, groups):
        return {"bare": dataclasses.replace(outcomes(np.ones(192)), groups=groups), "context": outcomes(correct)}

    single, grouped = (outcomes_lib.harm_difference(harmed(~lost, g), harmed(np.ones(192), g)) for g in (None, facts))
    assert single[0] == grouped[0] == pytest.approx(lost.mean())
    assert grouped[2] - grouped[1] > 3 * (single[2] - single[1])  # the square root of 16 is 4


def test_obedience_is_clustered_by_context_and_reported_by_it():
    """Two of twelve contexts are never obeyed, the others always: 480 responses say no more than twelve."""
    contexts = [f"context {index % 12}" for index in range(480)]
    obeyed = [index % 12 >= 2 for index in range(480)]
    other = dataclasses.replace(outcomes(obeyed), contexts=contexts)
    result = metrics.compute_metrics({"other": other}, 0)
    assert result["obedience_ci"] == pytest.approx(statistics.binomial_interval(10, 12))
    assert list(result["obedience_by_context"].items())[1:3] == [("context 1", [0.0, 40]), ("context 10", [1.0, 40])]
    # Ten facts that are obeyed under all contexts or under none: ten outcomes, though no context differs.
    facts = [f"fact {index // 12 % 10}" for index in range(480)]
    by_fact = dataclasses.replace(other, correct=np.arange(480) // 12 % 10 >= 2, groups=facts)
    assert metrics.compute_metrics({"other": by_fact}, 0)["obedience_ci"] == pytest.approx(
        statistics.binomial_interval(8, 10)
    )
    one = dataclasses.replace(other, contexts=["the only one"] * 480)  # as much as one outcome
    assert metrics.compute_metrics({"other": one}, 0)["obedience_ci"] == pytest.approx(
        statistics.binomial_interval(10 / 12, 1)
    )
    many = dataclasses.replace(other, contexts=[str(index % 101) for index in range(480)])
    assert "obedience_by_context" not in metrics.compute_metrics({"other": many}, 0)
