"""One layer of the decoder: RMSNorm, rotary positions, grouped-query attention and a gated MLP.

``run_layer`` serves every way in which the model runs (models/transformer.py). These ways differ in the ``Layout`` of
their tokens and in ``store``, which says which keys the queries read and which are kept; ``attend`` joins the two. What
differs from layer to layer is a ``Kind``, data that the scan over layers carries.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax.models.architecture import ACTIVATIONS, LayerKind, ModelConfig, rope_amplitude, rope_frequencies
from ctxjax.models.attention import Window, attention, self_attention
from ctxjax.models.linear import project
from ctxjax.models.remat import remat
from ctxjax.models.rope import Rotation, rotate, rotation
from ctxjax.sharding import batch_spec
from ctxjax.types import PrefixKV


class Layout(NamedTuple):
    """Where the tokens of a pass are; the same for all layers with the same cache.

    ``positions_BxL`` are those of the queries, and ``rope`` their rotation: with a leading axis R if the layers have R
    different ones, None if none has any. ``real_BxM``: which of a row's keys are real tokens. ``columns_BxL``: the
    queries' columns among these keys; None: whole sequences, in which every column has its query. ``real`` and
    ``columns`` may have one row for all. ``key_columns_M``: the keys' columns if they are not in order, None: they are.
    """

    positions_BxL: jax.Array
    rope: Rotation | None
    real_BxM: jax.Array
    columns_BxL: jax.Array | None = None
    key_columns_M: jax.Array | None = None


class Kind(NamedTuple):
    """A LayerKind while a program is traced: Python numbers, or the int32 scalars that a scan carries.

    ``window`` is an index into ``_windows``, ``rope`` one into ``Layout.rope``; None if all layers have the same.
    """

    window: int | jax.Array | None
    rope: int | jax.Array | None


def _windows(config: ModelConfig) -> list[int]:
    """Return the different windows of the layers, 0: none. They are numbers in a program, so that what a layer reads,
    and with it the arithmetic, has the window's size."""
    return list(dict.fromkeys(kind.window for kind in config.kinds))


def _ropes(config: ModelConfig) -> list[LayerKind]:
    """Return the different rotary positions of the layers, each as a kind without a window."""
    return list(dict.fromkeys(kind.without_window() for kind in config.kinds))


class Segment(NamedTuple):
    """Consecutive ``layers`` with the same ``window``, 0: none. They have a cache of one size."""

    window: int
    layers: range


def segments(config: ModelConfig) -> list[Segment]:
    """Return the longest segments of a model, in order: one if all layers have the same window, or none has any."""
    runs = itertools.groupby(range(config.layers), key=lambda layer: config.kinds[layer].window)
    found = [(window, list(run)) for window, run in runs]
    return [Segment(window, range(run[0], run[-1] + 1)) for window, run in found]


def kind_of(config: ModelConfig, layer: int) -> Kind:
    """Return the kind of one layer in Python numbers."""
    kind, windows, ropes = config.kinds[layer], _windows(config), _ropes(config)
    return Kind(
        windows.index(kind.window) if len(windows) > 1 else None,
        ropes.index(kind.without_window()) if len(ropes) > 1 else None,
    )


