"""The decoder-only transformer: pure functions over a nested dict of parameters.

Per-layer arrays are stacked along a leading axis N, so that ``lax.scan`` compiles one layer whatever the depth. One
layer (models/layer.py) serves all the ways in which the model runs:

    forward           whole sequences, for scoring and training
    summarise_layers  whole sequences, several views at once, with something kept of every layer
    prefix_kv         a prefix that all rows share, keeping keys and values
    prefill           whole prompts, keeping keys and values
    decode_step       one token per row, against the cache
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax import masks
from ctxjax.models import ring
from ctxjax.models.architecture import (
    LayerKind as LayerKind,
    ModelConfig as ModelConfig,
    RopeScaling as RopeScaling,
    param_specs as param_specs,
    rope_frequencies as rope_frequencies,
)
from ctxjax.models.attention import cut_prefix
from ctxjax.models.layer import Layout, Segment, kind_of, make_rope, rms_norm, run_layer, scan_layers, segments
from ctxjax.models.linear import find_precision
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


def _embed(params: Params, config: ModelConfig, tokens_BxL: jax.Array) -> jax.Array:
    """Return the input of the first layer [B, L, D]."""
    x = _embedding_rows(params["embedding"], tokens_BxL, config.dtype)
    return x * config.embedding_scale if config.embedding_scale != 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embedding_rows(table_VxD: jax.Array, tokens_BxL: jax.Array, dtype: str) -> jax.Array:
    """Return rows of a table [B, L, D] in ``dtype``. The table is cast before the all-gather, which halves the traffic;
    its gradient is summed in its own dtype: in bfloat16 a frequent token's sum would stop growing."""
    return lookup(all_gather_embed(table_VxD.astype(dtype), "vocab", "embed"), tokens_BxL)


def _embedding_rows_forward(table_VxD, tokens_BxL, dtype):
    return _embedding_rows(table_VxD, tokens_BxL, dtype), (table_VxD, tokens_BxL)


def _embedding_rows_backward(dtype, kept, d_rows_BxLxD):
    del dtype
    table_VxD, tokens_BxL = kept
    _, pull_back = jax.vjp(lambda table: lookup(all_gather_embed(table, "vocab", "embed"), tokens_BxL), table_VxD)
    return *pull_back(d_rows_BxLxD.astype(table_VxD.dtype)), None


_embedding_rows.defvjp(_embedding_rows_forward, _embedding_rows_backward)


