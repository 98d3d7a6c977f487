"""Grouped-query attention: what every layer of every family reads its context with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctxjax.sharding import batch_spec


def attention(q_BxHxLxDh, k_BxKxMxDh, v_BxKxMxDh, mask_BxLxM) -> jax.Array:
    """Grouped-query attention, softmax in float32; the G = H/K query heads of a group share a key head.

    The group's heads are laid side by side with the queries, [B, K, G*L, Dh], so that both products are
    plain batched matrix products.
    """
    B, H, L, Dh = q_BxHxLxDh.shape
    K, M = k_BxKxMxDh.shape[1:3]
    grouped = batch_spec("kv_heads", None, None)
    q = jnp.reshape(q_BxHxLxDh * Dh**-0.5, (B, K, H // K * L, Dh), out_sharding=grouped)
    scores = jnp.einsum("bkqd,bkmd->bkqm", q, k_BxKxMxDh, preferred_element_type=jnp.float32)
    mask = jnp.tile(mask_BxLxM, (1, H // K, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v_BxKxMxDh.dtype)
    out = jnp.einsum("bkqm,bkmd->bkqd", weights, v_BxKxMxDh)
    return jnp.reshape(out, (B, H, L, Dh), out_sharding=batch_spec("heads", None, None))
