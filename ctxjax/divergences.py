"""Divergences between two next-token distributions: logits in, nats per token out.

Every function takes student and teacher logits [..., V], any float dtype, and returns float32 [...].
No masks, no means, no stop_gradient: those belong to the losses. Sums run over the whole vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities in float32, over the last axis."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def kl(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), in nats.

    A token of probability 0 under p contributes 0; its log-ratio is replaced before the product, so that
    neither value nor gradient turns into NaN when q excludes it too.
    """
    logp, logq = log_softmax(logits_p), log_softmax(logits_q)
    p = jnp.exp(logp)
    ratio = jnp.where(p > 0, logp - logq, 0.0)
    return jnp.sum(p * ratio, axis=-1)


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(student || teacher): mode-seeking; the OPCD objective (arXiv 2602.12275)."""
    return kl(student, teacher)


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student): mass-covering; classical distillation, and the form of the anchor."""
    return kl(teacher, student)


def entropy(logits: jax.Array) -> jax.Array:
    """Shannon entropy in nats."""
    logp = log_softmax(logits)
    return -jnp.sum(jnp.exp(logp) * jnp.where(logp > -jnp.inf, logp, 0.0), axis=-1)


def token_logprob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p(token), nats: a masked sum and not a gather, so that the vocabulary may be sharded."""
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    chosen = jnp.sum(jnp.where(is_token, logits.astype(jnp.float32), 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}