def _final_norm(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    return rms_norm(x, params["final_norm"], config.norm_eps, config.norm_plus_one)


def head_weights(params: Params, config: ModelConfig) -> jax.Array:
    """Return the output head [D, V], vocabulary over ``tensor``: the embedding's transpose if they are tied."""
    if config.tied_embeddings:
        return all_gather_embed(params["embedding"], "vocab", "embed").T
    return all_gather_embed(params["head"], "embed", "vocab")


def apply_head(hidden: jax.Array, head_DxV: jax.Array) -> jax.Array:
    """Return the head's raw output [..., V] in float32. The caller decides for how many tokens at a time."""
    return jnp.einsum(
        "...d,dv->...v", hidden, head_DxV.astype(hidden.dtype),
        precision=find_precision(hidden), preferred_element_type=jnp.float32,
    )  # fmt: skip


def finish_logits(raw: jax.Array, config: ModelConfig) -> jax.Array:
    """Return logits [..., V] from the head's raw output: scale, soft cap, and -1e30 for rows that are no tokens."""
    logits = raw * config.logit_scale if config.logit_scale != 1 else raw
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    if 0 < config.tokens < raw.shape[-1]:
        logits = jnp.where(jnp.arange(raw.shape[-1]) < config.tokens, logits, -1e30)
    return logits


def _prefix_length(prefix: PrefixKV | None) -> int:
    """Return C; ``prefix`` is a PrefixKV or None."""
    return 0 if prefix is None else prefix.keys.shape[-2]


def _start(params: Params, config: ModelConfig, tokens_BxL, mask_BxL, prefix: PrefixKV | None):
    """Return (the first layer's input, the layout) of whole sequences."""
    positions_BxL = masks.positions(mask_BxL) + _prefix_length(prefix)
    x = _embed(params, config, tokens_BxL)
    return x, Layout(positions_BxL, make_rope(config, positions_BxL), mask_BxL)


def prefix_kv(params: Params, config: ModelConfig, prefix_C: jax.Array | None) -> PrefixKV | None:
    """Read the prefix once, for all rows that start with it; None of None.

    On a mesh the prefix is laid out as a batch, each row a stretch of it, so that the devices that share out the rows
    of a batch also share out this work; a stretch reads the keys of all earlier ones.
    """
    if prefix_C is None:
        return None
    C, rows = prefix_C.shape[0], batch_ways()
    stretch = -(-C // rows)  # the last stretch is padded on the right, which no token reads
    tokens_RxL = jnp.pad(prefix_C, (0, rows * stretch - C)).reshape(rows, stretch)
    x = _embed(params, config, jax.reshard(tokens_RxL, batch_spec(None)))
    positions_RxL = jax.reshard(jnp.arange(rows * stretch).reshape(rows, stretch), batch_spec(None))
    # One stretch is a whole sequence, which a kernel can read.
    columns_RxL = None if rows == 1 else positions_RxL
    layout = Layout(positions_RxL, make_rope(config, positions_RxL), jnp.ones((1, C), bool), columns_RxL)

    def join_stretches(x_RxKxLxDh):
        x = jax.reshard(x_RxKxLxDh, weight_spec((None, "kv_heads", None, None))).swapaxes(0, 1)
        shape, place = (x.shape[0], rows * stretch, x.shape[3]), weight_spec(("kv_heads", None, None))
        return jnp.reshape(x, shape, out_sharding=place)[:, :C]

    def store(k, v):
        prefix = PrefixKV(join_stretches(k), join_stretches(v))
        return (k, v, prefix) if rows == 1 else (prefix.keys, prefix.values, prefix)

    def layer(x, kind, weights):
        return run_layer(config, weights, kind, layout, x, store=store)

    _, prefix = scan_layers(config, layer, x, params["layers"], policy=config.remat)
    return prefix


def forward(
    params: Params, config: ModelConfig, tokens_BxL: jax.Array, mask_BxL: jax.Array, prefix: PrefixKV | None = None
) -> jax.Array:
    """Return the final hidden states [B, L, D], normed, ready for ``apply_head``; column l predicts token l+1.

    Rows read ``prefix``, from ``prefix_kv`` of the same prefix's tokens, before their own columns.
    """
    x, layout = _start(params, config, tokens_BxL, mask_BxL, prefix)

    def layer(x, kind, weights, prefix):
        return run_layer(config, weights, kind, layout, x, prefix)[0], None

    x, _ = scan_layers(config, layer, x, params["layers"], prefix, policy=config.remat)
    return _final_norm(params, config, x)


def summarise_layers(params: Params, config: ModelConfig, views: tuple[tuple, ...], summarise: Callable, *per_layer):
    """Run several sequences, each the (tokens, mask, prefix) of ``forward``, layer by layer together, and keep
    ``summarise(x_view1, x_view2, ..., *parts)`` of their residual streams [B, L_view, D]. ``per_layer``: trees
    [N+1, ...], whose slices are ``parts``.

    Returns the views' final hidden states, as ``forward`` does, and the summaries' tree with a leading axis
    [N+1]: of the embedding's output, then after each layer. Comparing views layer by layer so needs one
    layer's activations at a time, not N+1.
    """
    start, layouts = zip(*(_start(params, config, *view) for view in views))

    def layer(xs, kind, weights, prefixes, parts):
        xs = tuple(
            run_layer(config, weights, kind, layout, x, prefix)[0] for x, layout, prefix in zip(xs, layouts, prefixes)
        )
        return xs, summarise(*xs, *parts)

    prefixes = tuple(prefix for _, _, prefix in views)
    first, rest = (jax.tree.map(lambda x, part=part: x[part], per_layer) for part in (0, slice(1, None)))
    xs, after_layers = scan_layers(config, layer, start, params["layers"], prefixes, rest)
    hidden = tuple(_final_norm(params, config, x) for x in xs)
    before = summarise(*start, *first)
    by_layer = jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), before, after_layers)
    return hidden, by_layer