def make_rope(config: ModelConfig, positions_BxL: jax.Array) -> Rotation | None:
    """Return ``Layout.rope`` of queries at these positions."""
    found = [rope_frequencies(config, kind) for kind in _ropes(config)]
    amplitudes = [rope_amplitude(config, kind) for kind in _ropes(config)]
    if len(found) == 1:
        return None if found[0] is None else rotation(positions_BxL, found[0], amplitudes[0])
    # A layer without rotary positions turns by frequency 0, that is, not at all.
    found = [jnp.zeros(config.head_dim // 2) if frequency is None else frequency for frequency in found]
    shared = amplitudes[0] if len(set(amplitudes)) == 1 else jnp.asarray(amplitudes)[:, None, None, None, None]
    return rotation(positions_BxL, jnp.stack(found)[:, None, None, None], shared)


def scan_layers(
    config: ModelConfig, layer: Callable, start, *stacks, layers: range | None = None, policy: str = "none"
):
    """Scan ``layer(carry, kind, *parts)`` -> (carry, kept) over ``layers``, None: all, under a policy of
    models/remat.py.

    ``stacks`` are trees of arrays [N, ...], N the number of ``layers``, whose slices are ``parts``. The scan carries
    only what differs between these layers; what they share is a constant of the program. Returns what ``lax.scan``
    returns.
    """
    kinds = [kind_of(config, index) for index in layers or range(config.layers)]
    varying = {
        name: jnp.array(indices, jnp.int32)
        for name, indices in zip(Kind._fields, zip(*kinds, strict=True), strict=True)
        if len(set(indices)) > 1
    }

    def body(carry, varying_and_parts):
        varying, *parts = varying_and_parts
        return layer(carry, kinds[0]._replace(**varying), *parts)

    return lax.scan(remat(body, policy), start, (varying, *stacks))


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float, plus_one: bool = False) -> jax.Array:
    """Return x / rms(x) * scale over the last axis, or times 1 + scale, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale_D = scale_D.astype(jnp.float32)
    return (x32 * (1 + scale_D if plus_one else scale_D)).astype(x.dtype)


def keep(k: jax.Array, v: jax.Array):
    """The ``store`` of whole sequences: read their own keys and values, and keep them."""
    return k, v, (k, v)


def attend(config: ModelConfig, kind: Kind, layout: Layout, prefix: PrefixKV | None, store: Callable, q, k, v):
    """Rotate, store, read: return (what each query reads [B, H, L, Dh], what ``store`` keeps).

    ``store(k, v)`` -> (keys and values to read, as in ``attention``, anything to keep).
    """
    rope = layout.rope
    if kind.rope is not None:
        rope = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, kind.rope, keepdims=False), rope)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    keys, values, kept = store(k, v)

    def read(size: int, q, keys, values):
        window = Window(size, layout.positions_BxL) if size else None
        if layout.columns_BxL is None:
            return self_attention(config.attention, q, keys, values, layout.real_BxM, prefix, window)
        return attention(q, keys, values, layout.real_BxM, layout.columns_BxL, prefix, window, layout.key_columns_M)

    reads = [functools.partial(read, size) for size in _windows(config)]
    if isinstance(kind.window, jax.Array):
        return lax.switch(kind.window, reads, q, keys, values), kept
    return reads[kind.window or 0](q, keys, values), kept


def run_layer(
    config: ModelConfig,
    weights: dict,
    kind: Kind,
    layout: Layout,
    x_BxLxD: jax.Array,
    prefix: PrefixKV | None = None,
    store: Callable = keep,
):
    """Run one layer: return (the residual stream after it [B, L, D], what ``store`` keeps; see ``attend``).

    ``prefix``: this layer's keys and values [K, C, Dh] of what all rows read before their own keys.
    """

    def norm(name, x):
        return rms_norm(x, weights[name], config.norm_eps, config.norm_plus_one)

    def heads(name, count, axis):
        x = project(weights, name, h, "embed", axis)
        x = norm(f"{name}_norm", x) if config.joint_qk_norm and f"{name}_norm" in weights else x
        return _split_heads(x, count, axis)

    h = norm("attention_norm", x_BxLxD) if config.pre_norms else x_BxLxD
    q = heads("q", config.query_heads, "heads")
    k, v = (heads(name, config.kv_heads, "kv_heads") for name in "kv")
    if config.qk_norm and not config.joint_qk_norm:
        q, k = norm("q_norm", q), norm("k_norm", k)
    if config.query_scale:  # attention itself divides by the root of Dh
        q = q * (config.query_scale * config.head_dim**0.5)
    out, kept = attend(config, kind, layout, prefix, store, q, k, v)
    B, H, L, Dh = out.shape
    out = jnp.reshape(out.swapaxes(1, 2), (B, L, H * Dh), out_sharding=batch_spec(None, "heads"))
    out = project(weights, "o", out, "heads", "embed")
    x = x_BxLxD + (norm("attention_post_norm", out) if config.post_norms else out)
    h = norm("mlp_norm", x) if config.pre_norms else x
    gate, up = (project(weights, name, h, "embed", "mlp") for name in ("gate", "up"))
    out = project(weights, "down", ACTIVATIONS[config.activation](gate) * up, "mlp", "embed")
    return x + (norm("mlp_post_norm", out) if config.post_norms else out), kept


def _split_heads(x_BxLxE: jax.Array, count: int, axis: str) -> jax.Array:
    """Return [B, count, L, E / count]."""
    B, L, E = x_BxLxE.shape
    x = jnp.reshape(x_BxLxE, (B, L, count, E // count), out_sharding=batch_spec(None, axis, None))
    return x.swapaxes(1, 2)
