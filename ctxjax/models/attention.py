"""Grouped-query attention over several sources of keys: a row's own columns, and columns that all rows share.

A context that every row starts with has one set of keys and values. It is never repeated for the rows: to the
matrix product the queries of all rows are one long list against one set of keys,

    [K, B*G*L, Dh] x [K, C, Dh]     and not     B times [K, G*L, Dh] x [K, C, Dh]

and the sources are joined by one softmax: each one's scores are exponentiated against the common normaliser.

That is the reference path, which runs anywhere and at any precision. Kernels that hold no scores at all (kernels.py)
take the place of it where they can; ``kernel_for`` is the one place that decides.
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
from ctxjax.sharding import batch_spec, platform
from ctxjax.types import PrefixKV

# Scores (float32) that one device holds at one time; more are computed in chunks of query columns. On CPUs what
# stays in a core's cache is twice as fast as what does not; accelerators want large products.
CHUNK_SCORES = {"cpu": 2**21}
CHUNK_SCORES_ELSEWHERE = 2**25

# Name -> (the platform it runs on, the kernel). "reference" is this module, on any.
KERNELS = {"splash": ("tpu", kernels.splash), "cudnn": ("gpu", kernels.cudnn)}
KINDS = ("auto", "reference", *KERNELS)


class Source(NamedTuple):
    """Something to read: ``keys`` and ``values`` [B, K, M, Dh], a set for each row, or [K, M, Dh], one for all rows.
    Which keys a query reads follows from ``real_BxM`` and the queries' ``columns_BxL`` (masks.causal); without them
    every query reads all."""

    keys: jax.Array
    values: jax.Array
    real_BxM: jax.Array | None = None
    columns_BxL: jax.Array | None = None


def self_attention(
    kind: str, q_BxHxLxDh: jax.Array, k_BxKxLxDh: jax.Array, v_BxKxLxDh: jax.Array, real_BxL, prefix: PrefixKV | None
) -> jax.Array:
    """What each column of a whole sequence reads of its row's columns up to itself and of ``prefix``, by the way that
    ``kind`` names (``KINDS``): that of training, scoring and reading prompts."""
    kernel = kernel_for(kind, q_BxHxLxDh, prefix)
    if kernel is not None:
        return kernel(q_BxHxLxDh, k_BxKxLxDh, v_BxKxLxDh, real_BxL, prefix)
    columns_1xL = jnp.arange(q_BxHxLxDh.shape[2])[None]
    return attention(q_BxHxLxDh, k_BxKxLxDh, v_BxKxLxDh, real_BxL, columns_1xL, prefix)


def kernel_for(kind: str, q_BxHxLxDh: jax.Array, prefix: PrefixKV | None):
    """The kernel for such queries on the current mesh's devices, or None: the reference path.

    "auto" takes a kernel in half precision alone, where the reference path is no more exact, and for a block of
    columns or more; a kernel's name takes it at any precision and length that it can. Raises ValueError where a kernel
    is named that the devices cannot run.
    """
    here = platform()
    check_attention_kind(kind, here)
    if kind == "auto" and (q_BxHxLxDh.dtype == jnp.float32 or q_BxHxLxDh.shape[2] < kernels.LEAST_BLOCK):
        return None
    for name, (there, kernel) in KERNELS.items():
        if kind in (name, "auto") and there == here and kernels.CONDITIONS[name](q_BxHxLxDh, prefix):
            return kernel
    return None


def check_attention_kind(kind: str, platform: str) -> None:
    """Raises ValueError where ``kind`` is not one of KINDS, or is a kernel that devices of this platform cannot run."""
    if kind not in KINDS:
        raise ValueError(f"model.attention = {kind!r} is not known; choose from {', '.join(sorted(KINDS))}")
    if kind in KERNELS and KERNELS[kind][0] != platform:
        there = KERNELS[kind][0]
        raise ValueError(f"model.attention = {kind!r} runs on {there}, and the devices are {platform}; use 'auto'")


def attention(
    q_BxHxLxDh: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    real_BxM: jax.Array,
    columns_BxL: jax.Array,
    prefix: PrefixKV | None = None,
) -> jax.Array:
    """What each query reads, [B, H, L, Dh]; softmax in float32.

    ``keys`` and ``values`` are [B, K, M, Dh], or [K, M, Dh] where all rows share them. A query in column c reads the
    real ones up to c (masks.causal), and before those all of ``prefix``, one layer's [K, C, Dh].

    The G = H/K query heads of a group share a key head. Where the scores are too many to be held at one time
    (``CHUNK_SCORES``), they are computed for some query columns after the other, and again in the backward pass.
    """
    own = Source(keys, values, real_BxM, columns_BxL)
    sources = [own] if prefix is None else [Source(prefix.keys, prefix.values), own]
    L = q_BxHxLxDh.shape[2]
    queries = math.prod(jax.typeof(q_BxHxLxDh).sharding.shard_shape(q_BxHxLxDh.shape)[:3])
    limit = CHUNK_SCORES.get(platform(), CHUNK_SCORES_ELSEWHERE)
    chunks = min(L, -(-queries * sum(source.keys.shape[-2] for source in sources) // limit))
    if chunks <= 1:
        return _attend(q_BxHxLxDh, sources)
    size = -(-L // chunks)
    chunks = -(-L // size)

    def split(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, chunks * size - L)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def chunk(_, queries_and_columns):
        q, columns = queries_and_columns
        return None, _attend(q, [*sources[:-1], own._replace(columns_BxL=columns)])

    _, out = lax.scan(chunk, None, (split(q_BxHxLxDh, 2), split(columns_BxL, 1)))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], chunks * size, -1)[:, :, :L]


def _attend(q_BxHxLxDh, sources) -> jax.Array:
    """The group's heads are laid side by side with the queries, [B, K, G*L, Dh], so that all products are plain
    batched matrix products."""
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
    out = sum(_read(w, source) for w, source in zip(weights, sources)).astype(q.dtype)
    return jnp.reshape(out, (B, H, L, Dh), out_sharding=batch_spec("heads", None, None))


def _rows_first(x, source: Source):
    """Between [B, K, ...] and the order of a source's own arrays: [K, B, ...] where all rows share the keys, in which
    the product needs no transposed copy of the scores (on one core 1.6 to 2.6 times faster). Its own inverse."""
    return x.swapaxes(0, 1) if source.keys.ndim == 3 else x


def _scores(q_BxKxQxDh, source: Source) -> jax.Array:
    """[B, K, Q, M], or [K, B, Q, M] of shared keys, in float32; -1e30 where a query may not read."""
    keys = "kmd" if source.keys.ndim == 3 else "bkmd"
    rows = "kb" if source.keys.ndim == 3 else "bk"
    q = _rows_first(q_BxKxQxDh, source)
    scores = jnp.einsum(f"{rows}qd,{keys}->{rows}qm", q, source.keys, preferred_element_type=jnp.float32)
    if source.real_BxM is None:
        return scores
    mask_BxLxM = masks.causal(source.real_BxM, source.columns_BxL)
    groups = q_BxKxQxDh.shape[2] // mask_BxLxM.shape[1]
    mask = _rows_first(jnp.tile(mask_BxLxM, (1, groups, 1))[:, None], source)
    return jnp.where(mask, scores, -1e30)


def _read(weights, source: Source) -> jax.Array:
    """[B, K, Q, Dh], float32: the values by the weights, which are ordered as the source's scores."""
    values = "kmd" if source.values.ndim == 3 else "bkmd"
    rows = "kb" if source.values.ndim == 3 else "bk"
    weights = weights.astype(source.values.dtype)
    out = jnp.einsum(f"{rows}qm,{values}->{rows}qd", weights, source.values, preferred_element_type=jnp.float32)
    return _rows_first(out, source)
