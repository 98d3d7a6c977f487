"""Attention kernels of accelerators. They never hold all scores, [B, H, L, M], in memory.

    splash   Pallas, on TPUs (splash.py)
    cudnn    cuDNN's flash attention, on GPUs (cudnn.py)

Both take q [B, H, L, Dh], k and v [B, K, L, Dh], ``real_BxL`` and one layer's prefix or None, and return what
attention.self_attention returns in columns of real tokens; padding columns, which nothing reads, differ. Behind a
prefix they are two kernels, whose results cascade.py joins. Each device runs them on its own rows and heads.
Measurements: benchmarks/README.md, "accelerator.py".

Tests run without an accelerator: splash in Pallas's interpreter, cudnn on plain products in place of cuDNN's; its
arguments are checked by the lowering for CUDA.
"""

from __future__ import annotations

import jax

from ctxjax.models import cudnn as cudnn_lib, splash as splash_lib
from ctxjax.models.architecture import ModelConfig
from ctxjax.sharding import batch_spec, weight_spec
from ctxjax.types import PrefixKV

LEAST_KEYS = splash_lib.LEAST_BLOCK  # fewer are not worth a kernel
LIBRARIES = {"splash": splash_lib, "cudnn": cudnn_lib}
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


def check_library(kernel: str) -> None:
    """Raise ValueError if the installed JAX has not the private functions that this kernel's file calls."""
    if not LIBRARIES[kernel].is_known():
        raise ValueError(
            f"{kernel} attention of JAX {jax.__version__}, which is installed, is not the one that ctxjax knows; use "
            "model.attention=reference, or install JAX 0.10.2"
        )


def splash(q, k, v, real_BxL, prefix: PrefixKV | None) -> jax.Array:
    """Self-attention by splash."""
    return run_per_device(splash_lib.attend, q, k, v, real_BxL, prefix)


def cudnn(q, k, v, real_BxL, prefix: PrefixKV | None) -> jax.Array:
    """Self-attention by cuDNN."""
    return run_per_device(cudnn_lib.attend, q, k, v, real_BxL, prefix)


def run_per_device(function, q, k, v, real_BxL, prefix: PrefixKV | None):
    """Run ``function`` on each device's own rows and heads."""
    own, shared = batch_spec("kv_heads", None, None), weight_spec(("kv_heads", None, None))
    real_BxL = jax.reshard(real_BxL, batch_spec(None))
    specs = (batch_spec("heads", None, None), own, own, batch_spec(None))
    arguments = (q, k, v, real_BxL)
    if prefix is not None:
        arguments, specs = (*arguments, prefix), (*specs, PrefixKV(shared, shared))
    # No check of how outputs vary over the mesh: kernels do not declare it.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)
