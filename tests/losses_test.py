"""The objective against numbers worked out by hand and against a dense program that never stops a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import losses, scoring
from ctxjax.losses import LossConfig
from ctxjax.models import transformer
from ctxjax.sharding import put_batch
from ctxjax.types import Batch, Prompts, Rollout

T = 7
CONFIG = LossConfig(beta=0.5, mu=0.25, temperature=0.7, chunk=3)
# p = (1/2, 1/2), q = (1/4, 3/4):
P, Q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
KL_P_Q, KL_Q_P = 0.14384104, 0.13081204


@functools.cache
def program(model, config, gradient):
    """The objective of (params, frozen, batch, rollout, other_rollout), with both models' gradients if wanted."""

    def objective(params, frozen, *data):
        return losses.objective(params, frozen, model, model, config, *data)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True) if gradient else objective)


def value(params, frozen, model, batch, rollouts, config=CONFIG):
    """(loss, parts)."""
    return program(model, config, False)(params, frozen, *put_batch((batch, *rollouts), jax.sharding.get_mesh()))


def gradient(params, frozen, model, batch, rollouts):
    """(loss, parts), (student's gradient, teacher's gradient)."""
    return program(model, CONFIG, True)(params, frozen, *put_batch((batch, *rollouts), jax.sharding.get_mesh()))


def response_logprobs(params, model, prompts, rollout):
    """log p(. | prompt, y<t) at CONFIG's temperature, from one pass over everything: logits whole, nothing reused."""
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT], axis=1)
    logits = transformer.forward(params, model, tokens, mask) @ transformer.head_weights(params, model)
    return jnp.log(jax.nn.softmax(logits[:, -T - 1 : -1] / CONFIG.temperature))


@pytest.fixture
def batch(make_prompts) -> Batch:
    return Batch(make_prompts(0, 4, 5), make_prompts(1, 4, 8), make_prompts(2, 2, 6), np.arange(4, dtype=np.int32))


@pytest.fixture
def rollouts(make_rollout) -> tuple[Rollout, Rollout]:
    return make_rollout(3, 4, T), make_rollout(4, 2, T)


# --- The three terms per token ---


def test_distillation_is_the_divergence_of_the_student_from_the_teacher_in_the_named_direction():
    assert losses.distillation(LossConfig(), student=P, teacher=Q) == pytest.approx(KL_P_Q, abs=1e-6)
    forward = LossConfig(divergence="forward_kl")
    assert losses.distillation(forward, student=P, teacher=Q) == pytest.approx(KL_Q_P, abs=1e-6)


def test_anchoring_weighs_by_the_bare_student():
    assert losses.anchoring(bare=P, context=Q) == pytest.approx(KL_P_Q, abs=1e-6)
    assert losses.anchoring(bare=Q, context=P) == pytest.approx(KL_Q_P, abs=1e-6)


def test_retention_weighs_by_the_teacher():
    assert losses.retention(student=P, teacher=Q) == pytest.approx(KL_Q_P, abs=1e-6)
    assert losses.retention(student=Q, teacher=P) == pytest.approx(KL_P_Q, abs=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_distillation_moves_the_student_and_never_the_teacher(divergence):
    config = LossConfig(divergence=divergence)
    student, teacher = jax.grad(lambda s, t: losses.distillation(config, s, t), argnums=(0, 1))(P, Q)
    assert np.all(np.asarray(student) != 0) and not np.any(teacher)


def test_anchoring_moves_the_context_view_and_never_the_bare_one():
    bare, context = jax.grad(lambda b, c: losses.anchoring(bare=b, context=c), argnums=(0, 1))(P, Q)
    assert not np.any(bare)
    np.testing.assert_allclose(context, [0.25 - 0.5, 0.75 - 0.5], atol=1e-6)  # q_c - q_x


def test_retention_moves_the_student_and_never_the_teacher():
    student, teacher = jax.grad(lambda s, t: losses.retention(s, t), argnums=(0, 1))(P, Q)
    assert not np.any(teacher)
    np.testing.assert_allclose(student, [0.5 - 0.25, 0.5 - 0.75], atol=1e-6)


# --- The objective as a whole ---


@pytest.fixture
def dense(params, frozen, tiny_model, batch, rollouts, mesh):
    """((loss, terms), gradient) of the equations, where a fixed target is an array of numbers: no stop_gradient."""
    batch, rollout, other = put_batch((batch, *rollouts), mesh)
    views = {"x": (batch.bare, rollout), "c": (batch.context, rollout), "o": (batch.other, other)}
    logprobs = jax.jit(lambda params: {v: response_logprobs(params, tiny_model, *views[v]) for v in views})
    fixed, teacher = logprobs(params), logprobs(frozen)

    def kl(p, q, mask):
        return jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)) / jnp.sum(mask)

    def objective(params):
        student = logprobs(params)
        terms = {
            "distill": kl(student["x"], teacher["c"], rollout.mask_BxT),
            "anchor": kl(fixed["x"], student["c"], rollout.mask_BxT),
            "retain": kl(teacher["o"], student["o"], other.mask_BxT),
        }
        return terms["distill"] + CONFIG.beta * terms["anchor"] + CONFIG.mu * terms["retain"], terms

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)