def prefill(
    params: Params, config: ModelConfig, tokens_BxP: jax.Array, mask_BxP: jax.Array, prefix: PrefixKV | None = None
) -> tuple[jax.Array, KVCache]:
    """Read the prompts after ``prefix``; return the last column's hidden state [B, D] and a cache of P columns, all
    filled. Layers with a window keep what is still in reach.

    The prompts must be left-padded: then one column predicts the first response token of every row, and
    the head is never applied to the rest of the prompt.
    """
    x, layout = _start(params, config, tokens_BxP, mask_BxP, prefix)

    def layer(window, x, kind, index):
        def store(k, v):
            return k, v, (ring.keep_last(k, window), ring.keep_last(v, window))

        weights, own_prefix = _take_layer((params["layers"], prefix), index)
        return run_layer(config, weights, kind, layout, x, own_prefix, store)

    keys, values, parts = [], [], []
    for segment in segments(config):
        first, stop = segment.layers.start, segment.layers.stop
        one_layer = functools.partial(layer, segment.window)
        x, (k, v) = scan_layers(config, one_layer, x, jnp.arange(first, stop), layers=segment.layers)
        for part in _split_for_decoding(config, segment):
            keys.append(_take_layers(k.swapaxes(-1, -2), part.layers, first))
            values.append(_take_layers(v, part.layers, first))
            parts.append(part)
    cache = KVCache(
        keys=tuple(keys),
        values=tuple(values),
        mask_BxM=mask_BxP,
        length=jnp.int32(tokens_BxP.shape[1]),
        windows=tuple(part.window for part in parts),
        prefix=prefix and tuple(_cut_prefix(prefix, part) for part in parts),
        prefix_length=_prefix_length(prefix),
    )
    return _final_norm(params, config, x[:, -1]), cache


def _take_layer(stacks, index: int | jax.Array):
    """Return one layer of trees of arrays [N, ...]. A segment indexes the whole stacks, since slices are copies."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), stacks)


def _take_layers(stack: jax.Array, layers: range, first: int = 0) -> jax.Array:
    """Return these layers of [N, ...], the stack of layer ``first`` and later: [n, ...], or [...] of a single one."""
    if len(layers) == 1:
        return stack[layers.start - first]
    return stack[layers.start - first : layers.stop - first]


def _cut_prefix(prefix: PrefixKV, segment: Segment) -> PrefixKV:
    """Return the part of the prefix [N, K, C, Dh] that a segment's layers can still read, as KVCache stores it."""
    return cut_prefix(jax.tree.map(lambda x: _take_layers(x, segment.layers), prefix), segment.window)


def _is_decoding_unrolled(config: ModelConfig) -> bool:
    """Shallow models, and all on GPUs, decode without a scan, which would copy each layer's cache out of one array for
    every token (benchmarks/README.md, "Choices in models/"). Elsewhere deep models scan, because compiling takes longer
    with every unrolled layer."""
    return config.layers <= 8 or platform() == "gpu"


def _split_for_decoding(config: ModelConfig, segment: Segment) -> list[Segment]:
    """Return the parts of a segment that are decoded one after the other: single layers if decoding is unrolled."""
    if _is_decoding_unrolled(config):
        return [Segment(segment.window, range(layer, layer + 1)) for layer in segment.layers]
    return [segment]


def _decoding_segments(config: ModelConfig) -> list[Segment]:
    """Return the segments of layers that share the arrays of a cache."""
    return [part for segment in segments(config) for part in _split_for_decoding(config, segment)]


def prepare_for_decoding(params: Params, config: ModelConfig, rules: str = "gathered") -> Params:
    """Cast and reshard the weights for ``decode_step`` by sharding.DECODE_RULES[rules].

    Call it before the decode loop: inside, it would run for every token. The scales of norms are not cast, as they are
    not in scoring: bfloat16 has no number between 1 and 1.0078, and a scale would be decoded as before its training.
    """

    def prepare(path, w):
        is_scale = path[-1].key.endswith("norm")
        return reshard_for_decoding(w if is_scale else w.astype(config.dtype), rules)

    read = {name: params[name] for name in ("embedding", "layers")}
    read = jax.tree.map_with_path(prepare, read)
    if _is_decoding_unrolled(config):
        read["layers"] = tuple(jax.tree.map(lambda w: w[i], read["layers"]) for i in range(config.layers))  # noqa: B023
    return read | {"final_norm": params["final_norm"]}


