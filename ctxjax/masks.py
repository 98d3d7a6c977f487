"""Positions, attention masks and the response window: the only code that shifts or hides tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctxjax.types import Prompts, Rollout


def positions(mask_BxL: jax.Array) -> jax.Array:
    """Return rotary positions [B, L]: real tokens count 0, 1, 2, ... however much padding there is.

    >>> positions([[F, F, T, T, T]])  ->  [[0, 0, 0, 1, 2]]
    """
    return jnp.maximum(jnp.cumsum(mask_BxL, axis=1, dtype=jnp.int32) - 1, 0)


def causal(
    real_BxM: jax.Array,
    columns_BxL: jax.Array | None = None,
    window: int | jax.Array | None = None,
    key_columns_M: jax.Array | None = None,
) -> jax.Array:
    """Return the attention mask [B, L, M]: True if the query in column c may read the key of column m, that is, it is a
    real token, m <= c, and with a ``window`` also m > c - window.

    ``columns_BxL`` are the queries' columns, None: all, one query for every key. ``real`` and ``columns`` may have one
    row for all. ``key_columns_M`` are the keys' columns, None: 0, 1, 2, ... A padding query reads itself, so that no
    softmax row is empty; nothing else reads it. Build such masks for a few columns at a time (models/attention.py): a
    whole one grows with the square of the length.
    """
    columns_BxL = jnp.arange(real_BxM.shape[1])[None] if columns_BxL is None else columns_BxL
    key_M = jnp.arange(real_BxM.shape[1]) if key_columns_M is None else key_columns_M
    column_BxLx1 = columns_BxL[..., None]
    is_read = (key_M <= column_BxLx1) & real_BxM[:, None, :]
    if window is not None:
        is_read &= key_M > column_BxLx1 - window
    return is_read | (key_M == column_BxLx1)


def join_response(prompts: Prompts, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """Return the sequence that a scoring pass reads, (tokens, mask), each [B, P + T - 1].

    The last response token is left out: it is predicted, and predicts nothing.
    """
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT[:, :-1]], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT[:, :-1]], axis=1)
    return tokens, mask


def response_window(values_BxL: jax.Array, prompt_length: int) -> jax.Array:
    """Return the columns whose outputs predict the response: the project's only next-token shift.

    With P = 3 prompt columns and T = 2 response tokens, ``join_response`` gives 4 columns::

        read      p0  p1  p2  y0
        predicts  p1  p2  y0  y1      -> columns 2 and 3, that is, P-1 onwards
    """
    return values_BxL[:, prompt_length - 1 :]


def until_eos(tokens_BxT: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Return the response mask [B, T]: True up to and including the first end token; all True if there is none."""
    is_eos_BxT = is_any(tokens_BxT, eos_ids)
    ended_before_BxT = jnp.cumsum(is_eos_BxT, axis=1) - is_eos_BxT > 0
    return ~ended_before_BxT


def is_any(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Return whether each token is one of ``ids`` (static; may be empty)."""
    found = jnp.zeros_like(tokens, bool)
    for token in ids:
        found |= tokens == token
    return found
