"""Adapters: a tree beside the base's, joined without a copy, trained alone, and equal to merged weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import sharding
from ctxjax.distill import losses, scoring
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import Networks, WeightedBatch, objective
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.distill.train_step import StepConfig, init_state, student_params, train_step
from ctxjax.models import lora, params as params_lib, transformer
from ctxjax.models.lora import LoraConfig
from ctxjax.models.transformer import apply_head, head_weights
from ctxjax.types import Batch, Frozen

ALL = LoraConfig(rank=3, alpha=6.0, targets=lora.TARGETS)
SOME = LoraConfig(rank=2, alpha=8.0, targets=("q", "down"))
ROWS = 8


@pytest.fixture(scope="module")
def make_adapter():
    """make_adapter(model, config, mesh): an adapter that has been trained, A and B of ordinary size."""

    def make(model, config, mesh, seed=7):
        specs, rng = lora.specs(model, config), np.random.default_rng(seed)
        return jax.tree.map(
            lambda spec, place: jax.device_put(0.2 * rng.normal(size=spec.shape).astype(np.float32), place),
            specs, params_lib.shardings(specs, mesh), is_leaf=lambda node: isinstance(node, params_lib.ParamSpec),
        )  # fmt: skip

    return make


@pytest.fixture
def step_config(tiny_model):
    return StepConfig(
        model=tiny_model,
        teacher_model=tiny_model,
        sampling=SamplingConfig(max_tokens=5, eos_ids=(2, 5), pad_id=0),
        loss=LossConfig(beta=0.5, mu=1.0, chunk=4),
        optim=OptimConfig(lr=1e-2, steps=10),
        lora=ALL,
    )


@pytest.fixture
def batch(make_prompts):
    views = (make_prompts(seed, ROWS, columns) for seed, columns in ((0, 5), (1, 9), (2, 7)))
    return Batch(*views, np.arange(ROWS, dtype=np.int32))


@functools.partial(jax.jit, static_argnums=1)
def logits(params, model, prompts):
    hidden = transformer.forward(params, model, prompts.tokens_BxP, prompts.mask_BxP)
    return apply_head(hidden, head_weights(params, model))


def pointers(tree) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]


@pytest.mark.parametrize("config", [ALL, SOME], ids=["all", "some"])
def test_joined_weights_compute_what_merged_weights_compute(
    config, params, tiny_model, make_adapter, make_prompts, mesh
):
    joined = lora.join(params, make_adapter(tiny_model, config, mesh), config)
    merged = lora.merged(joined)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    data = make_prompts(0, 4, 9)
    ours, theirs, base = (np.asarray(logits(tree, tiny_model, data)) for tree in (joined, merged, params))
    np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max())
    assert np.abs(ours - base).max() > 0.1 * np.abs(base).max()


def test_the_update_of_a_weight_is_alpha_over_rank_times_the_product(params, tiny_model, make_adapter, mesh):
    adapter = make_adapter(tiny_model, SOME, mesh)
    a, b = (np.asarray(adapter["layers"][f"down_lora_{part}"][1], np.float64) for part in "ab")
    change = lora.merged(lora.join(params, adapter, SOME))["layers"]["down"][1] - params["layers"]["down"][1]
    np.testing.assert_allclose(change, 4.0 * a @ b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 9], ids=["unrolled", "scanned"])
def test_what_an_adapted_model_samples_has_the_log_probability_that_it_scores(
    layers, tiny_model, make_params, make_adapter, make_prompts, mesh8
):
    model = dataclasses.replace(tiny_model, layers=layers)
    params = lora.join(make_params(model, 0, mesh8), make_adapter(model, ALL, mesh8), ALL)
    prompts = sharding.put_batch(make_prompts(0, ROWS, 6), mesh8)
    keys = jax.random.split(jax.random.key(0), ROWS)

    @jax.jit
    def gap(params):
        rollout = sample(params, model, SamplingConfig(8, eos_ids=(2,), pad_id=0), prompts, keys)
        hidden = scoring.response_hidden(params, model, prompts, rollout)
        logprobs = jax.nn.log_softmax(apply_head(hidden, head_weights(params, model)))
        scored = jnp.sum(jnp.where(jax.nn.one_hot(rollout.tokens_BxT, model.vocab_size, dtype=bool), logprobs, 0), -1)
        return jnp.max(jnp.where(rollout.mask_BxT, jnp.abs(scored - rollout.logprobs_BxT), 0))

    assert gap(params) < 5e-5


def test_the_student_of_step_zero_is_the_teacher_bit_for_bit(params, step_config, make_prompts, mesh):
    frozen = Frozen(teacher=params, base=params)
    state = init_state(params, step_config, jax.random.key(0))
    student = student_params(state.params, frozen, step_config)
    data = make_prompts(0, 4, 9)
    assert np.abs(state.params["layers"]["q_lora_a"]).max() > 0
    np.testing.assert_array_equal(*(logits(tree, step_config.model, data) for tree in (student, params)))


@pytest.mark.slow
def test_the_base_is_held_once_and_never_moves(params, step_config, batch, mesh):
    step_config = dataclasses.replace(step_config, loss=LossConfig(chunk=4))
    frozen, places, before = Frozen(params, params), pointers(params), jax.tree.map(np.array, params)
    assert pointers(frozen.base) == pointers(frozen.teacher) == places
    state = init_state(params, step_config, jax.random.key(0))
    joined = student_params(state.params, frozen, step_config)
    assert all(joined["layers"][name] is leaf for name, leaf in params["layers"].items())
    for _ in range(2):
        state, metrics = train_step(state, frozen, sharding.put_batch(batch, mesh), step_config)
    assert metrics["logprob_gap_max"] < 5e-5 and metrics["grad_norm"] > 0
    assert np.abs(state.params["layers"]["down_lora_b"]).max() > 0
    assert pointers(params) == places
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_only_the_adapter_has_gradients_and_moments(params, step_config):
    state = init_state(params, step_config, jax.random.key(0))
    adapter = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert adapter == params_lib.count(lora.specs(step_config.model, ALL))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= 2 * adapter + 8


def rows_of(batch, config, make_rollout, mesh) -> WeightedBatch:
    batch, y, other = sharding.put_batch((batch, make_rollout(0, ROWS, 5), make_rollout(1, ROWS, 5)), mesh)
    weights = (losses.token_weights(rollout.mask_BxT, config.averaging) for rollout in (y, other))
    return WeightedBatch(batch, y, next(weights), other, next(weights))


def loss_of(trained, frozen, rows, config):
    student = student_params(trained, frozen, config)
    networks = Networks(student, frozen.teacher, None, config.model, config.teacher_model)
    return objective(networks, config.loss, rows, 0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("is_adapted", [True, False])
def test_no_gradient_of_a_frozen_head_is_made(
    is_adapted, params, step_config, batch, make_adapter, make_rollout, products, mesh
):
    """It would cost as much as the head itself, and be thrown away."""
    config = step_config if is_adapted else dataclasses.replace(step_config, lora=None)
    trained = make_adapter(config.model, ALL, mesh) if is_adapted else params
    rows, frozen = rows_of(batch, config.loss, make_rollout, mesh), Frozen(params, params)
    shapes = products(jax.grad(lambda trained: loss_of(trained, frozen, rows, config)), trained)
    assert ((1, config.model.width, config.model.vocab_size) in shapes) != is_adapted
