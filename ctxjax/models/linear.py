"""One matrix of a layer applied to activations: the product on a mesh, and what may stand beside the matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctxjax.sharding import all_gather_embed, batch_spec


def project(weights: dict, name: str, x_BxLxI: jax.Array, inputs: str, outputs: str) -> jax.Array:
    """x @ W, [B, L, O] in x's dtype, with the bias and the low-rank update (models/lora.py) that ``weights``, one
    layer's, hold beside W. ``inputs`` and ``outputs`` are the logical axes of W."""
    out_BxLxO = _product(x_BxLxI, weights[name], inputs, outputs)
    if f"{name}_bias" in weights:
        out_BxLxO += weights[f"{name}_bias"].astype(x_BxLxI.dtype)
    if f"{name}_lora_a" in weights:
        low_BxLxR = _product(x_BxLxI, weights[f"{name}_lora_a"], inputs, None)
        out_BxLxO += _product(low_BxLxR, weights[f"{name}_lora_b"], None, outputs)
    return out_BxLxO


def _product(x_BxLxI: jax.Array, weight_IxO: jax.Array, inputs: str | None, outputs: str | None) -> jax.Array:
    """Activations are whole along ``embed``; a contraction over shards is summed here. Weights are cast before they are
    gathered: half as much is sent in half precision, and the compiler does not see that by itself."""
    weight_IxO = all_gather_embed(weight_IxO.astype(x_BxLxI.dtype), inputs, outputs)
    place = batch_spec(None, None if outputs == "embed" else outputs)
    return jnp.einsum("bli,io->blo", x_BxLxI, weight_IxO, out_sharding=place)
