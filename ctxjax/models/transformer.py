"""The decoder-only transformer of the Llama line: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Pure functions over a nested dict of parameters, whose per-layer arrays are stacked along a leading axis N
so that ``lax.scan`` compiles one layer whatever the depth. One ``_block`` serves the ways in which
the model runs, which differ only in what attention reads:

    forward      whole sequences, for scoring and training
    prefix_kv    a prefix that all rows share, keeping keys and values
    prefill      whole prompts, keeping keys and values
    decode_step  one token per row, against the cache

Weights are two-dimensional ([D, H*Dh] and not [D, H, Dh]): on CPUs such products run about twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax import masks
from ctxjax.models.attention import attention, self_attention
from ctxjax.models.linear import project
from ctxjax.models.params import ParamSpec
from ctxjax.models.remat import remat
from ctxjax.models.rope import RopeScaling, frequencies, rotate, rotation
from ctxjax.sharding import (
    all_gather_embed,
    batch_spec,
    batch_ways,
    lookup,
    platform,
    reshard_for_decoding,
    weight_spec,
)
from ctxjax.types import KVCache, Params, PrefixKV


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture, and the arithmetic it runs in. Hashable: a static argument of every jit.

    ``dtype`` is that of activations and matrix products; norms, softmax and logits are float32 always.
    ``remat`` names what a layer keeps for its backward pass (models/remat.py). ``max_positions`` is the longest
    sequence, in tokens, that the model was made for; nothing computed depends on it. ``tokens`` is how many of the
    ``vocab_size`` rows are tokens of the tokenizer, 0: all; the others pad the head and are never predicted.
    ``attention`` names what computes it (models/attention.py, ``KINDS``).
    ``logit_scale`` multiplies the head's output, and ``logit_softcap`` c then bends it to c tanh(. / c); 0: not.
    """

    vocab_size: int
    width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_positions: int = 2048
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tokens: int = 0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "reference"


def param_specs(config: ModelConfig) -> dict:
    """The declaration of every parameter; the head is absent where embeddings are tied.

    Matrices start with standard deviation 1/sqrt(inputs). The 0.02 that is usual for large models left the
    4-layer base of configs/tiny.py untrained after 600 steps (loss 1.28); this reaches 0.27.
    """
    d, f, n, v = config.width, config.mlp_width, config.layers, config.vocab_size
    q, kv, dh = config.query_heads * config.head_dim, config.kv_heads * config.head_dim, config.head_dim

    def stacked(shape, axes, stddev):
        return ParamSpec((n, *shape), ("layers", *axes), stddev)

    def matrix(inputs, outputs, axes):
        return stacked((inputs, outputs), axes, inputs**-0.5)

    layers = {
        "attention_norm": stacked((d,), (None,), None),
        "q": matrix(d, q, ("embed", "heads")),
        "k": matrix(d, kv, ("embed", "kv_heads")),
        "v": matrix(d, kv, ("embed", "kv_heads")),
        "o": matrix(q, d, ("heads", "embed")),
        "mlp_norm": stacked((d,), (None,), None),
        "gate": matrix(d, f, ("embed", "mlp")),
        "up": matrix(d, f, ("embed", "mlp")),
        "down": matrix(f, d, ("mlp", "embed")),
    }
    if config.qkv_bias:
        layers["q_bias"] = stacked((q,), ("heads",), 0.0)
        layers["k_bias"] = stacked((kv,), ("kv_heads",), 0.0)
        layers["v_bias"] = stacked((kv,), ("kv_heads",), 0.0)
    if config.qk_norm:
        layers["q_norm"] = stacked((dh,), (None,), None)
        layers["k_norm"] = stacked((dh,), (None,), None)
    specs = {
        "embedding": ParamSpec((v, d), ("vocab", "embed"), d**-0.5),
        "layers": layers,
        "final_norm": ParamSpec((d,), (None,), None),
    }
    if not config.tied_embeddings:
        specs["head"] = ParamSpec((d, v), ("embed", "vocab"), d**-0.5)
    return specs


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale_D.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Angular frequencies [Dh/2] in radians per position, after scaling."""
    return frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def _heads(x_BxLxE: jax.Array, count: int, axis: str) -> jax.Array:
    B, L, E = x_BxLxE.shape
    x = jnp.reshape(x_BxLxE, (B, L, count, E // count), out_sharding=batch_spec(None, axis, None))
    return x.swapaxes(1, 2)


def _block(config: ModelConfig, weights: dict, x_BxLxD: jax.Array, rope, attend: Callable):
    """One layer. ``attend(q, k, v)`` -> (attention output [B, H, L, Dh], anything to keep)."""
    h = rms_norm(x_BxLxD, weights["attention_norm"], config.norm_eps)
    q = _heads(project(weights, "q", h, "embed", "heads"), config.query_heads, "heads")
    k = _heads(project(weights, "k", h, "embed", "kv_heads"), config.kv_heads, "kv_heads")
    v = _heads(project(weights, "v", h, "embed", "kv_heads"), config.kv_heads, "kv_heads")
    if config.qk_norm:
        q = rms_norm(q, weights["q_norm"], config.norm_eps)
        k = rms_norm(k, weights["k_norm"], config.norm_eps)
    out, kept = attend(rotate(q, rope), rotate(k, rope), v)
    B, H, L, Dh = out.shape
    out = jnp.reshape(out.swapaxes(1, 2), (B, L, H * Dh), out_sharding=batch_spec(None, "heads"))
    x = x_BxLxD + project(weights, "o", out, "heads", "embed")
    h = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    gate, up = (project(weights, name, h, "embed", "mlp") for name in ("gate", "up"))
    return x + project(weights, "down", jax.nn.silu(gate) * up, "mlp", "embed"), kept


def _embed(params: Params, config: ModelConfig, tokens_BxL: jax.Array) -> jax.Array:
    return lookup(all_gather_embed(params["embedding"].astype(config.dtype), "vocab", "embed"), tokens_BxL)


def head_weights(params: Params, config: ModelConfig) -> jax.Array:
    """The output head [D, V], vocabulary over ``tensor``: the embedding's transpose where they are tied."""
    if config.tied_embeddings:
        return all_gather_embed(params["embedding"], "vocab", "embed").T
    return all_gather_embed(params["head"], "embed", "vocab")


