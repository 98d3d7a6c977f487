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
from ctxjax.types import Batch, Mean, Prompts, Rollout

T = 7
CONFIG = LossConfig(beta=0.5, mu=0.25, temperature=0.7, chunk=3)
# p = (1/2, 1/2), q = (1/4, 3/4):
P, Q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
KL_P_Q, KL_Q_P = 0.14384104, 0.13081204


@functools.partial(jax.jit, static_argnames="config")
def objective(params, frozen, config, model, batch, rollout, other_rollout):
    """(loss, parts), (gradient for the student, gradient for the teacher)."""

    def loss_of(params, frozen):
        return losses.objective(params, frozen, model, model, config, batch, rollout, other_rollout)

    return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(params, frozen)


@functools.partial(jax.jit, static_argnames=("config", "model"))
def evaluated(params, frozen, config, model, batch, rollout, other_rollout):
    return losses.objective(params, frozen, model, model, config, batch, rollout, other_rollout)


@functools.partial(jax.jit, static_argnames="model")
def response_logits(params, model, prompts, rollout):
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT], axis=1)
    hidden = transformer.forward(params, model, tokens, mask)
    columns = prompts.tokens_BxP.shape[1] - 1 + np.arange(rollout.tokens_BxT.shape[1])
    logits = jnp.einsum("bld,dv->blv", hidden[:, columns[0] : columns[-1] + 1], params["head"])
    return jnp.log(jax.nn.softmax(logits / CONFIG.temperature))


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
    """(loss, parts), gradient by whole logits and with every target held fixed as an array of numbers."""
    rollout, other = rollouts
    views = {"x": (batch.bare, rollout), "c": (batch.context, rollout), "o": (batch.other, other)}
    student, teacher = (
        {name: np.asarray(response_logits(p, tiny_model, *view)) for name, view in views.items()} for p in (params, frozen)
    )

    def kl(p, q, mask):
        return jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)) / np.sum(mask)

    def loss_of(params):
        q_x, q_c, q_o = (response_logits(params, tiny_model, *views[name]) for name in "xco")
        parts = {
            "distill": kl(q_x, teacher["c"], rollout.mask_BxT),
            "anchor": kl(student["x"], q_c, rollout.mask_BxT),
            "retain": kl(teacher["o"], q_o, other.mask_BxT),
        }
        return parts["distill"] + CONFIG.beta * parts["anchor"] + CONFIG.mu * parts["retain"], parts

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)


@pytest.fixture
def ours(params, frozen, tiny_model, batch, rollouts, mesh):
    return run(params, frozen, tiny_model, batch, rollouts, mesh)


def run(params, frozen, model, batch, rollouts, mesh, config=CONFIG):
    return jitted(config, model)(params, frozen, *put_batch((batch, *rollouts), mesh))


@functools.cache
def jitted(config, model):
    def loss_of(params, frozen, *data):
        return losses.objective(params, frozen, model, model, config, *data)

    return jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))


@functools.cache
def jitted_value(config, model):
    return jax.jit(lambda params, frozen, *data: losses.objective(params, frozen, model, model, config, *data))


def value(params, frozen, model, batch, rollouts, mesh, config=CONFIG):
    return jitted_value(config, model)(params, frozen, *put_batch((batch, *rollouts), mesh))
