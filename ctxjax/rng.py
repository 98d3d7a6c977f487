"""Randomness as a pure function of (root key, step, stream, row, position): the only fold_in calls.

Keys do not depend on the batch's size or order, on the number of devices or hosts, or on restarts. So neither do the
sampled tokens.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

STREAMS = {
    "init": 0, "rollout": 1, "retention": 2, "evaluation": 3, "pretraining": 4, "adapter": 5, "policy": 6,
    "experience": 7, "questions": 8,
}  # fmt: skip


def key_for(root: jax.Array, step: jax.Array | int, stream: str) -> jax.Array:
    """Return the key of one named stream at one step."""
    return jax.random.fold_in(jax.random.fold_in(root, STREAMS[stream]), step)


def row_keys(key: jax.Array, row_number_B: jax.Array) -> jax.Array:
    """Return one key per row, [B], from the row's number in the run, not from its index in the batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_number_B)


def sample_keys(row_keys_B: jax.Array, count: int) -> jax.Array:
    """Return keys [B * count] for ``count`` samples of each row, a row's samples adjacent; count 1: the rows' keys."""
    if count == 1:
        return row_keys_B
    keys_BxS = _by_position(jax.random.fold_in, row_keys_B, count)
    return jnp.reshape(keys_BxS, (-1,), out_sharding=jax.P(jax.typeof(row_keys_B).sharding.spec[0]))


def token_uniforms(row_keys_B: jax.Array, count: int) -> jax.Array:
    """Return uniform numbers in [0, 1) for response positions 0 to ``count`` - 1 of each row, float32 [B, count].

    Each depends only on its row's key and its position.
    """
    return _by_position(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)), row_keys_B, count)


def _by_position(function, row_keys_B: jax.Array, count: int) -> jax.Array:
    """Return function(key, position) for every row's key and the positions 0 to ``count`` - 1, [B, count].

    The positions are an array with all rows, sharded like the keys. One shared row of positions would lose the sharding
    of a batch of one row.
    """
    sharding = jax.typeof(row_keys_B).sharding
    spec = None if sharding.mesh.empty else jax.P(sharding.spec[0], None)
    position_BxN = lax.broadcasted_iota(jnp.int32, (*row_keys_B.shape, count), 1, out_sharding=spec)
    return jax.vmap(jax.vmap(function, in_axes=(None, 0)))(row_keys_B, position_BxN)
