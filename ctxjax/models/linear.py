"""Apply one matrix of a layer to activations on a mesh, with its bias and its low-rank update."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax.sharding import all_gather_embed, batch_spec, platform


def find_precision(x: jax.Array) -> lax.Precision | None:
    """Return the precision of a matrix product of x and an array of its dtype.

    By default TPUs round float32 operands to bfloat16, and GPUs to TF32 (10 bits of 23), so that a float32 model would
    not compute in float32. Half precision is left to the platform: its products lose nothing.
    """
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def project(weights: dict, name: str, x_BxLxI: jax.Array, inputs: str, outputs: str) -> jax.Array:
    """Return x @ W [B, L, O] in x's dtype, plus the bias and the low-rank update (models/lora.py) if ``weights``, one
    layer's, have them. ``inputs`` and ``outputs`` are the logical axes of W."""
    out_BxLxO = _product(x_BxLxI, weights[name], inputs, outputs)
    if f"{name}_bias" in weights:
        out_BxLxO += weights[f"{name}_bias"].astype(x_BxLxI.dtype)
    if f"{name}_lora_a" in weights:
        low_BxLxR = _product(x_BxLxI, weights[f"{name}_lora_a"], inputs, None)
        out_BxLxO += _product(low_BxLxR, weights[f"{name}_lora_b"], None, outputs)
    return out_BxLxO


def _product(x_BxLxI: jax.Array, weight_IxO: jax.Array, inputs: str | None, outputs: str | None) -> jax.Array:
    """Return x @ W, summed over shards of the contracted axis; activations are never sharded along ``embed``.

    Weights are cast before the all-gather, so that half precision halves the traffic; the compiler does not do this.
    On CPUs rows and columns are one axis of the product: for the weight's gradient, which is summed over both, the
    compiler would make a transposed copy of an operand (benchmarks/README.md, "Choices in models/").
    """
    weight_IxO = all_gather_embed(weight_IxO.astype(x_BxLxI.dtype), inputs, outputs)
    precision = find_precision(x_BxLxI)
    inside, outside = (None if axis == "embed" else axis for axis in (inputs, outputs))
    if platform() != "cpu":
        out_spec = batch_spec(None, outside)
        return jnp.einsum("bli,io->blo", x_BxLxI, weight_IxO, precision=precision, out_sharding=out_spec)
    B, L, size = x_BxLxI.shape
    x_NxI = jnp.reshape(x_BxLxI, (B * L, size), out_sharding=batch_spec(inside))
    out_NxO = jnp.einsum("ni,io->no", x_NxI, weight_IxO, precision=precision, out_sharding=batch_spec(outside))
    return jnp.reshape(out_NxO, (B, L, weight_IxO.shape[1]), out_sharding=batch_spec(None, outside))
