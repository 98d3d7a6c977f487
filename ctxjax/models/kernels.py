"""Attention kernels of accelerators. They never hold all scores, [B, H, L, M], in memory.

    splash   Pallas, on TPUs, from jax.experimental; also with a prefix that all rows share
    cudnn    cuDNN's flash attention, on GPUs, through jax.nn.dot_product_attention; without a prefix

Both take q [B, H, L, Dh], k and v [B, K, L, Dh], ``real_BxL`` and one layer's prefix, and return what
attention.self_attention returns in columns of real tokens; padding columns, which nothing reads, differ. Each device
runs the kernel on its own rows and heads. Measurements: benchmarks/README.md, "accelerator.py".

Tests run without an accelerator: cudnn as the same program on XLA's own attention, splash in Pallas's interpreter.
Splash was compiled ahead of time for TPU v5e and never timed; its block sizes are MaxText's for v5 chips.
"""

from __future__ import annotations

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ctxjax.models.architecture import ModelConfig
from ctxjax.sharding import batch_spec, platform, weight_spec
from ctxjax.types import PrefixKV

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel_lib,
        splash_attention_mask as mask_lib,
    )
except ImportError:  # it may leave jax.experimental; ``check_splash`` then says so
    kernel_lib = mask_lib = None

BLOCKS = (512, 256, 128)  # columns of a block of splash; its products need multiples of 128
LEAST_BLOCK = BLOCKS[-1]

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


def find_obstacle(kernel: str, config: ModelConfig, device: jax.Device) -> str:
    """Return why a kernel cannot compute this model's attention on such devices, or ""."""
    if device.platform != PLATFORMS[kernel]:
        return f"runs on {PLATFORMS[kernel]}, and the devices are {device.platform}"
    if any(kind.window for kind in config.kinds):
        return "has no windows, and layers of the model have"
    if kernel == "splash":
        return ""
    if config.dtype == "float32":
        return "has no float32, and model.dtype is float32"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"takes a head_dim of at most 128 that 8 divides, and the model's is {config.head_dim}"
    version = getattr(device, "compute_capability", "unknown")  # such as "8.0"; on AMD's "gfx942"
    if not version.split(".")[0].isdecimal() or float(version) < 8:
        return f"needs a compute capability of 8.0 or more, and the devices have {version}"
    return ""


def _run_per_device(function, q, k, v, real_BxL, prefix: PrefixKV | None):
    """Run ``function`` on each device's own rows and heads."""
    own, shared = batch_spec("kv_heads", None, None), weight_spec(("kv_heads", None, None))
    real_BxL = jax.reshard(real_BxL, batch_spec(None))
    specs = (batch_spec("heads", None, None), own, own, batch_spec(None))
    arguments = (q, k, v, real_BxL)
    if prefix is not None:
        arguments, specs = (*arguments, prefix), (*specs, PrefixKV(shared, shared))
    # No check of how outputs vary over the mesh: kernels do not declare it.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


# --- Splash ---


def check_splash() -> None:
    """Raise ValueError if the installed JAX has not the function of its splash that ``_run_backward`` calls."""
    backward, kept = (getattr(kernel_lib, name, None) for name in ("_splash_attention_bwd", "SplashResidualsType"))
    known = ("save_residuals", *_BACKWARD, "res", "do")
    if backward is None or tuple(inspect.signature(backward).parameters) != known or len(typing.get_args(kept)) != 9:
        raise ValueError(
            f"splash attention of JAX {jax.__version__}, which is installed, is not the one that ctxjax knows; use "
            "model.attention=reference, or install JAX 0.10.2"
        )


def splash(q, k, v, real_BxL, prefix: PrefixKV | None) -> jax.Array:
    """Self-attention by splash. Padding is a segment of its own. A second kernel reads the prefix: it takes the queries
    of all rows as one long sequence against one set of keys (``_with_prefix``)."""
    return _run_per_device(_splash, q, k, v, real_BxL, prefix)


def _splash(q, k, v, real_BxL, prefix: PrefixKV | None = None):
    L, block = q.shape[2], _choose_block(q.shape[2])
    q, k, v = (_pad_columns(x, block) for x in (q * q.shape[3] ** -0.5, k, v))
    segment_BxL = jnp.pad(real_BxL.astype(jnp.int32), [(0, 0), (0, q.shape[2] - L)])
    if prefix is None:
        rows = _make_causal_kernel(q, block, with_normaliser=False)
        return jax.vmap(lambda q, k, v, s: rows(q, k, v, kernel_lib.SegmentIds(s, s)))(q, k, v, segment_BxL)[:, :, :L]
    C, prefix_block = prefix.keys.shape[1], _choose_block(prefix.keys.shape[1])
    prefix_k, prefix_v = (_pad_columns(x, prefix_block) for x in (prefix.keys, prefix.values))
    segment_C = (jnp.arange(prefix_k.shape[1]) < C).astype(jnp.int32)
    return _with_prefix(block, prefix_block, q, k, v, prefix_k, prefix_v, segment_BxL, segment_C)[:, :, :L]


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


def _make_prefix_kernel(q, k_KxCxDh, block: int, prefix_block: int):
    shape = (q.shape[0] * q.shape[2], k_KxCxDh.shape[1])
    return _make_kernel(mask_lib.FullMask(shape), q.shape[1], block, prefix_block, True)


