"""Divergences between two next-token distributions: logits in, nats per token out.

``divergence`` takes student and teacher logits [..., V], any float dtype, and returns float32 [...]. Masks, means and
stop_gradient belong to the losses. By default sums run over the whole vocabulary. A ``Support`` restricts them to a few
tokens, like codebases that cannot hold all logits.

To add a divergence: one function of log-probabilities, and a line in DIVERGENCES.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Support:
    """The tokens that a divergence sums over, and how it treats the probability outside of them.

    ``kind``: "full", or the ``k`` likeliest tokens of the teacher ("teacher_top_k"), of the student ("student_top_k")
    or of either ("union_top_k").
    ``remainder``: "renormalise" scales both distributions up to sum to 1 on the support. "tail" adds the rest of the
    probability as one more outcome; this is a lower bound of the full divergence (data processing inequality). "raw"
    changes nothing, like OPCD's reference code with the student's top 256. A raw sum is not a divergence: it can be
    negative, and its gradient pushes probability out of the support.
    """

    kind: str = "full"
    k: int = 256
    remainder: str = "renormalise"


SUPPORTS = ("full", "teacher_top_k", "student_top_k", "union_top_k")
REMAINDERS = ("renormalise", "tail", "raw")


def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities in float32, over the last axis."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _top_ids(logits: jax.Array, k: int) -> jax.Array:
    return jax.lax.top_k(stop_gradient(logits), min(k, logits.shape[-1]))[1]


def support_ids(student: jax.Array, teacher: jax.Array, support: Support) -> tuple[jax.Array, jax.Array]:
    """Return (token ids, whether each counts), [..., k], or [..., 2k] for the union, in which a duplicate counts once.

    The choice of tokens has no gradient.
    """
    if support.kind == "teacher_top_k":
        ids = _top_ids(teacher, support.k)
        return ids, ids >= 0
    ids = _top_ids(student, support.k)
    counts = ids >= 0
    if support.kind == "union_top_k":
        more = _top_ids(teacher, support.k)
        is_new = jnp.all(more[..., :, None] != ids[..., None, :], axis=-1)
        ids, counts = jnp.concatenate([ids, more], axis=-1), jnp.concatenate([counts, is_new], axis=-1)
    return ids, counts


def support_mass(logits: jax.Array, ids: jax.Array, counts: jax.Array) -> jax.Array:
    """Return the probability of the support under ``logits``, in [0, 1]."""
    logp = jnp.take_along_axis(log_softmax(logits), ids, axis=-1)
    return jnp.sum(jnp.where(counts, jnp.exp(logp), 0.0), axis=-1)


def _is_among(row_V: jax.Array, ids_K: jax.Array) -> jax.Array:
    return jnp.zeros_like(row_V, bool).at[ids_K].set(True)


def _restrict(logits: jax.Array, ids: jax.Array, counts: jax.Array, remainder: str) -> jax.Array:
    """Return log-probabilities over the support (and the tail); -inf for entries that do not count."""
    if remainder == "renormalise":
        return log_softmax(jnp.where(counts, jnp.take_along_axis(logits, ids, axis=-1), -jnp.inf))
    logp = jnp.where(counts, jnp.take_along_axis(log_softmax(logits), ids, axis=-1), -jnp.inf)
    if remainder == "raw":
        return logp
    # The tail is the sum over tokens outside; 1 - inside would be rounding noise if the tail is small.
    inside_of = _is_among
    for _ in logits.shape[:-1]:  # vmap, because a scatter over several axes does not infer its output sharding
        inside_of = jax.vmap(inside_of)
    is_inside = inside_of(logits, ids)
    # -1e30 and not -inf: with no probability outside, log(0) would make the gradient NaN.
    nothing = is_inside | (logits == -jnp.inf)
    outside = jax.nn.logsumexp(jnp.where(nothing, -1e30, logits.astype(jnp.float32)), axis=-1, keepdims=True)
    tail = outside - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    return jnp.concatenate([logp, tail], axis=-1)


def _kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """sum_v p_v (log p_v - log q_v).

    An outcome of probability 0 under p contributes 0. Its log-ratio is replaced before the product, so that value and
    gradient stay finite if q excludes it too.
    """
    p = jnp.exp(logp)
    present = p > 0
    ratio = jnp.where(present, logp, 0.0) - jnp.where(present, logq, 0.0)
    return jnp.sum(p * ratio, axis=-1)


def _log_mixture(logp: jax.Array, logq: jax.Array, weight: float) -> jax.Array:
    """log(weight p + (1 - weight) q). Outcomes that both exclude stay excluded, with gradient 0."""
    excluded = (logp == -jnp.inf) & (logq == -jnp.inf)
    a = math.log(weight) + jnp.where(excluded, 0.0, logp)
    b = math.log1p(-weight) + jnp.where(excluded, 0.0, logq)
    return jnp.where(excluded, -jnp.inf, jnp.logaddexp(a, b))


def _jensen_shannon(student, teacher, alpha):
    mixture = _log_mixture(teacher, student, alpha)
    return alpha * _kl(teacher, mixture) + (1 - alpha) * _kl(student, mixture)


# (student's log-probabilities, teacher's, alpha) -> nats. Some divergences have a parameter alpha in (0, 1).
DIVERGENCES = {
    # Mode-seeking; the OPCD objective, KL(student || teacher), arXiv 2602.12275.
    "reverse_kl": lambda student, teacher, alpha: _kl(student, teacher),
    # Mass-covering; classical distillation, and the form of the anchor: KL(teacher || student).
    "forward_kl": lambda student, teacher, alpha: _kl(teacher, student),
    # Jensen-Shannon of GKD, arXiv 2306.13649: alpha KL(t || m) + (1-alpha) KL(s || m), m = alpha t + (1-alpha) s.
    "jsd": _jensen_shannon,
    # DistiLLM, arXiv 2402.03898: KL(t || alpha t + (1-alpha) s), and KL(s || alpha s + (1-alpha) t).
    "skewed_forward_kl": lambda student, teacher, alpha: _kl(teacher, _log_mixture(teacher, student, alpha)),
    "skewed_reverse_kl": lambda student, teacher, alpha: _kl(student, _log_mixture(student, teacher, alpha)),
}


def divergence(
    name: str, student: jax.Array, teacher: jax.Array, alpha: float = 0.5, support: Support = Support()
) -> jax.Array:
    """Return the divergence ``name`` (a key of DIVERGENCES) in nats, float32 [...]."""
    if support.kind == "full":
        student, teacher = log_softmax(student), log_softmax(teacher)
    else:
        ids, counts = support_ids(student, teacher, support)
        student = _restrict(student, ids, counts, support.remainder)
        teacher = _restrict(teacher, ids, counts, support.remainder)
    return DIVERGENCES[name](student, teacher, alpha)


def kl(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """Return KL(p || q) = sum_v p_v (log p_v - log q_v) over the whole vocabulary, nats, float32 [...]."""
    return _kl(log_softmax(logits_p), log_softmax(logits_q))


def entropy(logits: jax.Array) -> jax.Array:
    """Return the Shannon entropy in nats, float32 [...]."""
    logp = log_softmax(logits)
    return -jnp.sum(jnp.exp(logp) * jnp.where(logp > -jnp.inf, logp, 0.0), axis=-1)


def token_logprob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return log p(token) in nats, float32 [...]. A masked sum instead of a gather: the vocabulary may be sharded."""
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    chosen = jnp.sum(jnp.where(is_token, logits.astype(jnp.float32), 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