def apply_head(hidden: jax.Array, head_DxV: jax.Array) -> jax.Array:
    """The head's raw output [..., V] in float32. The caller decides for how many tokens at a time."""
    return jnp.einsum("...d,dv->...v", hidden, head_DxV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def finish_logits(raw: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits [..., V] from the head's raw output: scale, soft cap, and -1e30 for rows that are no tokens."""
    logits = raw * config.logit_scale if config.logit_scale != 1 else raw
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    if 0 < config.tokens < raw.shape[-1]:
        logits = jnp.where(jnp.arange(raw.shape[-1]) < config.tokens, logits, -1e30)
    return logits


def _layer_inputs(params: Params, config: ModelConfig, tokens_BxL, mask_BxL, prefix: PrefixKV | None):
    """(x, rope) of the first layer."""
    positions_BxL = masks.positions(mask_BxL) + _length(prefix)
    return _embed(params, config, tokens_BxL), rotation(positions_BxL, rope_frequencies(config))


def _reads(config: ModelConfig, mask_BxL: jax.Array, prefix: PrefixKV | None) -> Callable:
    """``attend`` of a layer that sees whole sequences; it keeps their keys and values."""
    return lambda q, k, v: (self_attention(config.attention, q, k, v, mask_BxL, prefix), (k, v))


def _length(prefix) -> int:
    """C; ``prefix`` is a PrefixKV, of all layers or one for each, or None."""
    return 0 if prefix is None else jax.tree.leaves(prefix)[0].shape[-2]


def prefix_kv(params: Params, config: ModelConfig, prefix_C: jax.Array | None) -> PrefixKV | None:
    """The prefix read once, for all rows that start with it; None of None.

    On a mesh the prefix is laid out as a batch, each row a stretch of it, so that the devices that share out the rows
    of a batch also share out this work; a stretch reads the keys of all earlier ones.
    """
    if prefix_C is None:
        return None
    C, rows = prefix_C.shape[0], batch_ways()
    stretch = -(-C // rows)  # the last stretch is filled up behind its tokens, where none of them reads
    tokens_RxL = jnp.pad(prefix_C, (0, rows * stretch - C)).reshape(rows, stretch)
    x = _embed(params, config, jax.reshard(tokens_RxL, batch_spec(None)))
    positions_RxL = jax.reshard(jnp.arange(rows * stretch).reshape(rows, stretch), batch_spec(None))
    rope, real_1xC = rotation(positions_RxL, rope_frequencies(config)), jnp.ones((1, C), bool)

    def joined(x_RxKxLxDh):
        x = jax.reshard(x_RxKxLxDh, weight_spec((None, "kv_heads", None, None))).swapaxes(0, 1)
        shape, place = (x.shape[0], rows * stretch, x.shape[3]), weight_spec(("kv_heads", None, None))
        return jnp.reshape(x, shape, out_sharding=place)[:, :C]

    def layer(x, weights):
        def attend(q, k, v):
            k, v = joined(k), joined(v)
            return attention(q, k, v, real_1xC, positions_RxL), PrefixKV(k, v)

        return _block(config, weights, x, rope, attend)

    _, prefix = lax.scan(remat(layer, config.remat), x, params["layers"])
    return prefix


def forward(
    params: Params, config: ModelConfig, tokens_BxL: jax.Array, mask_BxL: jax.Array, prefix: PrefixKV | None = None
) -> jax.Array:
    """Final hidden states [B, L, D], normed, ready for ``apply_head``; column l predicts token l+1.

    Rows read ``prefix``, from ``prefix_kv`` of the same prefix's tokens, before their own columns.
    """
    x, rope = _layer_inputs(params, config, tokens_BxL, mask_BxL, prefix)

    def layer(x, weights_and_prefix):
        weights, prefix = weights_and_prefix
        return _block(config, weights, x, rope, _reads(config, mask_BxL, prefix))[0], None

    x, _ = lax.scan(remat(layer, config.remat), x, (params["layers"], prefix))
    return rms_norm(x, params["final_norm"], config.norm_eps)


def summarise_layers(params: Params, config: ModelConfig, views: tuple[tuple, ...], summarise: Callable):
    """Runs several sequences, each the (tokens, mask, prefix) of ``forward``, side by side, and keeps what
    ``summarise(x_view1, x_view2, ...)`` makes of their residual streams [B, L_view, D].

    Returns the views' final hidden states, as ``forward`` does, and the summaries' tree with a leading axis
    [N+1]: of the embedding's output, then after each layer. Comparing views layer by layer so needs one
    layer's activations at a time, not N+1.
    """
    start, ropes = zip(*(_layer_inputs(params, config, *view) for view in views))

    def layer(xs, weights_and_prefixes):
        weights, prefixes = weights_and_prefixes
        xs = tuple(
            _block(config, weights, x, rope, _reads(config, mask, prefix))[0]
            for x, rope, (_, mask, _), prefix in zip(xs, ropes, views, prefixes)
        )
        return xs, summarise(*xs)

    xs, after_layers = lax.scan(layer, start, (params["layers"], tuple(prefix for _, _, prefix in views)))
    hidden = tuple(rms_norm(x, params["final_norm"], config.norm_eps) for x in xs)
    by_layer = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), summarise(*start), after_layers)
    return hidden, by_layer


def prefill(
    params: Params, config: ModelConfig, tokens_BxP: jax.Array, mask_BxP: jax.Array, prefix: PrefixKV | None = None
) -> tuple[jax.Array, KVCache]:
    """Reads the prompts; returns the last column's hidden state [B, D] and a cache of P columns, all filled,
    behind ``prefix``.

    The prompts must be left-padded: then one column predicts the first response token of every row, and
    the head is never applied to the rest of the prompt.
    """
    x, rope = _layer_inputs(params, config, tokens_BxP, mask_BxP, prefix)

    def layer(x, weights_and_prefix):
        weights, prefix = weights_and_prefix
        return _block(config, weights, x, rope, _reads(config, mask_BxP, prefix))

    x, (k, v) = lax.scan(layer, x, (params["layers"], prefix))
    k = k.swapaxes(-1, -2)
    if _is_shallow(config):
        k, v = tuple(k), tuple(v)
        prefix = prefix and tuple(jax.tree.map(lambda x: x[i], prefix) for i in range(config.layers))  # noqa: B023
    cache = KVCache(k, v, mask_BxP, jnp.int32(tokens_BxP.shape[1]), prefix)
    return rms_norm(x[:, -1], params["final_norm"], config.norm_eps), cache


def _is_shallow(config: ModelConfig) -> bool:
    """Whether decoding unrolls its layers. Scanning picks each layer's cache out of one array, which copies it: on CPUs
    19.0 ms per token against 8.4 ms (6 layers, 64 rows, 4 heads of 32, 191 slots, one core), on an H200 4.7 against 2.7
    (Llama-3.2-1B, 64 rows, 640 slots). Elsewhere deep models scan, since programs compile for longer by the layer."""
    return config.layers <= 8 or platform() == "gpu"


def for_decoding(params: Params, config: ModelConfig, rules: str = "gathered") -> Params:
    """The weights as ``decode_step`` wants them, in the places of sharding.DECODE_RULES. Call it before the loop: in
    there it would be done per token."""
    read = {name: params[name] for name in ("embedding", "layers")}
    read = jax.tree.map(lambda w: reshard_for_decoding(w.astype(config.dtype), rules), read)
    if _is_shallow(config):
        read["layers"] = tuple(jax.tree.map(lambda w: w[i], read["layers"]) for i in range(config.layers))  # noqa: B023
    return read | {"final_norm": params["final_norm"]}


def decode_step(
    params: Params, config: ModelConfig, token_B: jax.Array, real_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Reads one token per row; returns its hidden state [B, D] and the cache, one column longer.

    ``params`` come from ``for_decoding``. ``real_B`` False marks rows that have ended: their token is written
    but never read by another. The cache is a loop carry, updated in place at one column.
    """
    position_Bx1 = jnp.sum(cache.mask_BxM, axis=1, dtype=jnp.int32)[:, None] + _length(cache.prefix)
    x = _embed(params, config, token_B[:, None])
    # Behind the barrier, since compilers make cosines again for every head of every layer that reads them.
    rope = lax.optimization_barrier(rotation(position_Bx1, rope_frequencies(config)))
    mask_BxM = lax.dynamic_update_slice(cache.mask_BxM, real_B[:, None], (0, cache.length))
    column_1x1 = jnp.reshape(cache.length, (1, 1))

    def one_layer(x, weights, keys, values, prefix):
        def attend(q, k, v):
            new_keys = lax.dynamic_update_slice(keys, k.swapaxes(-1, -2), (0, 0, 0, cache.length))
            new_values = lax.dynamic_update_slice(values, v, (0, 0, cache.length, 0))
            kept = new_keys, new_values
            return attention(q, new_keys.swapaxes(-1, -2), new_values, mask_BxM, column_1x1, prefix), kept

        return _block(config, weights, x, rope, attend)

    def scanned_layer(carry, inputs):
        x, keys, values = carry
        weights, prefix, index = inputs

        def attend(q, k, v):
            new_keys = lax.dynamic_update_slice(keys, k[None].swapaxes(-1, -2), (index, 0, 0, 0, cache.length))
            new_values = lax.dynamic_update_slice(values, v[None], (index, 0, 0, cache.length, 0))
            k_layer = lax.dynamic_index_in_dim(new_keys, index, keepdims=False).swapaxes(-1, -2)
            v_layer = lax.dynamic_index_in_dim(new_values, index, keepdims=False)
            return attention(q, k_layer, v_layer, mask_BxM, column_1x1, prefix), (new_keys, new_values)

        x, (keys, values) = _block(config, weights, x, rope, attend)
        return (x, keys, values), None

    if _is_shallow(config):
        kept, prefixes = [], cache.prefix or [None] * config.layers
        for weights, layer_keys, layer_values, prefix in zip(params["layers"], cache.keys, cache.values, prefixes):
            x, layer_cache = one_layer(x, weights, layer_keys, layer_values, prefix)
            kept.append(layer_cache)
        keys, values = zip(*kept)
    else:
        inputs = (params["layers"], cache.prefix, jnp.arange(config.layers))
        (x, keys, values), _ = lax.scan(scanned_layer, (x, cache.keys, cache.values), inputs)
    hidden_BxD = rms_norm(x[:, 0], params["final_norm"], config.norm_eps)
    return hidden_BxD, KVCache(keys, values, mask_BxM, cache.length + 1, cache.prefix)