def decode_step(
    params: Params, config: ModelConfig, token_B: jax.Array, real_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Read one token per row; return its hidden state [B, D] and the cache, one column longer.

    ``params`` come from ``prepare_for_decoding``. ``real_B`` False marks rows that have ended: their token is written
    but never read by another. The cache is a loop carry, updated in place at one column.
    """
    position_Bx1 = jnp.sum(cache.mask_BxM, axis=1, dtype=jnp.int32)[:, None] + cache.prefix_length
    x = _embed(params, config, token_B[:, None])
    # The barrier keeps compilers from computing the cosines again for every head of every layer.
    rope = lax.optimization_barrier(make_rope(config, position_Bx1))
    mask_BxM = lax.dynamic_update_slice(cache.mask_BxM, real_B[:, None], (0, cache.length))
    layout = Layout(position_Bx1, rope, mask_BxM, jnp.reshape(cache.length, (1, 1)))
    parts, kept = _decoding_segments(config), []
    prefixes = cache.prefix or [None] * len(parts)
    for segment, keys, values, prefix in zip(parts, cache.keys, cache.values, prefixes, strict=True):
        own, slot = layout, cache.length
        if segment.window:
            slots = keys.shape[-1]
            real_BxS, columns_S = ring.find_keys(mask_BxM, cache.length, slots)
            missing = cache.prefix_length - _prefix_length(prefix)
            own, slot = Layout(position_Bx1 - missing, rope, real_BxS, layout.columns_BxL, columns_S), slot % slots
        x, *arrays = _decode_segment(params, config, segment, own, slot, x, keys, values, prefix)
        kept.append(arrays)
    keys, values = zip(*kept)
    cache = cache.replace(keys=keys, values=values, mask_BxM=mask_BxM, length=cache.length + 1)
    return _final_norm(params, config, x[:, 0]), cache


def _decode_segment(
    params: Params, config: ModelConfig, segment: Segment, layout: Layout, slot, x, keys, values, prefix
):
    """Run the layers of a segment, which write to ``slot`` of its arrays: return (x, keys, values)."""
    first = segment.layers.start

    def append(k, v):
        """The ``store`` of a layer with its own arrays."""
        new_keys = lax.dynamic_update_slice(keys, k.swapaxes(-1, -2), (0, 0, 0, slot))
        new_values = lax.dynamic_update_slice(values, v, (0, 0, slot, 0))
        return new_keys.swapaxes(-1, -2), new_values, (new_keys, new_values)

    def append_stacked(keys, values, index):
        """The ``store`` of a layer in the arrays of several."""

        def store(k, v):
            new_keys = lax.dynamic_update_slice(keys, k[None].swapaxes(-1, -2), (index, 0, 0, 0, slot))
            new_values = lax.dynamic_update_slice(values, v[None], (index, 0, 0, slot, 0))
            k_layer, v_layer = _take_layer((new_keys, new_values), index)
            return k_layer.swapaxes(-1, -2), v_layer, (new_keys, new_values)

        return store

    def scanned_layer(carry, kind, prefix, index):
        x, keys, values = carry
        weights, store = _take_layer(params["layers"], first + index), append_stacked(keys, values, index)
        x, arrays = run_layer(config, weights, kind, layout, x, prefix, store)
        return (x, *arrays), None

    if len(segment.layers) == 1:
        own = params["layers"]
        weights = own[first] if isinstance(own, tuple) else _take_layer(own, first)
        x, arrays = run_layer(config, weights, kind_of(config, first), layout, x, prefix, append)
        return x, *arrays
    stacks = prefix, jnp.arange(len(segment.layers))
    return scan_layers(config, scanned_layer, (x, keys, values), *stacks, layers=segment.layers)[0]
