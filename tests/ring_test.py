"""Layers with a window keep as many columns as it has, and nothing but the memory tells."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import masks, rng
from ctxjax.distill import sampling, scoring
from ctxjax.distill.sampling import SamplingConfig, draw_token, sample
from ctxjax.models import params as params_lib, ring, transformer
from ctxjax.models.layer import Segment, segments
from ctxjax.models.transformer import LayerKind
from ctxjax.sharding import make_mesh, put_batch, replicate
from ctxjax.types import Rollout

PROMPT = 7
FULL = LayerKind()


def local(window: int) -> LayerKind:
    return LayerKind(window=window, rope_theta=50.0)


# --- The order of a ring ---


@pytest.mark.parametrize("window", [1, 3, 4, 7])
def test_every_slot_holds_the_column_that_is_said(window):
    """Columns are written one after the other, after a prompt of any length."""
    for length in range(1, 12):
        slots = min(12, window)
        held = np.asarray(ring.keep_last(jnp.arange(length)[:, None], window))[:, 0]
        assert held.size == min(length, window)
        held = np.pad(held, (0, slots - held.size), constant_values=-1)
        for column in range(length, 12):
            held[column % slots] = column
            real = np.arange(12)[None] % 3 != np.array([[0], [1]])
            real_BxS, columns_S = ring.find_keys(jnp.asarray(real), jnp.int32(column), slots)
            written = held >= 0
            np.testing.assert_array_equal(np.asarray(columns_S) >= 0, written)
            np.testing.assert_array_equal(columns_S[written], held[written])
            np.testing.assert_array_equal(real_BxS, real[:, held] & written)


def test_a_layer_without_a_window_keeps_all_columns():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    assert ring.keep_last(x, 0) is x


def test_segments_are_runs_of_one_window(tiny_model):
    def found(*windows):
        kinds = tuple(LayerKind(window=window) for window in windows)
        return segments(dataclasses.replace(tiny_model, layers=len(kinds), layer_kinds=kinds))

    assert found(3, 3, 0, 3) == [Segment(3, range(2)), Segment(0, range(2, 3)), Segment(3, range(3, 4))]
    assert found(5, 5) == [Segment(5, range(2))] and found(0, 0) == segments(tiny_model) == [Segment(0, range(2))]
    rotary = (LayerKind(rotary=False), FULL)  # other differences do not matter
    assert segments(dataclasses.replace(tiny_model, layer_kinds=rotary)) == [Segment(0, range(2))]


def test_a_mask_takes_keys_in_any_order():
    random, columns = np.random.default_rng(0), jnp.array([[4], [2]])
    real, order = random.random((2, 6)) < 0.7, random.permutation(6)
    for window in (None, 1, 3):
        expected = masks.causal(jnp.asarray(real), columns, window)
        found = masks.causal(jnp.asarray(real[:, order]), columns, window, jnp.asarray(order))
        np.testing.assert_array_equal(found, expected[..., order])


# --- The sampler ---


@functools.partial(jax.jit, static_argnums=(1, 2))
def sampled(params, model, config: SamplingConfig, prompts, ids) -> Rollout:
    return sample(params, model, config, prompts, rng.row_keys(jax.random.key(5), ids))


@functools.partial(jax.jit, static_argnums=(1, 2))
def read_whole(params, model, config: SamplingConfig, prompts, ids, rollout):
    """(tokens, log-probabilities) that the random numbers give if one pass reads every text whole, without a cache."""
    hidden = scoring.response_hidden(params, model, prompts, rollout)
    logits = transformer.apply_head(hidden, transformer.head_weights(params, model))
    keys = rng.sample_keys(rng.row_keys(jax.random.key(5), ids), config.samples)
    logits, uniforms = replicate((logits, rng.token_uniforms(keys, config.max_tokens)))
    return jax.vmap(lambda logits, u: draw_token(logits, config, u), in_axes=1, out_axes=1)(logits, uniforms)


# Rows end, and loops at columns 32, 64 and 70 of the response, if that long. The prompts have 7 columns.
ENDS = SamplingConfig(max_tokens=40, eos_ids=(2, 5), pad_id=0, temperature=0.8)
LONG = dataclasses.replace(ENDS, max_tokens=70, eos_ids=(2,))
GREEDY = dataclasses.replace(ENDS, temperature=0.0)
TWICE = dataclasses.replace(ENDS, samples=2, eos_ids=(2, 5, 11, 17))
GEMMA = {"post_norms": True, "norm_plus_one": True, "qk_norm": True, "tied_embeddings": True}
ONE, TWO, EIGHT = (1, 1, 1), (1, 2, 1), (2, 2, 2)
# What the windows are -> (kinds that repeat, layers, sampling, columns of the prefix, mesh).
CASES = {
    "shorter than the prompt, or wraps in the first loop": ((local(4), local(20)), 2, GREEDY, 0, ONE),
    "grows, then wraps": ((local(50), FULL), 2, LONG, 0, TWO),
    "as long as a cache; longer than all": ((local(38), local(39), local(200), local(1)), 4, ENDS, 0, ONE),
    "two of three, behind a prefix": ((local(6), local(25), FULL), 3, TWICE, 13, ONE),
    "two of three, on a mesh": ((local(6), local(6), FULL), 3, TWICE, 3, EIGHT),
    "two of three, scanned": ((local(6), local(6), FULL), 9, GREEDY, 13, TWO),
    "in all layers, scanned": ((local(36),), 9, dataclasses.replace(TWICE, eos_ids=(2,)), 40, ONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_reading_the_whole_text(case, tiny_model, make_params, make_prompts, monkeypatch):
    kinds, layers, config, C, shape = CASES[case]
    model = dataclasses.replace(tiny_model, **GEMMA, layers=layers, layer_kinds=kinds * (layers // len(kinds)))
    rows = 24 // config.samples
    prompts = make_prompts(1, rows, PROMPT)
    prompts = prompts.replace(prefix_C=np.random.default_rng(C).integers(6, 40, C, dtype=np.int32) if C else None)
    ids, devices = np.arange(rows) * 7, jax.devices()[: np.prod(shape)]
    mesh = make_mesh(*shape, devices=devices)
    # Rows that have ended leave the batch when three of four rows of a device are left.
    monkeypatch.setattr(sampling, "row_limits", lambda rows, max_tokens: [rows * 3 // 4, 0])
    with jax.set_mesh(mesh):
        rollout = jax.device_get(sampled(make_params(model, 0, mesh), model, config, *put_batch((prompts, ids), mesh)))
    repeated = jax.tree.map(lambda x: np.repeat(x, config.samples, axis=0), prompts.replace(prefix_C=None))
    repeated = repeated.replace(prefix_C=prompts.prefix_C)
    mesh = make_mesh(devices=devices[:1])
    with jax.set_mesh(mesh):
        batch = put_batch((repeated, ids, rollout), mesh)
        tokens, logprobs = jax.device_get(read_whole(make_params(model, 0, mesh), model, config, *batch))
    real = rollout.mask_BxT
    is_full = real[:, -1].reshape(shape[0] * shape[1], -1)  # by device
    assert is_full.any() and is_full.sum(axis=1).max() < is_full.shape[1] * 3 // 4, real.sum(axis=1)
    np.testing.assert_array_equal(rollout.tokens_BxT[real], tokens[real])
    expected = logprobs[real]
    np.testing.assert_allclose(rollout.logprobs_BxT[real], expected, rtol=0, atol=3e-5 * np.abs(expected).max())


# --- What is saved ---


def begun(model, config, mesh, make_prompts, columns: int, C: int = 0, rows: int = 4):
    """The abstract cache after the prompts."""
    params = params_lib.abstract(transformer.param_specs(model), mesh)
    prompts = make_prompts(0, rows, columns).replace(prefix_C=np.zeros(C, np.int32) if C else None)
    batch = put_batch((prompts, np.arange(rows)), mesh)

    def begin(params, prompts, ids):
        weights = sampling.prepare(params, model, config)
        return sampling.begin(params, weights, model, config, prompts, rng.row_keys(jax.random.key(5), ids)).cache

    return jax.eval_shape(begin, params, *batch)


@pytest.mark.parametrize("layers", [3, 9])  # unrolled and scanned
def test_a_window_has_as_many_slots_as_columns(layers, tiny_model, make_prompts, mesh):
    kinds = (local(6), local(6), FULL) * (layers // 3)
    model = dataclasses.replace(tiny_model, layers=layers, layer_kinds=kinds)
    cache = begun(model, ENDS, mesh, make_prompts, 30, C=20)
    parts = [((), 6), ((), 6), ((), 0)] if layers == 3 else [((2,), 6), ((), 0)] * 3
    for one, M in ((cache, 30), (jax.eval_shape(lambda cache: cache.extend(50), cache), 50)):
        assert [x.shape for x in one.keys] == [(*n, 4, 2, 8, window or M) for n, window in parts]
        assert [x.shape for x in one.values] == [(*n, 4, 2, window or M, 8) for n, window in parts]
        assert [x.keys.shape for x in one.prefix] == [(*n, 2, 5 if window else 20, 8) for n, window in parts]
        assert one.mask_BxM.shape == (4, M) and one.prefix_length == 20


def test_a_ring_grows_up_to_its_window(tiny_model, make_prompts, mesh):
    model = dataclasses.replace(tiny_model, layer_kinds=(local(20), local(4)))
    cache = begun(model, ENDS, mesh, make_prompts, 10)
    sizes = [[x.shape[-1] for x in jax.eval_shape(lambda c, n=n: c.extend(n), cache).keys] for n in (10, 15, 20, 40)]
    assert sizes == [[10, 4], [15, 4], [20, 4], [20, 4]]


def test_reading_the_prompts_never_stacks_all_columns(tiny_model, make_prompts, mesh):
    def stacks(window):
        model = dataclasses.replace(tiny_model, layers=9, layer_kinds=(local(window),) * 9)
        params = params_lib.abstract(transformer.param_specs(model), mesh)
        prompts = put_batch(make_prompts(0, 4, 61), mesh)
        read = jax.make_jaxpr(lambda p, t, m: transformer.prefill(p, model, t, m))
        program = re.sub(r"@\([a-z,]*\)|@[a-z]*", "", str(read(params, prompts.tokens_BxP, prompts.mask_BxP)))
        return [f"[9,4,2,{columns},8]" in program for columns in (61, 16)]

    assert stacks(16) == [False, True] and stacks(61) == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 9])  # unrolled and scanned
def test_memory_does_not_grow_with_the_context(layers, tiny_model, make_prompts, mesh):
    """Temporaries of the whole sampler, in caches of a layer. Keys are wider than all else of a token."""
    columns, rows, window = 1024, 8, 16
    sizes = {"width": 16, "query_heads": 2, "kv_heads": 2, "head_dim": 32, "mlp_width": 16, "layers": layers}
    one = 2 * rows * columns * 2 * 32 * 4

    def measure(window):
        model = dataclasses.replace(tiny_model, **sizes, layer_kinds=(LayerKind(window=window),) * layers)
        params = params_lib.abstract(transformer.param_specs(model), mesh)
        batch = put_batch((make_prompts(0, rows, columns), np.arange(rows)), mesh)
        config = dataclasses.replace(ENDS, max_tokens=8)
        return sampled.lower(params, model, config, *batch).compile().memory_analysis().temp_size_in_bytes / one

    # The rest are the activations of the prompts; with all columns in every cache it is 5.4 and 13.7.
    assert measure(window) < 4.5 < 8 < measure(0)
