"""Which tokens count and how much, and the values per token, by hand; objective_test.py has them put together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.distill import losses, objective
from ctxjax.distill.anchors import ANCHORS, anchor_term, handover_target, loss_at
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.terms import token_values
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Rollout

# p = (1/2, 1/2), q = (1/4, 3/4):
P, Q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
KL_P_Q, KL_Q_P = 0.14384104, 0.13081204
VIEWS, OTHERS = ("q_x", "q_c", "f", "f_x", "ema"), ("q_other", "f_other")
ROUNDING = 3e-6  # ten times what float32 loses of numbers near 1


def model_of(vocab_size, **fields) -> ModelConfig:
    return ModelConfig(vocab_size, width=2, layers=1, query_heads=1, kv_heads=1, head_dim=2, mlp_width=2, **fields)


def close(one, two, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)
    return True


# --- Which tokens count, and how much ---

EOS = 2
# Rows that end at the limit, are cut there, end at once, end early, and hold an end token only behind their mask.
TOKENS = np.array([[5, 6, 7, 2], [5, 6, 7, 8], [2, 2, 2, 2], [5, 2, 2, 2], [5, 6, 2, 2]])
LENGTHS = np.array([4, 4, 1, 2, 2])


@pytest.mark.parametrize(
    "fields, counts",
    [
        ({}, ["1111", "1111", "1000", "1100", "1100"]),
        ({"skip_first": 1}, ["0111", "0111", "0000", "0100", "0100"]),
        ({"masked_ids": (6, 2)}, ["1010", "1011", "0000", "1000", "1000"]),
        ({"drop_truncated": True}, ["1111", "0000", "1000", "1100", "0000"]),
        ({"drop_truncated": True, "skip_first": 3, "masked_ids": (2,)}, ["0000"] * 5),
        ({"drop_truncated": True, "skip_first": 2, "masked_ids": (2,)}, ["0010", *["0000"] * 4]),
    ],
)
def test_trained_tokens_by_hand(fields, counts):
    rollout = Rollout(jnp.array(TOKENS), jnp.arange(4) < LENGTHS[:, None], jnp.zeros((5, 4)))
    trained = losses.trained_tokens(LossConfig(**fields), rollout, eos_ids=(EOS, 11))
    assert ["".join("01"[int(token)] for token in row) for row in trained] == counts


VALUES = jnp.array([[1.0, 2.0, 3.0], [5.0, 90.0, 90.0], [jnp.nan, jnp.nan, jnp.nan]])
MASK = jnp.array([[True, True, True], [True, False, False], [False, False, False]])


@pytest.mark.parametrize("averaging, total, count", [("token_mean", 11.0, 4.0), ("sequence_mean", 7.0, 2.0)])
def test_averages_by_hand_where_one_row_is_empty(averaging, total, count):
    mean = losses.average(VALUES, MASK, averaging)
    assert (mean.total, mean.count) == (total, count)
    gradient = jax.grad(lambda values: losses.average(values, MASK, averaging).value)(VALUES)
    by_hand = {"token_mean": [[0.25, 0.25, 0.25], [0.25, 0, 0]], "sequence_mean": [[1 / 6, 1 / 6, 1 / 6], [0.5, 0, 0]]}
    np.testing.assert_allclose(gradient, [*by_hand[averaging], [0, 0, 0]], rtol=1e-6)
    weights = losses.token_weights(MASK, averaging)
    np.testing.assert_allclose(weights, gradient, rtol=1e-6)
    assert jnp.sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean"])
def test_the_average_of_nothing_is_zero(averaging):
    mean = losses.average(VALUES, jnp.zeros_like(MASK), averaging)
    assert (mean.count, mean.value) == (0, 0)
    assert not np.any(losses.token_weights(jnp.zeros_like(MASK), averaging))


def weights(config, step) -> dict[str, float]:
    """The weight of every term that the objective has."""
    return {term.name: float(term.weight(jnp.int32(step))) for term in objective.terms(config)}


def test_steps_on_the_teachers_samples_have_their_own_divergence_if_one_is_named():
    same = LossConfig(divergence="jsd", mu=1.0)
    own = LossConfig(off_policy_divergence="forward_kl", beta=0.5, anchor_every=2)
    assert [loss_at(same, 0, off).divergence for off in (False, True)] == ["jsd", "jsd"]
    assert [loss_at(own, 1, off).divergence for off in (False, True)] == ["reverse_kl", "forward_kl"]
    sft = LossConfig(divergence="cross_entropy", on_policy_fraction=0.0, off_policy_divergence="forward_kl")
    assert loss_at(sft, 0, True) == sft  # an arm without other steps keeps its own
    assert [loss_at(own, step, True).beta for step in (0, 1)] == [0, 0.5] and loss_at(same, 0, True).mu == 1.0


def test_a_step_of_an_arm_with_a_warm_up_is_on_policy_or_it_is_not():
    """So that on-policy steps check that sampling and scoring agree, and are the same program as in other arms."""
    config = LossConfig(off_policy_steps=2, on_policy_fraction=0.5)
    assert [loss_at(config, step, off).is_on_policy for step, off in ((0, True), (2, False), (3, True))] == [
        False, True, False,
    ]  # fmt: skip
    assert loss_at(config, 2, False) == LossConfig()


@pytest.mark.parametrize("ramp, expected", [(0, [0.5] * 5), (4, [0.125, 0.25, 0.375, 0.5, 0.5]), (1, [0.5] * 5)])
def test_weights_rise_over_their_first_steps(ramp, expected):
    for field, name in (("beta", "anchor"), ("mu", "retain")):
        config = LossConfig(**{"beta": 2.0, "mu": 3.0, field: 0.5, f"{field}_ramp": ramp})
        np.testing.assert_allclose([weights(config, step)[name] for step in range(5)], expected)
        others = {"distill": 1.0, "anchor": 2.0, "retain": 3.0}
        assert weights(config, 0) | {name: 0} == others | {name: 0}


def test_an_anchor_of_every_third_step_weighs_three_times_there_and_is_left_out_elsewhere():
    config = LossConfig(beta=0.5, mu=1.0, anchor_every=3, beta_ramp=2)
    assert [loss_at(config, step).beta for step in range(6)] == [0, 0, 0.5, 0, 0, 0.5]
    assert loss_at(config, 2) == config and dataclasses.replace(loss_at(config, 3), beta=0.5) == config
    found = [weights(loss_at(config, step), step) for step in range(6)]
    assert [at.get("anchor") for at in found] == [None, None, 1.5, None, None, 1.5]
    assert [at["retain"] for at in found] == [1.0] * 6


# --- The terms per token ---


def test_distillation_is_the_divergence_of_the_student_from_the_teacher_that_the_configuration_names():
    def value(**fields):
        return float(losses.distillation(LossConfig(**fields), student=P, teacher=Q))

    assert value() == pytest.approx(KL_P_Q, abs=ROUNDING)
    assert value(divergence="forward_kl") == pytest.approx(KL_Q_P, abs=ROUNDING)
    assert value(divergence="skewed_forward_kl", alpha=0.25) == pytest.approx(0.0758576, abs=ROUNDING)
    assert value(support="teacher_top_k", top_k=1, remainder="raw") == pytest.approx(0.5 * np.log(2 / 3), abs=ROUNDING)


def retention(student, teacher):
    logits = {"q_other": student, "f_other": teacher}
    return losses.retention_term(LossConfig(mu=1.0)).values(logits, None)["retain"]


def test_retention_weighs_by_the_teacher():
    assert retention(student=P, teacher=Q) == pytest.approx(KL_Q_P, abs=ROUNDING)
    assert retention(student=Q, teacher=P) == pytest.approx(KL_P_Q, abs=ROUNDING)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_distillation_moves_the_student_and_never_the_teacher(divergence):
    config = LossConfig(divergence=divergence)
    student, teacher = jax.grad(lambda s, t: losses.distillation(config, s, t), argnums=(0, 1))(P, Q)
    assert np.all(np.asarray(student) != 0) and not np.any(teacher)


def test_retention_moves_the_student_and_never_the_teacher():
    student, teacher = jax.grad(retention, argnums=(0, 1))(P, Q)
    assert not np.any(teacher)
    np.testing.assert_allclose(student, [0.5 - 0.25, 0.5 - 0.75], atol=ROUNDING)


# --- Anchors ---

ANCHOR_TABLE = {  # what q_c is compared with, by which value where that is p and q_c is q, and what moves
    "bare": (("q_x",), KL_P_Q, {"q_c"}),
    "ema": (("ema",), KL_P_Q, {"q_c"}),
    "teacher_bare": (("f_x",), KL_P_Q, {"q_c"}),
    "joint": (("q_x",), KL_P_Q, {"q_x", "q_c"}),
    "symmetric": (("q_x",), (KL_P_Q + KL_Q_P) / 2, {"q_x", "q_c"}),
    "teacher": (("f",), KL_Q_P, {"q_c"}),
    "handover": (("q_x", "f"), KL_P_Q, {"q_c"}),
}


def anchor_values(config, raw, models=None):
    """Of the anchor alone."""
    models = models or (model_of(2), model_of(2))
    return token_values((anchor_term(config),), models, config.temperature, raw, None)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_each_anchor_compares_q_c_with_its_view_and_moves_only_what_it_may(anchor, mesh):
    targets, value, moved = ANCHOR_TABLE[anchor]
    others = jnp.log(jnp.array([0.1, 0.9]))
    raw = dict.fromkeys(VIEWS, others) | {"q_c": Q} | dict.fromkeys(targets, P)
    config = LossConfig(beta=1.0, anchor=anchor)
    found, gradients = jax.value_and_grad(lambda raw: anchor_values(config, raw)["anchor"])(raw)
    assert found == pytest.approx(value, abs=ROUNDING)
    assert {name for name in VIEWS if np.any(gradients[name])} == moved
    assert ANCHORS[anchor].targets == targets
    if value == KL_P_Q:
        np.testing.assert_allclose(gradients["q_c"], [0.25 - 0.5, 0.75 - 0.5], atol=ROUNDING)  # q_c - target


def test_the_handover_target_is_finite_where_rounded_probabilities_add_up_to_more_than_one():
    """Where both agree but for a token that is far likelier to one of them: w of 1.0000001 made log m of it NaN."""
    q_x = 8 * jax.random.normal(jax.random.key(0), (64, 20_000))
    assert float(jnp.max(jnp.sum(jax.nn.softmax(q_x), axis=-1))) > 1
    q_x, f = q_x.at[:, 0].set(-60.0), q_x.at[:, 0].set(-10.0)
    target = handover_target({"q_x": q_x, "f": f})
    assert not np.isnan(target).any()
    np.testing.assert_allclose(np.exp(target[:, 1:]), jax.nn.softmax(q_x)[:, 1:], rtol=2e-4)


@pytest.mark.parametrize(
    ("bare", "target"),
    [
        ([0.0, 0.0, 1.0], [0.2, 0.8, 0.0]),  # nothing in common: the teacher's
        ([0.2, 0.8, 0.0], [0.2, 0.8, 0.0]),
        ([0.5, 0.5, 0.0], [0.41, 0.59, 0.0]),  # 0.2 + 0.5 in common: 0.7 of the bare student's
    ],
)
def test_the_handover_anchor_takes_the_bare_student_as_far_as_it_agrees_with_the_teacher(bare, target, mesh):
    q_x, f, target = jnp.log(jnp.array(bare)), jnp.log(jnp.array([0.2, 0.8, 0.0])), np.array(target)
    q_c = jnp.array([0.6, 0.1, 0.3])
    config = LossConfig(beta=1.0, anchor="handover")
    found, gradient = jax.value_and_grad(
        lambda q_c: anchor_values(config, {"q_x": q_x, "f": f, "q_c": q_c}, (model_of(3), model_of(3)))["anchor"]
    )(jnp.log(q_c))
    present = target > 0
    assert found == pytest.approx((target * np.log(np.where(present, target, 1) / q_c)).sum(), abs=ROUNDING)
    np.testing.assert_allclose(gradient, q_c - target, atol=ROUNDING)


@pytest.mark.slow
def test_a_gate_by_token_anchors_where_the_student_finds_the_teachers_token_likeliest(mesh):
    falling, rising = jnp.log(jnp.array([0.6, 0.4])), jnp.log(jnp.array([0.3, 0.7]))
    bare, teacher = jnp.stack([falling, falling, rising])[None], jnp.stack([falling, rising, rising])[None]
    raw = {"q_x": bare, "f": teacher, "q_c": jnp.broadcast_to(Q, (1, 3, 2))}
    gated = LossConfig(beta=1.0, gate="token")
    values, plain = (anchor_values(config, raw) for config in (gated, LossConfig(beta=1.0)))
    np.testing.assert_array_equal(values["gate"], [[1, 0, 1]])
    assert np.all(plain["anchor"] > 1e-3) and plain.keys() == {"anchor"}
    np.testing.assert_allclose(values["anchor"], plain["anchor"] * jnp.array([[1, 0, 1]]))
    moved = jax.grad(lambda raw: jnp.sum(anchor_values(gated, raw)["anchor"]))(raw)
    assert np.any(moved["q_c"], axis=-1).tolist() == [[True, False, True]]
    assert not np.any(moved["q_x"]) and not np.any(moved["f"])


# --- What one sweep over the bare view tells ---


def bare_values(config, raw, tokens, models=None):
    models = models or (model_of(raw["q_x"].shape[-1]), model_of(raw["f"].shape[-1]))
    terms = tuple(term for term in objective.terms(config) if term.name in ("distill", "reference"))
    return token_values(terms, models, config.temperature, raw, jnp.array(tokens))


def test_companions_of_distillation_by_hand(mesh):
    raw = {"q_x": jnp.stack([P, Q])[None], "f": jnp.stack([Q, Q])[None]}
    values = bare_values(LossConfig(), raw, [[0, 1]])
    expected = {
        "distill": [KL_P_Q, 0],
        "entropy": [0.6931472, 0.5623351],  # ln 2, and 1/4 ln 4 + 3/4 ln 4/3
        "teacher_entropy": [0.5623351, 0.5623351],
        "top1_agreement": [0, 1],
        "logprob": [-0.6931472, -0.2876821],  # ln 1/2, ln 3/4
    }
    assert values.keys() == expected.keys()
    assert close(values, {name: np.array([row]) for name, row in expected.items()}, atol=ROUNDING)


def test_the_clip_bounds_distillation_and_stops_its_gradient(mesh):
    raw = {"q_x": jnp.stack([P, 4 * Q])[None], "f": jnp.stack([Q, -4 * Q])[None]}
    clip = LossConfig(clip=0.5)
    values, plain = (bare_values(config, raw, [[0, 0]]) for config in (clip, LossConfig()))
    assert plain["distill"][0, 1] > 1 and "clipped" not in plain
    np.testing.assert_allclose(values["distill"], [[KL_P_Q, 0.5]], atol=ROUNDING)
    np.testing.assert_array_equal(values["clipped"], [[0, 1]])
    moved = jax.grad(lambda raw: jnp.sum(bare_values(clip, raw, [[0, 0]])["distill"]))(raw)["q_x"]
    assert np.any(moved, axis=-1).tolist() == [[True, False]]


def test_the_reference_term_holds_q_x_to_the_teacher_without_context(mesh):
    raw = {"q_x": P, "f": P, "f_x": Q}
    config = LossConfig(reference=0.1)
    value, moved = jax.value_and_grad(lambda raw: bare_values(config, raw, 0)["reference"])(raw)
    assert value == pytest.approx(KL_P_Q, abs=ROUNDING)
    assert {name for name, gradient in moved.items() if np.any(gradient)} == {"q_x"}


def test_the_mass_on_the_support_of_both_models(mesh):
    raw = {"q_x": P[None, None], "f": Q[None, None]}
    values = bare_values(LossConfig(support="teacher_top_k", top_k=1), raw, [[0]])
    assert (values["support_mass"], values["teacher_support_mass"]) == (pytest.approx(0.5), pytest.approx(0.75))


# --- Logits as they are compared ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, support",
    [((5, 8), "full"), ((8, 5), "full"), ((8, 8), "full"), ((7, 8), "student_top_k"), ((8, 7), "union_top_k")],
)
def test_rows_that_pad_a_head_are_never_compared(sizes, support, mesh):
    """Students and teachers of one tokenizer with 5 tokens; further rows of either head hold large numbers."""
    rng = np.random.default_rng(0)
    tokens, config = [[1, 4, 0]], LossConfig(beta=1.0, support=support, top_k=3, remainder="tail", reference=0.1)
    real = {view: jnp.array(rng.normal(size=(1, 3, 5)), jnp.float32) for view in VIEWS + OTHERS}
    models = tuple(model_of(size, tokens=5) for size in sizes)
    size = {view: models[view in ("f", "f_x", "f_other")].vocab_size for view in VIEWS + OTHERS}
    padded = {view: jnp.pad(x, [(0, 0), (0, 0), (0, size[view] - 5)], constant_values=50.0) for view, x in real.items()}

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total_and_values(raw, models):
        terms = objective.terms(dataclasses.replace(config, mu=1.0))
        values = token_values(terms[:3], models, 1.0, {view: raw[view] for view in VIEWS}, jnp.array(tokens))
        values |= token_values(terms[3:], models, 1.0, {view: raw[view] for view in OTHERS}, jnp.array(tokens))
        return sum(jnp.sum(value) for value in values.values()), values

    (_, plain), _ = total_and_values(real, (model_of(5), model_of(5)))
    (_, values), moved = total_and_values(padded, models)
    assert all(np.all(np.asarray(plain[name]) > 1e-3) for name in ("distill", "anchor", "retain", "reference"))
    assert close(values, plain, rtol=1e-5, atol=ROUNDING)
    assert np.any(moved["q_x"][..., :5]) and not np.any(moved["q_x"][..., 5:]) and not np.any(moved["q_c"][..., 5:])


def test_each_model_finishes_its_own_logits_and_the_temperature_divides_all(mesh):
    """The student caps, the teacher scales; the temperature comes last."""
    rng = np.random.default_rng(1)
    raw = {view: jnp.array(4 * rng.normal(size=(1, 2, 6)), jnp.float32) for view in VIEWS}
    raw |= {"q_other": raw["q_c"], "f_other": raw["f"]}
    student, teacher = model_of(6, logit_softcap=3.0), model_of(6, logit_scale=0.25)
    config = LossConfig(beta=1.0, temperature=0.7, reference=0.1)

    def logp(view):
        x = np.asarray(raw[view], np.float64)
        x = 0.25 * x if view in ("f", "f_x") else 3 * np.tanh(x / 3)
        return x / 0.7 - np.log(np.exp(x / 0.7).sum(-1, keepdims=True))

    def kl(one, two):
        return (np.exp(logp(one)) * (logp(one) - logp(two))).sum(-1)

    models = (student, teacher)
    values = bare_values(config, raw, [[0, 1]], models)
    assert close((values["distill"], values["reference"]), (kl("q_x", "f"), kl("q_x", "f_x")), rtol=1e-5)
    for anchor, expected in (("ema", kl("ema", "q_c")), ("teacher_bare", kl("f_x", "q_c"))):
        found = anchor_values(dataclasses.replace(config, anchor=anchor), raw, models)["anchor"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    retained = token_values((losses.retention_term(LossConfig(mu=1.0)),), models, 0.7, raw, None)["retain"]
    np.testing.assert_allclose(retained, kl("f", "q_c"), rtol=1e-5)
    sft = dataclasses.replace(config, temperature=1.0, divergence="cross_entropy", reference=0.0)
    chosen = bare_values(sft, {"q_x": raw["q_x"]}, [[0, 5]], models)["distill"]
    capped = 3 * np.tanh(np.asarray(raw["q_x"], np.float64) / 3)
    expected = np.log(np.exp(capped).sum(-1)) - capped[0, [0, 1], [0, 5]]
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)
