"""Windows, rotary bases and the options of a layer: the model gives what a dense one gives, in numpy, row by row."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import masks
from ctxjax.models import attention, transformer
from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.rope import Llama3Scaling
from ctxjax.sharding import put_batch
from ctxjax.types import PrefixKV

ROWS, COLUMNS, READ = 3, 12, 8  # decoding starts after READ columns
LOCAL, GLOBAL = LayerKind(window=3, rope_theta=50.0), LayerKind()
VARIANTS = {
    "window": {"layer_kinds": (LayerKind(window=4),) * 2},
    "window_of_one": {"layer_kinds": (LayerKind(window=1), GLOBAL)},
    "windows_differ": {"layer_kinds": (LayerKind(window=3), LayerKind(window=7))},
    "window_and_base_differ": {"layer_kinds": (LOCAL, GLOBAL), "rope_scaling": Llama3Scaling(4.0, 1.0, 4.0, 16)},
    "one_layer_without_rotary": {"layer_kinds": (LayerKind(rotary=False), GLOBAL)},
    "no_rotary": {"layer_kinds": (LayerKind(rotary=False),) * 2},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "norm_plus_one": {"norm_plus_one": True, "qk_norm": True},
    "embedding_scale": {"embedding_scale": 32**0.5},
    "query_scale": {"query_scale": 0.2},
    "post_norms_only": {"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True},
    "pre_and_post_norms": {"post_norms": True},
}
GEMMA = {"post_norms": True, "norm_plus_one": True, "qk_norm": True, "activation": "gelu_tanh", "tied_embeddings": True}
MIXED = GEMMA | {"embedding_scale": 32**0.5, "layer_kinds": (LOCAL, GLOBAL)}
DEEP = MIXED | {"layers": 9, "layer_kinds": (LOCAL, LOCAL, GLOBAL) * 3}  # decodes in a scan


def dense_states(params, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Final hidden states [L, D] of one row without padding, all of it written out, in float64."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    L, G, Dh = len(tokens), config.query_heads // config.kv_heads, config.head_dim
    place = np.arange(L)

    def norm(x, scale):
        scale = 1 + scale if config.norm_plus_one else scale
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def turn(x, frequencies):
        pairs = x[..., : Dh // 2] + 1j * x[..., Dh // 2 :]
        pairs = pairs * np.exp(1j * np.outer(place, frequencies))[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def activation(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = weights["embedding"][tokens] * config.embedding_scale
    for index, kind in enumerate(config.layer_kinds or [GLOBAL] * config.layers):
        w = {name: value[index] for name, value in weights["layers"].items()}
        h = norm(x, w["attention_norm"]) if config.pre_norms else x
        q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]
        if config.joint_qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        q, k, v = (x.reshape(L, -1, Dh) for x in (q, k, v))
        if config.qk_norm and not config.joint_qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        if kind.rotary:
            if kind.rope_theta:
                frequencies = kind.rope_theta ** (-np.arange(0, Dh, 2) / Dh)
            else:
                frequencies = np.asarray(transformer.rope_frequencies(config))
            q, k = turn(q, frequencies), turn(k, frequencies)
        scores = np.einsum("lhd,mhd->hlm", q, np.repeat(k, G, axis=1)) * (config.query_scale or Dh**-0.5)
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= (kind.window or L))
        scores = np.exp(np.where(hidden, -np.inf, scores - scores.max(axis=-1, keepdims=True)))
        read = np.einsum("hlm,mhd->lhd", scores / scores.sum(axis=-1, keepdims=True), np.repeat(v, G, axis=1))
        out = read.reshape(L, -1) @ w["o"]
        x = x + (norm(out, w["attention_post_norm"]) if config.post_norms else out)
        h = norm(x, w["mlp_norm"]) if config.pre_norms else x
        out = (activation(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        x = x + (norm(out, w["mlp_post_norm"]) if config.post_norms else out)
    return norm(x, weights["final_norm"])


@functools.partial(jax.jit, static_argnums=1)
def forward(params, config, tokens, mask, prefix_C):
    return transformer.forward(params, config, tokens, mask, transformer.prefix_kv(params, config, prefix_C))


@functools.partial(jax.jit, static_argnums=1)
def decode(params, config, tokens, mask, prefix_C):
    """Hidden states of columns READ-1 and later: of the prompt's last column, then token by token."""
    prefix = transformer.prefix_kv(params, config, prefix_C)
    hidden, cache = transformer.prefill(params, config, tokens[:, :READ], mask[:, :READ], prefix)
    weights, states, cache = transformer.prepare_for_decoding(params, config), [hidden], cache.extend(COLUMNS)
    for column in range(READ, COLUMNS):
        hidden, cache = transformer.decode_step(weights, config, tokens[:, column], mask[:, column], cache)
        states.append(hidden)
    return jnp.stack(states, axis=1)


