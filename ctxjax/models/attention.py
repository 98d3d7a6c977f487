"""Grouped-query attention over several sources of keys: a row's own columns, and columns that all rows share.

A context that every row starts with has one set of keys and values. It is never repeated for the rows: to the
matrix product the queries of all rows are one long list against one set of keys,

    [K, B*G*L, Dh] x [K, C, Dh]     and not     B times [K, G*L, Dh] x [K, C, Dh]

and one softmax joins the sources: each one's scores are exponentiated against the common normaliser.

This is the reference path, which runs on any platform and at any precision. Kernels that hold no scores at all
(kernels.py) replace it if they can; ``kernel_for`` is the one place that decides.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax import masks
from ctxjax.models import kernels
from ctxjax.models.architecture import ModelConfig
from ctxjax.models.linear import find_precision
from ctxjax.sharding import batch_spec, platform
from ctxjax.types import PrefixKV

# Scores (float32) that one device holds at one time; more are computed in chunks of query columns. On CPUs what
# stays in a core's cache is twice as fast as what does not; accelerators want large products.
CHUNK_SCORES = {"cpu": 2**21}
CHUNK_SCORES_ELSEWHERE = 2**25
# Least query columns of a chunk that a window alone asks for: smaller products waste more than they save.
LEAST_CHUNK = 128

KERNELS = {"splash": kernels.splash, "cudnn": kernels.cudnn}


class Window(NamedTuple):
    """How far back queries read: the query at position p reads keys at positions above p - ``size``.

    A row's real tokens are contiguous, so within a row distances in columns are distances in positions.
    ``positions_BxL`` are for the prefix, whose key m is at position m. Keys that no query of a chunk can read are not
    even multiplied, so that the arithmetic of a window does not grow with the context.
    """

    size: int
    positions_BxL: jax.Array


class Source(NamedTuple):
    """What queries read: ``keys`` and ``values`` [B, K, M, Dh], a set for each row, or [K, M, Dh], one for all rows.
    ``real_BxM``, the queries' ``columns_BxL``, ``window`` and ``key_columns_M`` say which keys a query reads
    (masks.causal); without them every query reads all. The queries' columns are consecutive if they have one row for
    all."""

    keys: jax.Array
    values: jax.Array
    real_BxM: jax.Array | None = None
    columns_BxL: jax.Array | None = None
    window: int | None = None
    key_columns_M: jax.Array | None = None


def self_attention(
    kind: str,
    q_BxHxLxDh: jax.Array,
    k_BxKxLxDh: jax.Array,
    v_BxKxLxDh: jax.Array,
    real_BxL: jax.Array,
    prefix: PrefixKV | None,
    window: Window | None = None,
) -> jax.Array:
    """Attention of whole sequences, in training, scoring and reading prompts: every column reads its row's columns up
    to itself and ``prefix``. ``kind`` is one of ATTENTION."""
    prefix = None if prefix is None or not prefix.keys.shape[-2] else prefix
    kernel = kernel_for(kind, q_BxHxLxDh, prefix, window)
    if kernel is not None:
        return kernel(q_BxHxLxDh, k_BxKxLxDh, v_BxKxLxDh, real_BxL, prefix)
    columns_1xL = jnp.arange(q_BxHxLxDh.shape[2])[None]
    return attention(q_BxHxLxDh, k_BxKxLxDh, v_BxKxLxDh, real_BxL, columns_1xL, prefix, window)


def choose_kind(kind: str, config: ModelConfig, device: jax.Device) -> str:
    """Return ``ModelConfig.attention`` of a model that runs on such devices, which may be compile-only.

    ``kind``: one of ATTENTION, or "auto": the kernel of the platform if it can run this model and the model computes in
    half precision, in which the reference path is no more exact; otherwise "reference". Raises ValueError, with the
    remedy, if ``kind`` names a kernel that cannot run this model there, or one is chosen of which the installed JAX has
    another than the known.
    """
    obstacles = {name: kernels.find_obstacle(name, config, device) for name in KERNELS}
    if kind == "auto":
        able = [name for name in KERNELS if not obstacles[name] and config.dtype != "float32"]
        kind = able[0] if able else "reference"
    if obstacles.get(kind):
        raise ValueError(f"model.attention = {kind!r} {obstacles[kind]}; use 'auto'")
    if kind in KERNELS:
        kernels.check_library(kind)
    return kind


def kernel_for(kind: str, q_BxHxLxDh: jax.Array, prefix: PrefixKV | None, window: Window | None = None):
    """Return the kernel for such queries, or None: the reference path.

    No kernel has windows: layers with one take the reference path, and so do all layers of a model if windows differ
    between its layers. Few keys are not worth a kernel; splash, which pads rows to blocks, needs as many columns.
    """
    keys = q_BxHxLxDh.shape[2]
    if kind == "cudnn" and prefix is not None:
        keys += prefix.keys.shape[1]
    if window is not None or keys < kernels.LEAST_KEYS:
        return None
    return KERNELS.get(kind)


def attention(
    q_BxHxLxDh: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    real_BxM: jax.Array,
    columns_BxL: jax.Array,
    prefix: PrefixKV | None = None,
    window: Window | None = None,
    key_columns_M: jax.Array | None = None,
) -> jax.Array:
    """Return what each query reads, [B, H, L, Dh]: softmax(q k / sqrt(Dh)) v, the softmax in float32.

    ``keys`` and ``values`` are [B, K, M, Dh], or [K, M, Dh] if all rows share them. A query in column c reads the
    real ones up to c (masks.causal), and before those all of ``prefix``, one layer's [K, C, Dh]; of both only what is
    in the ``window``. ``key_columns_M`` are the keys' columns if they are not in order (ring.py).

    The G = H/K query heads of a group share a key head. Scores that are too many to be held at one time
    (``CHUNK_SCORES``) are computed for one chunk of query columns after the other, and again in the backward pass.
    """
    own = Source(keys, values, real_BxM, columns_BxL, None if window is None else window.size, key_columns_M)
    sources = [own] if prefix is None else [_prefix_source(prefix, window), own]
    L = q_BxHxLxDh.shape[2]
    queries = math.prod(jax.typeof(q_BxHxLxDh).sharding.shard_shape(q_BxHxLxDh.shape)[:3])
    limit = CHUNK_SCORES.get(platform(), CHUNK_SCORES_ELSEWHERE)
    chunks = min(L, -(-queries * sum(source.keys.shape[-2] for source in sources) // limit))
    if window is not None:
        chunks = max(chunks, L // max(window.size, LEAST_CHUNK))
    if chunks <= 1:
        return _attend(q_BxHxLxDh, [_take_window(source, L) for source in sources])
    size = -(-L // chunks)
    chunks = -(-L // size)

    def split(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, chunks * size - L)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

    # The chunks' gradients of keys and values add up in the type in which the scan gets them.
    wide = [s._replace(keys=s.keys.astype(jnp.float32), values=s.values.astype(jnp.float32)) for s in sources]

    def narrow(source: Source) -> Source:
        dtype = q_BxHxLxDh.dtype
        return source._replace(keys=source.keys.astype(dtype), values=source.values.astype(dtype))

    @jax.checkpoint
    def chunk(_, queries_and_columns):
        q, columns = queries_and_columns
        read = [source._replace(columns_BxL=c) for source, c in zip(wide, columns)]
        return None, _attend(q, [narrow(_take_window(source, size)) for source in read])

    columns = [None if source.columns_BxL is None else split(source.columns_BxL, 1) for source in sources]
    _, out = lax.scan(chunk, None, (split(q_BxHxLxDh, 2), columns))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], chunks * size, -1)[:, :, :L]


def cut_prefix(prefix: PrefixKV, window: int) -> PrefixKV:
    """Return the part of a prefix [..., C, Dh] that later queries can read; all of it if ``window`` is 0."""
    C = prefix.keys.shape[-2]
    kept = min(C, max(window - 1, 1)) if window else C
    return PrefixKV(prefix.keys[..., C - kept :, :], prefix.values[..., C - kept :, :])


def _prefix_source(prefix: PrefixKV, window: Window | None) -> Source:
    """All of the prefix; or the part of it in the window, since a key's column is its position here."""
    if window is None:
        return Source(prefix.keys, prefix.values)
    read = cut_prefix(prefix, window.size)
    kept = read.keys.shape[-2]
    positions_BxL = window.positions_BxL - (prefix.keys.shape[-2] - kept)
    return Source(read.keys, read.values, jnp.ones((1, kept), bool), positions_BxL, window.size)


