"""The decoder: its three ways of running agree, and padding, neighbours and the future do not reach a token."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.models import params as params_lib, transformer
from ctxjax.models.linear import project
from ctxjax.models.remat import POLICIES
from ctxjax.models.rope import Llama3Scaling
from ctxjax.models.transformer import ModelConfig, apply_head, head_weights
from ctxjax.sharding import make_mesh, put_batch

LLAMA31_SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
LLAMA31_8B = ModelConfig(
    vocab_size=128256, width=4096, layers=32, query_heads=32, kv_heads=8, head_dim=128, mlp_width=14336,
    rope_theta=500000.0, rope_scaling=LLAMA31_SCALING, dtype="bfloat16", remat="full",
)  # fmt: skip
LLAMA31_70B = dataclasses.replace(LLAMA31_8B, width=8192, layers=80, query_heads=64, mlp_width=28672)
VARIANTS = {
    "plain": {},
    "one_kv_head": {"kv_heads": 1},
    "nine_layers": {"layers": 9},  # deep models decode in a scan
    "all_options": {
        "tied_embeddings": True,
        "qkv_bias": True,
        "qk_norm": True,
        "rope_scaling": Llama3Scaling(4.0, 1.0, 4.0, 16),
    },
}


@functools.partial(jax.jit, static_argnums=1)
def forward(params, model, tokens, mask):
    return apply_head(transformer.forward(params, model, tokens, mask), head_weights(params, model))


def assert_close(one, two):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * max(1, np.abs(two).max()))


def logits_of(*arguments):
    return np.asarray(forward(*arguments))


@functools.partial(jax.jit, static_argnums=(1, 4))
def prefill(params, model, tokens, mask, slots):
    hidden, cache = transformer.prefill(params, model, tokens, mask)
    return apply_head(hidden, head_weights(params, model)), cache.extend(slots)


@functools.partial(jax.jit, static_argnums=1)
def decode(params, model, token, real, cache):
    hidden, cache = transformer.decode_step(transformer.prepare_for_decoding(params, model), model, token, real, cache)
    return apply_head(hidden, head_weights(params, model)), cache


@pytest.fixture
def prompts(make_prompts):
    return make_prompts(3, 3, 9)


def wider(prompts, columns):
    """The same prompts behind more padding, of nonsense ids."""
    tokens = np.pad(prompts.tokens_BxP, [(0, 0), (columns, 0)], constant_values=17)
    return tokens, np.pad(prompts.mask_BxP, [(0, 0), (columns, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_token_by_token_gives_the_logits_of_one_pass(variant, tiny_model, make_params, make_prompts, mesh):
    model = dataclasses.replace(tiny_model, **VARIANTS[variant])
    params, prompts, read = make_params(model, 0, mesh), make_prompts(0, 3, 9), 4
    tokens, mask = prompts.tokens_BxP, prompts.mask_BxP
    start = tokens.shape[1] - read
    mask[:, : start + 1] |= np.arange(start + 1) == start  # no prompt is empty
    expected = logits_of(params, model, tokens, mask)
    logits, cache = prefill(params, model, tokens[:, :start], mask[:, :start], tokens.shape[1])
    assert_close(logits[0], expected[0, start - 1])
    for column in range(start, tokens.shape[1]):
        logits, cache = decode(params, model, tokens[:, column], mask[:, column], cache)
        real = mask[:, column]
        assert_close(np.asarray(logits)[real], expected[real, column])
    assert cache.length == tokens.shape[1]
    np.testing.assert_array_equal(cache.mask_BxM, mask)


def test_a_row_that_has_ended_leaves_no_trace_in_the_cache(params, tiny_model, prompts):
    slots = prompts.tokens_BxP.shape[1] + 2
    _, cache = prefill(params, tiny_model, prompts.tokens_BxP, prompts.mask_BxP, slots)
    real = np.array([True, False, True])
    _, written = decode(params, tiny_model, np.array([5, 6, 7]), real, cache)
    _, other = decode(params, tiny_model, np.array([5, 30, 7]), real, cache)
    logits, other_logits = (
        decode(params, tiny_model, np.array([8, 8, 8]), real | True, c)[0] for c in (written, other)
    )
    np.testing.assert_array_equal(logits, other_logits)
    expected, _ = decode(params, tiny_model, np.array([8, 8, 8]), real | True, cache)
    assert_close(logits[1], expected[1])


def test_more_left_padding_changes_nothing(params, tiny_model, prompts):
    mask = prompts.mask_BxP
    narrow = logits_of(params, tiny_model, prompts.tokens_BxP, mask)
    wide = logits_of(params, tiny_model, *wider(prompts, 5))
    assert_close(wide[:, 5:][mask], narrow[mask])


def test_ids_under_the_padding_are_never_read(params, tiny_model, prompts):
    mask = prompts.mask_BxP
    assert not mask.all()
    other = np.where(mask, prompts.tokens_BxP, (prompts.tokens_BxP + 1) % 40)
    one, two = (logits_of(params, tiny_model, tokens, mask) for tokens in (prompts.tokens_BxP, other))
    np.testing.assert_array_equal(one[mask], two[mask])


def test_a_token_reaches_its_own_column_and_later_ones_but_no_earlier_one(params, tiny_model, prompts):
    tokens, changed = prompts.tokens_BxP, prompts.tokens_BxP.copy()
    changed[0, 4] = (changed[0, 4] + 1) % 40
    before, after = (logits_of(params, tiny_model, t, prompts.mask_BxP) for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    assert np.all(np.abs(before[0, 4:] - after[0, 4:]).max(axis=-1) > 1e-3)


def test_a_row_does_not_depend_on_its_neighbours_or_its_place(params, tiny_model, prompts):
    tokens, mask = prompts.tokens_BxP, prompts.mask_BxP
    expected = logits_of(params, tiny_model, tokens, mask)
    order = np.array([2, 0, 1])
    permuted = logits_of(params, tiny_model, tokens[order], mask[order])
    assert_close(permuted[mask[order]], expected[order][mask[order]])
    neighbours = np.where(np.arange(3)[:, None] == 0, tokens, 11)
    alone = logits_of(params, tiny_model, neighbours, mask)
    assert_close(alone[0], expected[0])


def test_the_order_of_tokens_matters(params, tiny_model):
    """Without positions, attention over the earlier tokens would be a sum in any order."""
    tokens = np.array([[3, 4, 5, 6], [4, 3, 5, 6], [3, 4, 5, 6]])
    logits = logits_of(params, tiny_model, tokens, np.ones_like(tokens, bool))
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 1e-3


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias", "q_norm", "k_norm"])
def test_every_optional_parameter_takes_part(name, tiny_model, make_params, prompts, mesh):
    model = dataclasses.replace(tiny_model, **VARIANTS["all_options"])
    params = make_params(model, 0, mesh)
    first = np.arange(params["layers"][name].shape[-1]) == 0  # a shift of every entry can cancel in the softmax
    changed = params | {"layers": params["layers"] | {name: params["layers"][name] + first}}
    one, two = (logits_of(p, model, prompts.tokens_BxP, prompts.mask_BxP) for p in (params, changed))
    assert np.abs(one - two).max() > 1e-3


def test_a_tied_head_is_the_embedding_transposed_and_has_no_parameter_of_its_own(tiny_model, make_params, mesh):
    tied = dataclasses.replace(tiny_model, tied_embeddings=True)
    params = make_params(tied, 0, mesh)
    assert "head" not in params and "head" in transformer.param_specs(tiny_model)
    np.testing.assert_array_equal(head_weights(params, tied), params["embedding"].T)


def test_logits_are_float32_when_the_model_computes_in_bfloat16(tiny_model, make_params, mesh):
    half = dataclasses.replace(tiny_model, dtype="bfloat16")
    params = make_params(half, 0, mesh)
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    hidden = jax.eval_shape(lambda p: transformer.forward(p, half, tokens, mask), params)
    logits = jax.eval_shape(lambda p: forward(p, half, tokens, mask), params)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_gradient_of_a_frequent_tokens_embedding_is_summed_in_float32(shape, tiny_model, make_params):
    """Thousandths that are added in bfloat16 stop growing at 2."""
    model = dataclasses.replace(tiny_model, dtype="bfloat16")
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        tokens = put_batch(np.full((8, 512), 7, np.int32), mesh)

        def total(params):
            rows_BxLxD = transformer._embed(params, model, tokens)
            assert rows_BxLxD.dtype == jnp.bfloat16
            return jnp.sum(rows_BxLxD.astype(jnp.float32)) * 1e-3

        params = make_params(model, 0, mesh)
        gradient = jax.jit(jax.grad(total))(params)["embedding"]
        assert jax.typeof(gradient) == jax.typeof(params["embedding"])
    expected = np.zeros(gradient.shape)
    expected[7] = 4.096
    np.testing.assert_allclose(gradient, expected, rtol=0.01)


@pytest.mark.slow
def test_what_layers_keep_changes_memory_and_not_the_gradient(params, tiny_model, prompts):
    """ "offload" keeps as little on the device as "full"; what goes to the host is seen on accelerators only."""

    def gradient(model):
        def loss(params):
            hidden = transformer.forward(params, model, prompts.tokens_BxP, prompts.mask_BxP)
            return jnp.sum(jnp.sin(hidden) * prompts.mask_BxP[..., None])

        program = jax.jit(jax.grad(loss)).lower(params).compile()
        return jax.device_get(program(params)), program.memory_analysis().temp_size_in_bytes

    found = {name: gradient(dataclasses.replace(tiny_model, layers=2, remat=name)) for name in POLICIES}
    expected, _ = found["none"]
    for name, (value, _) in found.items():
        for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(value)):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=name)
    memory = {name: size for name, (_, size) in found.items()}
    assert memory["full"] < memory["dots"] < memory["none"]


def test_on_cpus_the_gradient_of_a_weight_needs_no_transposed_copy_of_the_activations(mesh):
    B, L, I, O = 4, 13, 24, 88  # noqa: E741
    weights = {"up": jnp.ones((I, O))}

    def loss(weights, x_BxLxI):
        return jnp.sum(jnp.square(project(weights, "up", x_BxLxI, "embed", "mlp")))

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, jnp.ones((B, L, I))).compile().as_text()
    assert f"f32[{B * L},{O}]" in program
    assert f"f32[{O},{B * L}]" not in program and f"f32[{I},{B * L}]" not in program


def test_summaries_of_layers_start_with_the_embedding_and_end_with_the_states_of_forward(params, tiny_model, prompts):
    views = ((prompts.tokens_BxP, prompts.mask_BxP, None), (*wider(prompts, 3), None))
    summarise = jax.jit(lambda p: transformer.summarise_layers(p, tiny_model, views, lambda a, b: (a, b[:, 3:])))
    hidden, by_layer = summarise(params)
    one, two = (np.asarray(x) for x in by_layer)
    assert one.shape == (tiny_model.layers + 1, 3, 9, 32)
    real = prompts.mask_BxP
    np.testing.assert_array_equal(one[0], np.asarray(params["embedding"])[prompts.tokens_BxP])
    assert_close(one[:, real], two[:, real])
    for state, view in zip(hidden, views):
        logits = np.asarray(apply_head(state, params["head"]))
        assert_close(logits[view[1]], logits_of(params, tiny_model, *view[:2])[view[1]])
    normed = transformer.rms_norm(one[-1], params["final_norm"], tiny_model.norm_eps)
    assert_close(np.asarray(normed)[real], np.asarray(hidden[0])[real])


@pytest.mark.parametrize(
    "model, count", [(LLAMA31_8B, 8_030_261_248), (LLAMA31_70B, 70_553_706_496)], ids=["8B", "70B"]
)
def test_a_large_llama_has_its_published_size_and_traces_on_a_mesh_without_memory(model, count, mesh8):
    specs = transformer.param_specs(model)
    params = params_lib.abstract(specs, mesh8, jnp.bfloat16)
    assert params_lib.count(specs) == count
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1 and min(leaf.shape[-2:]) > 80]
    assert all(math.prod(m.sharding.shard_shape(m.shape)) * 4 == math.prod(m.shape) for m in matrices)
    inputs = [
        jax.ShapeDtypeStruct((8, 16), dtype, sharding=jax.NamedSharding(mesh8, jax.P(("data", "fsdp"))))
        for dtype in (jnp.int32, jnp.bool)
    ]
    logits = jax.eval_shape(lambda p, tokens, mask: forward(p, model, tokens, mask), params, *inputs)
    assert (logits.shape, logits.dtype) == ((8, 16, model.vocab_size), jnp.float32)


@pytest.mark.slow
def test_initial_values_follow_the_declaration_in_shape_sharding_and_spread(tiny_model, mesh8):
    specs = transformer.param_specs(tiny_model)
    values, declared = params_lib.init(specs, jax.random.key(0), mesh8), params_lib.abstract(specs, mesh8)
    for value, wanted in zip(jax.tree.leaves(values), jax.tree.leaves(declared), strict=True):
        assert value.shape == wanted.shape and value.sharding.is_equivalent_to(wanted.sharding, value.ndim)
    for name, value in values["layers"].items():
        stddev = specs["layers"][name].stddev
        if stddev is None:
            np.testing.assert_array_equal(value, np.ones(value.shape))
        else:
            assert float(value.std()) == pytest.approx(stddev, rel=0.1)
    gate, up = (np.ravel(values["layers"][name]) for name in ("gate", "up"))
    assert abs(np.corrcoef(gate, up)[0, 1]) < 0.1


def test_rotary_frequencies_fall_from_one_to_almost_one_over_theta(tiny_model):
    np.testing.assert_allclose(
        transformer.rope_frequencies(tiny_model), [1.0, 0.17782794, 0.03162278, 0.00562341], rtol=1e-5
    )


def test_llama3_scaling_keeps_short_wavelengths_stretches_long_ones_and_blends_between():
    unscaled = [500000.0 ** (-2 * i / 128) for i in range(64)]
    expected, kinds = [], []
    for frequency in unscaled:
        turns = 8192 * frequency / (2 * math.pi)  # full turns within the original context
        if turns > 4.0:
            kinds.append("kept")
            expected.append(frequency)
        elif turns < 1.0:
            kinds.append("stretched")
            expected.append(frequency / 8.0)
        else:
            kinds.append("blended")
            share = (turns - 1.0) / (4.0 - 1.0)
            expected.append(share * frequency + (1 - share) * frequency / 8.0)
    assert set(kinds) == {"kept", "blended", "stretched"}
    np.testing.assert_allclose(transformer.rope_frequencies(LLAMA31_8B), expected, rtol=1e-5)
