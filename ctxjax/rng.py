"""Randomness as a pure function of (root key, step, stream, row, position): the only fold_in calls.

Nothing here depends on the batch's size or order, the number of devices or hosts, or on how often the
run was restarted; so neither do the sampled tokens.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

STREAMS = {"init": 0, "rollout": 1, "retention": 2, "evaluation": 3, "pretraining": 4, "adapter": 5, "policy": 6}


def key_for(root: jax.Array, step: jax.Array | int, stream: str) -> jax.Array:
    """The key of one named stream at one step."""
    return jax.random.fold_in(jax.random.fold_in(root, STREAMS[stream]), step)


def row_keys(key: jax.Array, row_number_B: jax.Array) -> jax.Array:
    """One key for each row, [B], by the row's identity and not by its place in the batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_number_B)


def sample_keys(row_keys_B: jax.Array, count: int) -> jax.Array:
    """The keys [B * count] of ``count`` samples of each row, a row's one after the other. One sample has the row's."""
    if count == 1:
        return row_keys_B
    keys_BxS = _by_place(jax.random.fold_in, row_keys_B, count)
    return jnp.reshape(keys_BxS, (-1,), out_sharding=jax.P(jax.typeof(row_keys_B).sharding.spec[0]))


def token_uniforms(row_keys_B: jax.Array, count: int) -> jax.Array:
    """Uniform numbers in [0, 1) for response positions 0 to ``count`` - 1 of each row, float32 [B, count]: each a
    function of its row's key and its position alone."""
    return _by_place(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)), row_keys_B, count)


def _by_place(function, row_keys_B: jax.Array, count: int) -> jax.Array:
    """function(key, place) of every row's key and the places 0 to ``count`` - 1, [B, count].

    The places are an array of all rows, sharded as the keys are: places of one row that all share lose the sharding of
    a batch of one row on the way."""
    sharding = jax.typeof(row_keys_B).sharding
    spec = None if sharding.mesh.empty else jax.P(sharding.spec[0], None)
    place_BxN = lax.broadcasted_iota(jnp.int32, (*row_keys_B.shape, count), 1, out_sharding=spec)
    return jax.vmap(jax.vmap(function, in_axes=(None, 0)))(row_keys_B, place_BxN)
