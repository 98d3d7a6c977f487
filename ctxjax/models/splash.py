"""Splash attention: Pallas kernels for TPUs, from jax.experimental.

Arrays are one device's rows and heads, [B, H, L, Dh]. Compiled ahead of time for TPU v5e and never timed; the block
sizes are MaxText's for v5 chips. Tests run the kernels in Pallas's interpreter.
"""

from __future__ import annotations

import inspect
import typing

import jax
import jax.numpy as jnp

from ctxjax.models.cascade import Part, cascade
from ctxjax.sharding import platform
from ctxjax.types import PrefixKV

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel_lib,
        splash_attention_mask as mask_lib,
    )
except ImportError:  # it may leave jax.experimental; ``is_known`` then says so
    kernel_lib = mask_lib = None

BLOCKS = (512, 256, 128)  # columns of a block; the products need multiples of 128
LEAST_BLOCK = BLOCKS[-1]
_BACKWARD = (
    "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function", "attn_logits_soft_cap",
    "interpret",
)  # fmt: skip


def is_known() -> bool:
    """Whether the installed JAX has the private function of its splash that ``_run_backward`` calls."""
    backward, kept = (getattr(kernel_lib, name, None) for name in ("_splash_attention_bwd", "SplashResidualsType"))
    known = ("save_residuals", *_BACKWARD, "res", "do")
    return (
        backward is not None
        and tuple(inspect.signature(backward).parameters) == known
        and len(typing.get_args(kept)) == 9
    )


def attend(q, k, v, real_BxL, prefix: PrefixKV | None = None) -> jax.Array:
    """Return causal attention behind ``prefix``. Padding is a segment of its own."""
    L, block = q.shape[2], _choose_block(q.shape[2])
    q, k, v = (_pad_columns(x, block) for x in (q * q.shape[3] ** -0.5, k, v))
    segment_BxL = jnp.pad(real_BxL.astype(jnp.int32), [(0, 0), (0, q.shape[2] - L)])
    if prefix is None:
        rows = _make_causal_kernel(q, block, with_normaliser=False)
        return jax.vmap(lambda q, k, v, s: rows(q, k, v, kernel_lib.SegmentIds(s, s)))(q, k, v, segment_BxL)[:, :, :L]
    C, prefix_block = prefix.keys.shape[1], _choose_block(prefix.keys.shape[1])
    prefix_k, prefix_v = (_pad_columns(x, prefix_block) for x in (prefix.keys, prefix.values))
    own, shared = _make_own_part(block), _make_prefix_part(C, block, prefix_block)
    return cascade(own, shared, q, k, v, prefix_k, prefix_v, segment_BxL)[:, :, :L]


def _choose_block(length: int) -> int:
    """Return the largest block that pads ``length`` by at most a third, else the smallest."""
    fitting = [block for block in BLOCKS if 3 * (-length % block) <= length]
    return fitting[0] if fitting else LEAST_BLOCK


def _pad_columns(x, block: int):
    """Right-pad axis -2, the columns, to a multiple of ``block``; no real query attends to the padding."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % block), (0, 0)])


def _make_kernel(mask, heads: int, block_q: int, block_kv: int, with_normaliser: bool):
    sizes = kernel_lib.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q,
        block_kv_dq=block_kv,
    )  # fmt: skip
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        save_residuals=with_normaliser, interpret=platform() != "tpu",
    )  # fmt: skip


def _make_causal_kernel(q, block: int, with_normaliser: bool):
    L = q.shape[2]
    return _make_kernel(mask_lib.CausalMask((L, L)), q.shape[1], block, block, with_normaliser)


def _make_own_part(block: int) -> Part:
    """Every row's columns by themselves."""

    def forward(q, k, v, segment_BxL):
        kernel = _make_causal_kernel(q, block, True)
        out, (normaliser,) = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernel_lib.SegmentIds(s, s)))(
            q, k, v, segment_BxL
        )
        return out, normaliser

    def backward(q, k, v, segment_BxL, out, normaliser, d_out):
        kernel = _make_causal_kernel(q, block, True)

        def of_row(q, k, v, s, *results):
            return _run_backward(kernel, q, k, v, kernel_lib.SegmentIds(s, s), *results)

        return jax.vmap(of_row)(q, k, v, segment_BxL, out, normaliser, d_out)

    return Part(forward, backward)


def _make_prefix_part(C: int, block: int, prefix_block: int) -> Part:
    """The queries of all rows, as one long sequence, against one set of C keys and their padding."""

    def prepare(q, k):
        queries = q.shape[0] * q.shape[2]
        kernel = _make_kernel(mask_lib.FullMask((queries, k.shape[1])), q.shape[1], block, prefix_block, True)
        is_key = (jnp.arange(k.shape[1]) < C).astype(jnp.int32)
        return kernel, kernel_lib.SegmentIds(jnp.ones(queries, jnp.int32), is_key)

    def forward(q, k, v, _):
        kernel, segments = prepare(q, k)
        out, (normaliser,) = kernel(_join_rows(q), k, v, segments)
        return _separate_rows(out, q.shape[0]), _separate_rows(normaliser, q.shape[0])

    def backward(q, k, v, _, out, normaliser, d_out):
        kernel, segments = prepare(q, k)
        results = (_join_rows(x) for x in (out, normaliser, d_out))
        d_q, d_k, d_v = _run_backward(kernel, _join_rows(q), k, v, segments, *results)
        return _separate_rows(d_q, q.shape[0]), d_k, d_v

    return Part(forward, backward)


def _join_rows(x):
    """[B, H, L, ...] -> [H, B*L, ...]"""
    B, H, L = x.shape[:3]
    return x.swapaxes(0, 1).reshape(H, B * L, *x.shape[3:])


def _separate_rows(x, B: int):
    """[H, B*L, ...] -> [B, H, L, ...]"""
    H, queries = x.shape[:2]
    return x.reshape(H, B, queries // B, *x.shape[2:]).swapaxes(0, 1)


def _run_backward(kernel, q, k, v, segments, out, normaliser, d_out):
    """Run the library's backward kernels on this output and normaliser, which its public function does not take."""
    arguments = {name: value for name, value in kernel.kwargs.items() if name != "save_residuals"}
    kept = (q, k, v, segments, None, out, normaliser, kernel.dq_mask_info, kernel.dkv_mask_info)
    gradients = kernel_lib._splash_attention_bwd(False, *(arguments[name] for name in _BACKWARD), kept, d_out)
    return gradients[3:6]
