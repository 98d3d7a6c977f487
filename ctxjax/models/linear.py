"""Apply one matrix of a layer to activations on a mesh, with its bias and its low-rank update."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctxjax.sharding import all_gather_embed, batch_spec


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
    """
    weight_IxO = all_gather_embed(weight_IxO.astype(x_BxLxI.dtype), inputs, outputs)
    place = batch_spec(None, None if outputs == "embed" else outputs)
    return jnp.einsum("bli,io->blo", x_BxLxI, weight_IxO, out_sharding=place)
