"""The cache of a layer with a window w is a ring: column c is in slot c mod S, of S = min(columns, w) slots.

The query in column c reads the columns above c - w, so nothing reads column c - w again, whose slot column c takes. As
long as no column has wrapped, columns and slots are the same, and the ring may still grow (types.KVCache.extend).
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp


def keep_last(x: jax.Array, window: int) -> jax.Array:
    """Return the columns of x [..., L, Dh] that later queries can read, each in its slot; all if ``window`` is 0."""
    L = x.shape[-2]
    if not window or window >= L:
        return x
    return jnp.roll(x[..., L - window :, :], L % window, axis=-2)


def find_keys(real_BxM: jax.Array, column: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Return what the slots hold when ``column`` is the last one written: whether it is a real token [B, S], and its
    column [S]. Slots that are not yet written have columns below 0, and are not real."""
    columns_S = column - (column - jnp.arange(slots)) % slots
    padded = jnp.pad(real_BxM, [(0, 0), (slots - 1, 0)])
    last_BxS = lax.dynamic_slice_in_dim(padded, column, slots, axis=1)  # of the columns column - S + 1 to column
    return jnp.roll(last_BxS, (column + 1) % slots, axis=1), columns_S