def _take_window(source: Source, queries: int) -> Source:
    """Leave out the keys that none of ``queries`` consecutive ones can read, if their columns are those of all rows."""
    M = source.keys.shape[-2]
    count = M if source.window is None else source.window + queries - 1
    if count >= M or source.columns_BxL.shape[0] > 1:
        return source
    start = jnp.clip(source.columns_BxL[0, 0] - source.window + 1, 0, M - count)
    keys, values = (lax.dynamic_slice_in_dim(x, start, count, axis=x.ndim - 2) for x in (source.keys, source.values))
    real_BxM = lax.dynamic_slice_in_dim(source.real_BxM, start, count, axis=1)
    return Source(keys, values, real_BxM, source.columns_BxL - start, source.window)


def _attend(q_BxHxLxDh, sources) -> jax.Array:
    """Attention over ``sources`` with one softmax. The heads of a group are laid out along the queries,
    [B, K, G*L, Dh], so that all products are plain batched matrix products."""
    B, H, L, Dh = q_BxHxLxDh.shape
    K = sources[0].keys.shape[-3]
    q = jnp.reshape(q_BxHxLxDh * Dh**-0.5, (B, K, H // K * L, Dh), out_sharding=batch_spec("kv_heads", None, None))
    scores = [_scores(q, source) for source in sources]
    if len(scores) == 1:
        weights = [jax.nn.softmax(scores[0], axis=-1)]
    else:
        totals = [jax.nn.logsumexp(s, axis=-1, keepdims=True) for s in scores]
        total = functools.reduce(jnp.logaddexp, [_rows_first(t, source) for t, source in zip(totals, sources)])
        weights = [jnp.exp(s - _rows_first(total, source)) for s, source in zip(scores, sources)]
    out = sum(_weighted_values(w, source) for w, source in zip(weights, sources)).astype(q.dtype)
    return jnp.reshape(out, (B, H, L, Dh), out_sharding=batch_spec("heads", None, None))


def _rows_first(x, source: Source):
    """Convert between [B, K, ...] and the order of the source's scores, [K, B, ...] if all rows share the keys: so the
    product needs no transposed copy of the scores (benchmarks/README.md, "Choices in models/"). Its own inverse."""
    return x.swapaxes(0, 1) if source.keys.ndim == 3 else x


def _scores(q_BxKxQxDh, source: Source) -> jax.Array:
    """Return [B, K, Q, M], or [K, B, Q, M] of shared keys, in float32; -1e30 for keys that the query may not read."""
    keys = "kmd" if source.keys.ndim == 3 else "bkmd"
    rows = "kb" if source.keys.ndim == 3 else "bk"
    q = _rows_first(q_BxKxQxDh, source)
    scores = jnp.einsum(
        f"{rows}qd,{keys}->{rows}qm", q, source.keys, precision=find_precision(q), preferred_element_type=jnp.float32
    )
    if source.real_BxM is None:
        return scores
    mask_BxLxM = masks.causal(source.real_BxM, source.columns_BxL, source.window, source.key_columns_M)
    groups = q_BxKxQxDh.shape[2] // mask_BxLxM.shape[1]
    mask = _rows_first(jnp.tile(mask_BxLxM, (1, groups, 1))[:, None], source)
    return jnp.where(mask, scores, -1e30)


def _weighted_values(weights, source: Source) -> jax.Array:
    """Return the sum of the values by ``weights``, which are ordered as the source's scores: [B, K, Q, Dh], float32."""
    values = "kmd" if source.values.ndim == 3 else "bkmd"
    rows = "kb" if source.values.ndim == 3 else "bk"
    weights = weights.astype(source.values.dtype)
    out = jnp.einsum(
        f"{rows}qm,{values}->{rows}qd", weights, source.values,
        precision=find_precision(weights), preferred_element_type=jnp.float32,
    )  # fmt: skip
    return _rows_first(out, source)
