"""The losses per token: distillation, reference and retention; and which tokens count.

    L_distill = KL( q_x || sg f )                 on-policy context distillation, arXiv 2602.12275
    L_anchor  = KL( sg q_x || q_c )               No-Context Anchoring, arXiv 2606.11627: anchors.py
    L_retain  = KL( sg f' || q_c' )               the same student under another context c'
    L         = L_distill + beta * L_anchor + mu * L_retain

    q_x   student(. | x, y<t)          the bare student
    q_c   student(. | c, x, y<t)       the student when the context comes back
    f     teacher(. | c, x, y<t)       frozen, sees the context; with ``teacher`` = "ema" the student's moving average
    q_c', f'  student and frozen teacher (. | c', x', y'<t); the student sampled y' from (c', x')

On samples of the teacher, -log q_x(y_t) may replace the first term: "cross_entropy", supervised fine-tuning, which does
not need the teacher's distributions.

All losses are in nats per response token, over the whole vocabulary, at the rollout's temperature. ``q_x`` receives
gradient from the first term only, ``q_c`` from the second only. The first two terms share the response y and so one
denominator; that makes beta independent of the batch size. LossConfig has the variants that the literature compares.
Gradients are stopped in this file, in anchors.py, and in chunked_head.py, which lets none flow through metrics.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax import masks
from ctxjax.distill import divergences
from ctxjax.distill.divergences import Support, divergence, kl
from ctxjax.distill.terms import Logits, Term, constant, ramp
from ctxjax.types import Mean, Rollout, bounded

CROSS_ENTROPY = "cross_entropy"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective and its variants. A term of weight 0 is not computed: ``beta`` = 0 and ``mu`` = 0 are plain OPCD.

    divergence, alpha   of L_distill: a name in divergences.DIVERGENCES, and its parameter if it has one; or
                        "cross_entropy" of the response's own tokens
    off_policy_divergence   that of the off-policy steps, in an arm that has others, too; or "", the same. The
                        reverse KL hardly moves tokens that the teacher samples and the student never would; the
                        forward KL does
    support, top_k, remainder   the tokens that L_distill sums over: divergences.Support
    anchor              what L_anchor holds q_c to: a name in anchors.ANCHORS
    gate, gate_threshold   where the anchor is taken: a name in anchors.GATES, and the share of agreeing tokens that
                        "response" asks for
    beta, beta_ramp     weight of L_anchor; it rises from 0 over the first ``beta_ramp`` steps
    anchor_every        apply the anchor only every ``anchor_every`` steps; its weight is multiplied by
                        ``anchor_every``, so the average weight is unchanged
    mu, mu_ramp         weight of L_retain; it rises from 0 over the first ``mu_ramp`` steps
    reference           weight of KL(q_x || frozen teacher without context): a brake on drift
    clip                L_distill per token is cut at this many nats, without gradient above; 0: no clipping
    skip_first          do not train on the first tokens of a response
    masked_ids          do not train on these token ids
    drop_truncated      do not train on responses cut at the length limit
    teacher, ema_decay  "frozen", or "ema": f is the student's own moving average (decay per step), with context; the
                        frozen teacher remains the target of L_retain, of ``reference`` and of "teacher_bare"
    on_policy_fraction  probability that a step learns from the student's samples; otherwise it learns from the frozen
                        teacher's, sampled with the context
    off_policy_steps    this many first steps are off-policy, whatever the fraction
    temperature         divides the logits of all models
    averaging           "token_mean" (over all response tokens of the global batch) or "sequence_mean" (within each
                        response, then over responses)
    chunk               response columns whose logits exist at one time
    """

    divergence: str = "reverse_kl"
    off_policy_divergence: str = ""
    alpha: float = 0.5
    support: str = "full"
    top_k: int = 256
    remainder: str = "renormalise"
    anchor: str = "bare"
    gate: str = "none"
    gate_threshold: float = bounded(0.9, zero=True, at_most=1.0)
    beta: float = bounded(0.0, zero=True, at_most=1000.0)
    beta_ramp: int = bounded(0, zero=True)
    anchor_every: int = 1
    mu: float = bounded(0.0, zero=True, at_most=1000.0)
    mu_ramp: int = bounded(0, zero=True)
    reference: float = bounded(0.0, zero=True, at_most=1000.0)
    clip: float = bounded(0.0, zero=True)
    skip_first: int = bounded(0, zero=True)
    masked_ids: tuple[int, ...] = ()
    drop_truncated: bool = False
    teacher: str = "frozen"
    ema_decay: float = bounded(0.99, zero=True, at_most=1.0)
    on_policy_fraction: float = bounded(1.0, zero=True, at_most=1.0)
    off_policy_steps: int = bounded(0, zero=True)
    temperature: float = 1.0
    averaging: str = "token_mean"
    chunk: int = 128

    @property
    def needs_teacher(self) -> bool:
        """Whether L_distill compares distributions; "cross_entropy" needs the response's tokens only."""
        return self.divergence != CROSS_ENTROPY

    @property
    def of_off_policy_steps(self) -> LossConfig:
        """The objective of the steps that learn from the teacher's samples."""
        own = self.on_policy_fraction > 0 and self.off_policy_divergence
        return dataclasses.replace(self, divergence=own or self.divergence)

    @property
    def is_on_policy(self) -> bool:
        """Whether every step learns from the student's own samples."""
        return self.on_policy_fraction == 1 and self.off_policy_steps == 0