@pytest.fixture
def make_rows(make_prompts):
    """make_rows(C, mesh): tokens and mask of left-padded rows, and a prefix of C tokens or None."""

    def make(C, mesh, rows=ROWS):
        prompts = make_prompts(1, rows, COLUMNS)
        prefix_C = np.random.default_rng(C).integers(0, 40, C, dtype=np.int32) if C else None
        tokens, mask, prefix_C = dataclasses.astuple(put_batch(prompts.replace(prefix_C=prefix_C), mesh))
        mask |= np.arange(COLUMNS) == READ - 1  # decoding wants a token in every prompt
        mask = jnp.maximum.accumulate(mask, axis=1)
        return tokens, mask, prefix_C

    return make


def assert_dense(states, params, config, tokens, mask, prefix_C, first=0):
    """``states`` are those of columns ``first`` and later."""
    tokens, mask, states = (np.asarray(x) for x in (tokens, mask, states))
    head = [] if prefix_C is None else np.asarray(prefix_C).tolist()
    for row_tokens, real, row_states in zip(tokens, mask, states):
        expected = dense_states(params, config, head + row_tokens[real].tolist())[len(head) :]
        ours = row_states[real[first:]]
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(ours, expected[-len(ours) :], rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("C", [0, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_pass_is_the_dense_model(variant, C, tiny_model, make_params, make_rows, mesh):
    config = dataclasses.replace(tiny_model, **VARIANTS[variant])
    params, rows = make_params(config, 0, mesh), make_rows(C, mesh)
    assert_dense(forward(params, config, *rows), params, config, *rows)


@pytest.mark.slow
@pytest.mark.parametrize("C", [0, 5])
@pytest.mark.parametrize("change", [VARIANTS["window"], MIXED, DEEP], ids=["window", "mixed", "deep"])
def test_decoding_is_the_dense_model(change, C, tiny_model, make_params, make_rows, mesh):
    config = dataclasses.replace(tiny_model, **change)
    params, rows = make_params(config, 0, mesh), make_rows(C, mesh)
    assert_dense(decode(params, config, *rows), params, config, *rows, first=READ - 1)


@pytest.mark.slow
@pytest.mark.parametrize("change", [MIXED, DEEP, VARIANTS["post_norms_only"]], ids=["mixed", "deep", "joint_norm"])
def test_a_mesh_computes_the_same(change, tiny_model, make_params, make_rows, mesh8):
    config = dataclasses.replace(tiny_model, **change)
    params, rows = make_params(config, 0, mesh8), make_rows(13, mesh8, rows=4)
    assert_dense(forward(params, config, *rows), params, config, *rows)
    assert_dense(decode(params, config, *rows), params, config, *rows, first=READ - 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_half_precision_model_stays_in_half_precision(variant, tiny_model, make_params, make_rows, mesh):
    config = dataclasses.replace(tiny_model, **VARIANTS[variant], dtype="bfloat16")
    params, rows = make_params(config, 0, mesh), make_rows(5, mesh)
    for run in (forward, decode):
        assert jax.eval_shape(lambda *a, run=run: run(a[0], config, *a[1:]), params, *rows).dtype == jnp.bfloat16


def test_windows_hold_in_chunks_of_columns(tiny_model, make_params, make_rows, mesh, monkeypatch):
    monkeypatch.setitem(attention.CHUNK_SCORES, "cpu", ROWS * 4 * 17 * 5)  # five columns of H = 4 heads at a time
    config = dataclasses.replace(tiny_model, **MIXED, norm_eps=2e-5)  # compiled anew
    params, rows = make_params(config, 0, mesh), make_rows(5, mesh)
    assert "length=3" in str(forward.trace(params, config, *rows).jaxpr)
    assert_dense(forward(params, config, *rows), params, config, *rows)


@pytest.mark.slow
def test_recomputing_layers_of_mixed_kinds_does_not_change_the_gradient(tiny_model, make_params, make_rows, mesh):
    rows = _, mask, _ = make_rows(5, mesh)
    params = make_params(dataclasses.replace(tiny_model, **MIXED), 0, mesh)

    def gradient(remat):
        def loss(params):
            states = forward(params, dataclasses.replace(tiny_model, **MIXED, remat=remat), *rows)
            return jnp.sum(jnp.where(mask[..., None], jnp.sin(states), 0))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for one, two in zip(gradient("none"), gradient("full")):
        assert np.abs(one).max() > 1e-3
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_views_are_summarised_by_the_layers_of_their_kind(tiny_model, make_params, make_rows, mesh):
    config = dataclasses.replace(tiny_model, **MIXED)
    params, (tokens, mask, _) = make_params(config, 0, mesh), make_rows(0, mesh)
    views = ((tokens, mask, None), (tokens[:, ::-1], jnp.ones_like(mask), None))
    summarise = jax.jit(lambda p: transformer.summarise_layers(p, config, views, lambda a, b: (a, b)))
    hidden, (one, _) = summarise(params)
    for states, view in zip(hidden, views):
        assert_dense(states, params, config, *view)
    np.testing.assert_allclose(one[0], np.asarray(params["embedding"])[tokens] * 32**0.5, rtol=1e-6)


def test_layers_that_are_alike_carry_no_kinds(tiny_model, make_params, make_rows, mesh):
    """Programs are those of a model without kinds; a window that all layers have is a constant of the program."""
    params, rows = make_params(tiny_model, 0, mesh), make_rows(5, mesh)

    def carried(kinds):
        jaxpr = forward.trace(params, dataclasses.replace(tiny_model, layer_kinds=kinds), *rows).jaxpr
        return str(jaxpr), str(jaxpr).count("i32[2]")

    plain, count = carried(())
    assert count == 0 and carried((GLOBAL,) * 2) == (plain, 0)
    assert carried((LayerKind(window=4),) * 2)[1] == 0
    assert carried((LayerKind(window=4), GLOBAL))[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_kinds": (GLOBAL,)}, "layer_kinds has 1 entries for 2 layers; give one each"),
        ({"layer_kinds": (LayerKind(window=-1), GLOBAL)}, r"layer_kinds has the windows \[-1, 0\]; use tokens above 0"),
        ({"activation": "relu"}, "activation = 'relu' is not known; choose from silu, gelu_tanh"),
        ({"attention": "auto"}, "attention = 'auto' is not known; choose from reference, splash, cudnn"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(change, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_model, **change)


# --- What a window saves ---


def read_in_window(q, k, v, prefix, real, size: int, first: int | None = None):
    """``attention`` of queries in all columns, or of one in column ``first``."""
    columns = jnp.arange(k.shape[2])[None] if first is None else jnp.full((1, 1), first)
    own = masks.positions(real) if first is None else masks.positions(real)[:, first : first + 1]
    window = attention.Window(size, own + (prefix.keys.shape[-2] if prefix else 0))
    return attention.attention(q, k, v, real, columns, prefix, window)


def make_reads(L: int, C: int, M: int, mesh, rows=2, heads=2, kv_heads=1, width=8):
    """Queries [rows, heads, L, width], M keys and values, a prefix of C keys or None, and a mask."""
    random = np.random.default_rng(L + C)
    q, k, v = (
        random.normal(size=(rows, n, m, width)).astype(np.float32)
        for n, m in ((heads, L), (kv_heads, M), (kv_heads, M))
    )
    real = np.arange(M)[None] >= np.array([[0], [M // 3]])
    prefix = (
        PrefixKV(*(jnp.asarray(random.normal(size=(kv_heads, C, width)), jnp.float32) for _ in range(2))) if C else None
    )
    return *put_batch((q, k, v), mesh), prefix, *put_batch((real,), mesh)


def read_densely(q, k, v, prefix, real, size: int):
    """The same, each row and column with all its keys next to each other."""
    (B, _, L, Dh), C = q.shape, prefix.keys.shape[-2] if prefix else 0
    if prefix:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(p, (B, *p.shape)), x], 2)
            for p, x in zip((prefix.keys, prefix.values), (k, v))
        )
    place = jnp.concatenate([jnp.broadcast_to(jnp.arange(C), (B, C)), masks.positions(real) + C], 1)
    is_key = jnp.concatenate([jnp.ones((B, C), bool), real], 1)
    distance = place[:, C:, None] - place[:, None]
    is_read = (
        is_key[:, None] & (distance >= 0) & (distance < size) & (jnp.arange(C + L) <= jnp.arange(C, C + L)[:, None])
    )
    scores = jnp.einsum("bhld,bkmd->bhlm", q, k) * Dh**-0.5
    return jnp.einsum("bhlm,bkmd->bhld", jax.nn.softmax(jnp.where(is_read[:, None], scores, -1e30), axis=-1), v)


@pytest.mark.parametrize(("C", "size"), [(0, 16), (40, 16), (40, 150), (5, 1)])
def test_a_window_in_a_long_sequence_reads_what_a_mask_leaves(C, size, mesh):
    given = make_reads(400, C, 400, mesh)

    def run(read, q, k, v, prefix, real):
        def total(q, k, v, prefix):
            out = jnp.where(real[:, None, :, None], read(q, k, v, prefix, real, size), 0)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3) if prefix else (0, 1, 2), has_aux=True))(q, k, v, prefix)

    for one, two in zip(
        jax.tree.leaves(run(read_in_window, *given)),
        jax.tree.leaves(run(read_densely, *jax.device_get(given))),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["decoding", "whole sequences", "behind a prefix"])
def test_attention_in_a_window_does_not_grow_with_the_context(what, mesh):
    def count(n):
        L, C, M = {"decoding": (1, 0, n), "whole sequences": (n, 0, n), "behind a prefix": (1, n, 32)}[what]
        *arrays, real = make_reads(L, C, M, mesh)
        first = None if L == M else M - 2
        run = jax.jit(lambda *arrays: read_in_window(*arrays, real, 16, first))
        return run.lower(*arrays).compile().cost_analysis()["flops"] / L

    assert count(2048) < 1.2 * count(512)
    if what == "whole sequences":
        assert "length=16" in str(jax.make_jaxpr(lambda *a: read_in_window(*a, 16))(*make_reads(2048, 0, 2048, mesh)))


def test_layers_of_mixed_kinds_read_their_own_windows(tiny_model, make_params, make_rows, mesh):
    """The scan over layers chooses between programs, each with a window that is a number."""
    config = dataclasses.replace(tiny_model, **MIXED)
    jaxpr = str(forward.trace(make_params(config, 0, mesh), config, *make_rows(5, mesh)).jaxpr)
    assert "cond[" in jaxpr
