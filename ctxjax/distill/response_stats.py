"""Statistics of sampled responses: length, truncation, repetition."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctxjax import masks
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.types import Mean, Rollout

NGRAM = 8  # tokens; shorter runs recur in good prose too
_MIX = 0x9E3779B1  # an odd multiplier with mixed bits, so that distinct n-grams rarely get the same hash


def response_metrics(rollout: Rollout, sampling: SamplingConfig) -> dict[str, jax.Array]:
    """Return float32 scalars: mean length in tokens (end token included), tokens of the batch, the share of responses
    cut at the length limit, and ``repetition``.

    A row without tokens is no response and does not count: a game's batch has such rows after an episode's end.
    """
    from_end = jnp.any(rollout.mask_BxT & masks.is_any(rollout.tokens_BxT, sampling.eos_ids), axis=1)
    length_B = jnp.sum(rollout.mask_BxT, axis=1)
    is_response = length_B > 0
    return {
        "response_length": Mean.of(length_B, is_response).value,
        "response_tokens": jnp.sum(rollout.mask_BxT, dtype=jnp.float32),
        "truncated": Mean.of(~from_end, is_response).value,
        "repetition": repetition(rollout).value,
    }


def repetition(rollout: Rollout, n: int = NGRAM) -> Mean:
    """Return the share of n-grams that occurred earlier in the same response: seq-rep-n of arXiv 1908.04319.

    0 if all n-grams are distinct; close to 1 if a response repeats a loop of any length. It sorts hashes, so it costs a
    sort of [B, T].
    """
    columns = rollout.tokens_BxT.shape[1] - n + 1
    if columns < 2:
        return Mean(jnp.float32(0), jnp.float32(0))
    tokens_BxT, nothing = rollout.tokens_BxT.astype(jnp.uint32), jnp.uint32(2**32 - 1)
    hash_BxT = jnp.zeros_like(tokens_BxT[:, :columns])
    for place in range(n):
        hash_BxT = hash_BxT * jnp.uint32(_MIX) + tokens_BxT[:, place : place + columns] + 1
    whole_BxT = rollout.mask_BxT[:, n - 1 :]
    ordered_BxT = jnp.sort(jnp.where(whole_BxT, hash_BxT, nothing), axis=1)
    again_BxT = (ordered_BxT[:, 1:] == ordered_BxT[:, :-1]) & (ordered_BxT[:, 1:] != nothing)
    return Mean(jnp.sum(again_BxT, dtype=jnp.float32), jnp.sum(whole_BxT, dtype=jnp.float32))