def close(one, two, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)
    return True


def test_value_and_gradient_are_those_of_the_equations(params, frozen, tiny_model, batch, rollouts, dense):
    """Chunks, heads, temperature, shift, denominators, and which path of which term carries gradient, all at once."""
    (loss, parts), (student, _) = gradient(params, frozen, tiny_model, batch, rollouts)
    (expected_loss, terms), expected = dense
    assert min(terms.values()) > 0.1
    assert {name: float(parts[name].value) for name in terms} == pytest.approx(jax.tree.map(float, terms), rel=1e-4)
    assert loss == pytest.approx(float(expected_loss), rel=1e-4)
    assert close(student, expected, rtol=1e-3, atol=1e-5)


def test_the_teacher_receives_exactly_no_gradient(params, frozen, tiny_model, batch, rollouts):
    _, (_, teacher) = gradient(params, frozen, tiny_model, batch, rollouts)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(teacher))


def test_without_context_and_with_the_student_as_its_own_teacher_there_is_nothing_to_learn(
    params, tiny_model, batch, rollouts
):
    bare = batch.bare
    same = Prompts(np.pad(bare.tokens_BxP, [(0, 0), (3, 0)]), np.pad(bare.mask_BxP, [(0, 0), (3, 0)]))
    (loss, parts), (student, _) = gradient(params, params, tiny_model, batch.replace(context=same), rollouts)
    assert loss == pytest.approx(0, abs=1e-5) and parts["top1_agreement"].value == 1
    assert close(student, jax.tree.map(jnp.zeros_like, params), atol=1e-4)


def test_what_masks_hide_never_counts(params, frozen, tiny_model, batch, rollouts):
    """Ids under the padding of prompts and responses, and their log-probabilities, are replaced by others."""

    def other_ids(tokens, mask):
        return np.where(mask, tokens, (tokens + 19) % 40).astype(np.int32)

    def disguised(tree):
        if isinstance(tree, Prompts):
            return tree.replace(tokens_BxP=other_ids(tree.tokens_BxP, tree.mask_BxP))
        hidden = np.where(tree.mask_BxT, tree.logprobs_BxT, 7.0).astype(np.float32)
        return tree.replace(tokens_BxT=other_ids(tree.tokens_BxT, tree.mask_BxT), logprobs_BxT=hidden)

    views = {name: disguised(getattr(batch, name)) for name in ("bare", "context", "other")}
    plain = gradient(params, frozen, tiny_model, batch, rollouts)
    disguise = gradient(params, frozen, tiny_model, batch.replace(**views), tuple(map(disguised, rollouts)))
    assert close(plain, disguise, rtol=0, atol=0)


def test_the_end_token_is_trained(params, frozen, tiny_model, batch, rollouts):
    rollout, other = rollouts
    length = rollout.mask_BxT.sum(axis=1)
    cut = rollout.replace(mask_BxT=np.arange(T) < length[:, None] - 1)
    loss, parts = value(params, frozen, tiny_model, batch, rollouts)
    cut_loss, cut_parts = value(params, frozen, tiny_model, batch, (cut, other))
    assert parts["distill"].count == cut_parts["distill"].count + 4
    assert abs(loss - cut_loss) > 1e-3 and parts["anchor"].total > cut_parts["anchor"].total


def test_terms_count_response_tokens_and_share_their_denominator(params, frozen, tiny_model, batch, rollouts):
    _, parts = value(params, frozen, tiny_model, batch, rollouts)
    rollout, other = rollouts
    assert parts["distill"].count == parts["anchor"].count == rollout.mask_BxT.sum()
    assert parts["retain"].count == other.mask_BxT.sum()