def _join_rows(x_BxHxLxN):
    B, H, L, N = x_BxHxLxN.shape
    return x_BxHxLxN.swapaxes(0, 1).reshape(H, B * L, N)


def _separate_rows(x_HxQxN, B: int):
    H, Q, N = x_HxQxN.shape
    return x_HxQxN.reshape(H, B, Q // B, N).swapaxes(0, 1)


def _prefix_segments(q, segment_C):
    return kernel_lib.SegmentIds(jnp.ones(q.shape[0] * q.shape[2], jnp.int32), segment_C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_prefix(block, prefix_block, q, k, v, prefix_k, prefix_v, segment_BxL, segment_C):
    """One softmax over two sources. Each kernel returns what it read and the logarithm of its normaliser, by which the
    parts are weighted. In the backward pass each kernel gets the joint output and normaliser instead of its own, and
    so computes its source's part of the gradient."""
    return _with_prefix_forward(block, prefix_block, q, k, v, prefix_k, prefix_v, segment_BxL, segment_C)[0]


def _with_prefix_forward(block, prefix_block, q, k, v, prefix_k, prefix_v, segment_BxL, segment_C):
    rows, shared = _make_causal_kernel(q, block, True), _make_prefix_kernel(q, prefix_k, block, prefix_block)
    own, (total,) = jax.vmap(lambda q, k, v, s: rows(q, k, v, kernel_lib.SegmentIds(s, s)))(q, k, v, segment_BxL)
    read, (prefix_total,) = shared(_join_rows(q), prefix_k, prefix_v, _prefix_segments(q, segment_C))
    read, prefix_total = (_separate_rows(x, q.shape[0]) for x in (read, prefix_total[..., None]))
    total = total[..., None]
    joint = jnp.logaddexp(total, prefix_total)
    out = own * jnp.exp(total - joint) + read * jnp.exp(prefix_total - joint)
    out = out.astype(q.dtype)
    return out, (q, k, v, prefix_k, prefix_v, segment_BxL, segment_C, out, joint[..., 0])


def _with_prefix_backward(block, prefix_block, kept, d_out):
    q, k, v, prefix_k, prefix_v, segment_BxL, segment_C, out, joint = kept

    def of_row(q, k, v, s, out, joint, d_out):
        rows = _make_causal_kernel(q[None], block, True)
        return _run_backward(rows, q, k, v, kernel_lib.SegmentIds(s, s), out, joint, d_out)

    d_q, d_k, d_v = jax.vmap(of_row)(q, k, v, segment_BxL, out, joint, d_out)
    flat_q, flat_out, flat_d_out, flat_joint = (_join_rows(x) for x in (q, out, d_out, joint[..., None]))
    shared, segments = _make_prefix_kernel(q, prefix_k, block, prefix_block), _prefix_segments(q, segment_C)
    more_d_q, d_prefix_k, d_prefix_v = _run_backward(
        shared, flat_q, prefix_k, prefix_v, segments, flat_out, flat_joint[..., 0], flat_d_out
    )
    d_q += _separate_rows(more_d_q, q.shape[0])
    zeros = (np.zeros(x.shape, jax.dtypes.float0) for x in (segment_BxL, segment_C))
    return d_q, d_k, d_v, d_prefix_k, d_prefix_v, *zeros


_with_prefix.defvjp(_with_prefix_forward, _with_prefix_backward)


def _run_backward(kernel, q, k, v, segments, out, normaliser, d_out):
    """Run the library's backward kernels on this output and normaliser, which its public function does not take."""
    arguments = {name: value for name, value in kernel.kwargs.items() if name != "save_residuals"}
    kept = (q, k, v, segments, None, out, normaliser, kernel.dq_mask_info, kernel.dkv_mask_info)
    gradients = kernel_lib._splash_attention_bwd(False, *(arguments[name] for name in _BACKWARD), kept, d_out)
    return gradients[3:6]


_BACKWARD = (
    "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function", "attn_logits_soft_cap",
    "interpret",
)  # fmt: skip


# --- cuDNN ---


def cudnn(q, k, v, real_BxL, prefix: None, implementation: str = "cudnn") -> jax.Array:
    """Self-attention by cuDNN. Roll each row so that left padding becomes right padding, which the causal mask hides;
    a padding mask would be an array [B, 1, L, L]."""
    return _run_per_device(functools.partial(_cudnn, implementation), q, k, v, real_BxL, prefix)


def _cudnn(implementation: str, q, k, v, real_BxL):
    L = q.shape[2]
    padding_B = jnp.argmax(real_BxL, axis=1)

    def roll(x_BxNxLxDh, by_B):
        columns_BxL = (jnp.arange(L) + by_B[:, None]) % L
        return jnp.take_along_axis(x_BxNxLxDh, columns_BxL[:, None, :, None], axis=2)

    # cuDNN needs an even number of columns; none of the others reads one that is added on the right.
    even = [(0, 0), (0, L % 2), (0, 0), (0, 0)]
    q, k, v = (jnp.pad(roll(x, padding_B).swapaxes(1, 2), even) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return roll(out[:, :L].swapaxes(1, 2), -padding_B)