# --- Which tokens count, and how much ---


def trained_tokens(config: LossConfig, rollout: Rollout, eos_ids: tuple[int, ...]) -> jax.Array:
    """bool [B, T]: the response tokens that are trained on."""
    mask_BxT = rollout.mask_BxT & (jnp.arange(rollout.mask_BxT.shape[1]) >= config.skip_first)
    mask_BxT &= ~masks.is_any(rollout.tokens_BxT, config.masked_ids)
    if config.drop_truncated:
        ended_B = jnp.any(rollout.mask_BxT & masks.is_any(rollout.tokens_BxT, eos_ids), axis=1)
        mask_BxT &= ended_B[:, None]
    return mask_BxT


def token_weights(mask_BxT: jax.Array, averaging: str) -> jax.Array:
    """Share of each token in the objective's mean, float32 [B, T]. The shares sum to 1, or to 0 if no token counts."""
    if averaging == "token_mean":
        return mask_BxT / jnp.maximum(jnp.sum(mask_BxT), 1).astype(jnp.float32)
    tokens_B = jnp.sum(mask_BxT, axis=1)
    sequences = jnp.maximum(jnp.sum(tokens_B > 0), 1)
    return mask_BxT / (jnp.maximum(tokens_B, 1) * sequences)[:, None].astype(jnp.float32)


def average(values_BxT: jax.Array, mask_BxT: jax.Array, averaging: str) -> Mean:
    """Return the mean of ``values_BxT`` that ``token_weights`` takes, as (total, count): micro-batches can be added."""
    if averaging == "token_mean":
        return Mean.of(values_BxT, mask_BxT)
    tokens_B = jnp.sum(mask_BxT, axis=1)
    total_B = jnp.sum(jnp.where(mask_BxT, values_BxT, 0.0), axis=1)
    return Mean.of(total_B / jnp.maximum(tokens_B, 1), tokens_B > 0)


# --- The terms ---


def top1_agreement(logits: Logits) -> jax.Array:
    """Whether the bare student's likeliest token is the teacher's, bool [...]."""
    return jnp.argmax(logits["q_x"], -1) == jnp.argmax(logits["f"], -1)


def distillation_term(config: LossConfig) -> Term:
    """L_distill on y, and the metrics that the same logits give: entropies, agreement, log p(y), clipped share."""
    support = Support(config.support, config.top_k, config.remainder)

    def values(logits: Logits, tokens_Bxt) -> dict[str, jax.Array]:
        q_x, f = logits["q_x"], logits.get("f")
        logprob = divergences.token_logprob(q_x, tokens_Bxt)
        distill = distillation(config, q_x, f) if config.needs_teacher else -logprob
        result = {
            "distill": distill,
            "entropy": divergences.entropy(stop_gradient(q_x)),
            "logprob": stop_gradient(logprob),
        }
        if f is not None:
            result["teacher_entropy"] = divergences.entropy(stop_gradient(f))
            result["top1_agreement"] = top1_agreement(logits).astype(jnp.float32)
        if config.clip:
            result["clipped"] = (distill > config.clip).astype(jnp.float32)
            result["distill"] = jnp.minimum(distill, config.clip)
        if config.support != "full":
            ids, counts = divergences.support_ids(q_x, f, support)
            result["support_mass"] = divergences.support_mass(stop_gradient(q_x), ids, counts)
            result["teacher_support_mass"] = divergences.support_mass(stop_gradient(f), ids, counts)
        return result

    passes = ("q_x", "f") if config.needs_teacher else ("q_x",)
    return Term("distill", passes, values, needs_whole_vocabulary=config.support != "full")


def distillation(config: LossConfig, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """L_distill per token, [...]: KL(q_x || f), or the divergence and support that ``config`` names; not clipped."""
    support = Support(config.support, config.top_k, config.remainder)
    return divergence(config.divergence, student, stop_gradient(teacher), config.alpha, support)


def reference_term(config: LossConfig) -> Term | None:
    """reference * KL( q_x || sg f_x ), a brake on drift, or None if its weight is 0."""
    if config.reference == 0:
        return None
    return Term(
        name="reference",
        passes=("q_x", "f_x"),
        values=lambda logits, tokens: {"reference": kl(logits["q_x"], stop_gradient(logits["f_x"]))},
        weight=constant(config.reference),
    )


def retention_term(config: LossConfig) -> Term | None:
    """mu * L_retain on y', or None if mu is 0; mu rises over ``mu_ramp`` steps."""
    if config.mu == 0:
        return None
    return Term(
        name="retain",
        passes=("q_other", "f_other"),
        values=lambda logits, tokens: {"retain": kl(stop_gradient(logits["f_other"]), logits["q_other"])},
        weight=ramp(config.mu, config.mu_ramp),
    )