@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean"])
def test_parts_of_a_batch_add_up_to_the_whole(averaging, params, frozen, tiny_model, batch, rollouts):
    config = dataclasses.replace(CONFIG, averaging=averaging)
    rollout, other = rollouts

    def terms(rows):
        part = rollout.replace(mask_BxT=rollout.mask_BxT & np.isin(np.arange(4), rows)[:, None])
        _, parts = value(params, frozen, tiny_model, batch, (part, other), config)
        return parts["distill"], parts["anchor"]

    for whole, one, two in zip(terms([0, 1, 2, 3]), terms([0]), terms([1, 2, 3])):
        added = one + two
        assert (added.count, added.value) == (whole.count, pytest.approx(float(whole.value), rel=1e-5))


def test_a_batch_without_any_response_token_has_loss_and_gradient_zero(params, frozen, tiny_model, batch, rollouts):
    empty = tuple(rollout.replace(mask_BxT=np.zeros_like(rollout.mask_BxT)) for rollout in rollouts)
    (loss, _), (student, _) = gradient(params, frozen, tiny_model, batch, empty)
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(student))


def test_terms_with_weight_zero_are_not_computed(params, frozen, tiny_model, batch, rollouts):
    plain = dataclasses.replace(CONFIG, beta=0.0, mu=0.0)
    loss, parts = value(params, frozen, tiny_model, batch.replace(other=None), (rollouts[0], None), plain)
    _, full = value(params, frozen, tiny_model, batch, rollouts)
    assert not {"anchor", "retain"} & set(parts)
    assert loss == pytest.approx(float(full["distill"].value), rel=1e-5)


# --- Averages and chunks ---

VALUES = jnp.array([[1.0, 2.0, 3.0], [5.0, 90.0, 90.0], [jnp.nan, jnp.nan, jnp.nan]])
MASK = jnp.array([[True, True, True], [True, False, False], [False, False, False]])


@pytest.mark.parametrize("averaging, total, count", [("token_mean", 11.0, 4.0), ("sequence_mean", 7.0, 2.0)])
def test_averages_by_hand_where_one_row_is_empty(averaging, total, count):
    mean = losses.average(VALUES, MASK, averaging)
    assert (mean.total, mean.count) == (total, count)
    gradient = jax.grad(lambda values: losses.average(values, MASK, averaging).value)(VALUES)
    weights = {"token_mean": [[0.25, 0.25, 0.25], [0.25, 0, 0]], "sequence_mean": [[1 / 6, 1 / 6, 1 / 6], [0.5, 0, 0]]}
    np.testing.assert_allclose(gradient, [*weights[averaging], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean"])
def test_the_average_of_nothing_is_zero(averaging):
    mean = losses.average(VALUES, jnp.zeros_like(MASK), averaging)
    assert (mean.count, mean.value) == (0, 0)


@pytest.mark.parametrize("chunk", [1, 3, T, 100])
def test_chunks_change_neither_value_nor_gradient(chunk):
    a, b = jax.random.normal(jax.random.key(0), (2, 2, T, 5))
    weight = jax.random.normal(jax.random.key(1), (2, T))

    def function(a, b):
        return {"product": jnp.sum(a * jnp.sin(b), axis=-1), "larger": jnp.sum(a, -1) > jnp.sum(b, -1)}

    def total(a, b, chunk):
        out = scoring.over_token_chunks(function, chunk, a, b) if chunk else function(a, b)
        assert out["product"].shape == out["larger"].shape == (2, T)
        return jnp.sum(weight * out["product"]), out

    chunked, plain = (jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(a, b, c) for c in (chunk, None))
    assert close(chunked, plain, rtol=1e-5, atol=1e-6)


def test_the_loss_of_given_responses_is_their_mean_negative_log_probability(params, tiny_model, batch, rollouts, mesh):
    prompts, responses = put_batch((batch.bare, rollouts[0]), mesh)
    untempered = jax.jit(lambda p: response_logprobs(p, tiny_model, prompts, responses) * CONFIG.temperature)(params)
    logp = np.asarray(jax.nn.log_softmax(untempered))
    tokens, mask = rollouts[0].tokens_BxT, rollouts[0].mask_BxT
    expected = -np.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0][mask].mean()
    mean = jax.jit(lambda p: losses.next_token_loss(p, tiny_model, prompts, responses, 3))(params)
    assert (mean.count, mean.value) == (mask.sum(), pytest.approx(expected, rel=1e-4))
