"""The losses per token: distillation, anchoring and retention; and which tokens count.

    L_distill = KL( q_x || sg f )                 on-policy context distillation, arXiv 2602.12275
    L_anchor  = KL( sg q_x || q_c )               No-Context Anchoring, arXiv 2606.11627
    L_retain  = KL( sg f' || q_c' )               the same student under another context c'
    L         = L_distill + beta * L_anchor + mu * L_retain

    q_x   student(. | x, y<t)          the bare student
    q_c   student(. | c, x, y<t)       the student when the context comes back
    f     teacher(. | c, x, y<t)       frozen, sees the context
    q_c', f'  student and teacher (. | c', x', y'<t), where y' was sampled by the student from (c', x')

    On samples of the teacher, -log q_x(y_t) may take the place of the first term: "cross_entropy", supervised
    fine-tuning, which has no use for the teacher's distributions.

All in nats per response token, over the whole vocabulary, at the rollout's temperature. ``q_x`` receives gradient from
the first term only and ``q_c`` from the second only. The first two share the response y and so one denominator, which
makes beta portable between batch sizes. LossConfig has the variants that the literature compares; the other anchors
are in anchors.py, the other divergences in divergences.py; objective.py runs the passes and adds up. Gradients are
stopped in these files alone, and in chunked_head.py, which lets none flow through metrics.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax import masks, sharding
from ctxjax.distill import divergences
from ctxjax.distill.anchors import ANCHORS
from ctxjax.distill.divergences import Support, divergence, kl
from ctxjax.models.transformer import ModelConfig, finish_logits
from ctxjax.types import Mean, Rollout

GATES = ("none", "token", "response")
CROSS_ENTROPY = "cross_entropy"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective and its variants. ``beta`` = 0 and ``mu`` = 0 are plain OPCD: the passes that a term of weight 0
    needs are not run.

    divergence, alpha   of L_distill: a name in divergences.DIVERGENCES, and its parameter where it has one; or
                        "cross_entropy", of the response's own tokens
    support, top_k, remainder   the tokens that L_distill sums over: divergences.Support
    anchor              what L_anchor holds q_c to: a name in anchors.ANCHORS
    gate, gate_threshold   anchor only where the student has internalized: "none" (everywhere), "token" (where q_x's
                        likeliest token is f's), "response" (where that holds for this share of its tokens)
    beta, beta_ramp     weight of L_anchor; it rises from 0 over the first ``beta_ramp`` steps
    anchor_fraction     share of the rows that L_anchor is taken on, its weight divided by it
    anchor_every        L_anchor is taken in every so manieth step alone, its weight multiplied by it
    mu, mu_ramp         weight of L_retain, likewise
    reference           weight of KL(q_x || teacher without context): a brake on drift
    clip                L_distill per token is cut at this many nats (and has no gradient above); 0: not
    skip_first          the first tokens of a response that are not trained on
    masked_ids          token ids that are not trained on
    drop_truncated      responses cut at the length limit are not trained on
    teacher, ema_decay  "frozen", or "ema": the student's own moving average (decay per step) with context
    on_policy_fraction  chance of a step to learn from the student's samples; else from the frozen teacher's, which it
                        drew with the context
    off_policy_steps    so many first steps are off-policy whatever the fraction
    temperature         divides the logits of all models
    averaging           "token_mean" (over all response tokens of the global batch) or "sequence_mean" (within each
                        response, then over responses)
    chunk               how many response columns have logits at one time
    """

    divergence: str = "reverse_kl"
    alpha: float = 0.5
    support: str = "full"
    top_k: int = 256
    remainder: str = "renormalise"
    anchor: str = "bare"
    gate: str = "none"
    gate_threshold: float = 0.9
    beta: float = 0.0
    beta_ramp: int = 0
    anchor_fraction: float = 1.0
    anchor_every: int = 1
    mu: float = 0.0
    mu_ramp: int = 0
    reference: float = 0.0
    clip: float = 0.0
    skip_first: int = 0
    masked_ids: tuple[int, ...] = ()
    drop_truncated: bool = False
    teacher: str = "frozen"
    ema_decay: float = 0.99
    on_policy_fraction: float = 1.0
    off_policy_steps: int = 0
    temperature: float = 1.0
    averaging: str = "token_mean"
    chunk: int = 128

    @property
    def needs_ema(self) -> bool:
        return self.teacher == "ema" or (self.beta > 0 and self.anchor == "ema")

    @property
    def needs_teacher(self) -> bool:
        """Whether L_distill compares distributions; else it has tokens to hit."""
        return self.divergence != CROSS_ENTROPY

    @property
    def is_on_policy(self) -> bool:
        """Whether every step learns from the student's own samples."""
        return self.on_policy_fraction == 1 and self.off_policy_steps == 0

    def at(self, step: int) -> LossConfig:
        """The loss of ``step`` (the first is 1): itself, or itself without the anchor where that waits."""
        return self if step % self.anchor_every == 0 else dataclasses.replace(self, beta=0.0)


class Scales(NamedTuple):
    """The weights of the terms at one step, float32 scalars."""

    beta: jax.Array | float
    mu: jax.Array | float


def scales(config: LossConfig, step: jax.Array) -> Scales:
    """beta and mu at ``step`` (0 is the first), after their ramps; beta stands for the steps without the anchor too."""

    def ramped(weight: float, steps: int):
        return weight * jnp.minimum((step + 1) / steps, 1.0) if steps else jnp.float32(weight)

    beta = config.beta * config.anchor_every
    return Scales(ramped(beta, config.beta_ramp), ramped(config.mu, config.mu_ramp))


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
    """float32 [B, T], the share of each token in the mean that the objective takes; they sum to 1, or to 0 where
    nothing counts."""
    if averaging == "token_mean":
        return mask_BxT / jnp.maximum(jnp.sum(mask_BxT), 1).astype(jnp.float32)
    tokens_B = jnp.sum(mask_BxT, axis=1)
    sequences = jnp.maximum(jnp.sum(tokens_B > 0), 1)
    return mask_BxT / (jnp.maximum(tokens_B, 1) * sequences)[:, None].astype(jnp.float32)


def average(values_BxT: jax.Array, mask_BxT: jax.Array, averaging: str) -> Mean:
    """The same mean as (total, count), so that parts of a batch can be added up: of tokens, or of sequences' means."""
    if averaging == "token_mean":
        return Mean.of(values_BxT, mask_BxT)
    tokens_B = jnp.sum(mask_BxT, axis=1)
    total_B = jnp.sum(jnp.where(mask_BxT, values_BxT, 0.0), axis=1)
    return Mean.of(total_B / jnp.maximum(tokens_B, 1), tokens_B > 0)


# --- The terms per token, from logits [..., V] ---


def distillation(config: LossConfig, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """L_distill per token, [...]: KL(q_x || f), or the divergence and support that config names; not yet clipped."""
    support = Support(config.support, config.top_k, config.remainder)
    return divergence(config.divergence, student, stop_gradient(teacher), config.alpha, support)


def retention(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """L_retain per token: KL(sg f' || q_c'), both under the same other context."""
    return kl(stop_gradient(teacher), student)


def _agreement(logits: dict[str, jax.Array]) -> jax.Array:
    return jnp.argmax(logits["q_x"], -1) == jnp.argmax(logits["f"], -1)


def _prepared(config: LossConfig, models: tuple[ModelConfig, ModelConfig], raw: dict[str, jax.Array]):
    """Logits as they are compared: by each model's own rule, at the temperature. Where ids must be picked out of the
    vocabulary, or the models' heads are padded to different sizes, it is made whole on every device first."""
    student, teacher = models
    logits = {view: finish_logits(x, teacher if view in ("f", "f_x") else student) for view, x in raw.items()}
    sizes = {x.shape[-1] for x in logits.values()}
    if len(sizes) > 1 or config.support != "full":
        whole = sharding.batch_spec(None, None)
        logits = {view: jax.reshard(x, whole)[..., : min(sizes)] for view, x in logits.items()}
    return {view: x / config.temperature for view, x in logits.items()}


def bare_values(config: LossConfig, models, raw, tokens_Bxt) -> dict[str, jax.Array]:
    """L_distill, the reference term, and what the same logits tell for free."""
    logits = _prepared(config, models, raw)
    q_x, f = logits["q_x"], logits.get("f")
    logprob = divergences.token_logprob(q_x, tokens_Bxt)
    values = {
        "distill": distillation(config, q_x, f) if config.needs_teacher else -logprob,
        "entropy": divergences.entropy(stop_gradient(q_x)),
        "logprob": stop_gradient(logprob),
    }
    if f is not None:
        values["teacher_entropy"] = divergences.entropy(stop_gradient(f))
        values["top1_agreement"] = _agreement(logits).astype(jnp.float32)
    if config.clip:
        values["clipped"] = (values["distill"] > config.clip).astype(jnp.float32)
        values["distill"] = jnp.minimum(values["distill"], config.clip)
    if config.reference:
        values["reference"] = kl(q_x, stop_gradient(logits["f_x"]))
    if config.support != "full":
        ids, counts = divergences.support_ids(q_x, f, Support(config.support, config.top_k))
        values["support_mass"] = divergences.support_mass(stop_gradient(q_x), ids, counts)
        values["teacher_support_mass"] = divergences.support_mass(stop_gradient(f), ids, counts)
    return values


def anchor_values(config: LossConfig, models, raw) -> dict[str, jax.Array]:
    logits = _prepared(dataclasses.replace(config, support="full"), models, raw)
    value = ANCHORS[config.anchor].value(logits)
    if config.gate != "token":
        return {"anchor": value}
    gate = _agreement(logits)
    return {"anchor": jnp.where(gate, value, 0.0), "gate": gate.astype(jnp.float32)}


def bare_and_anchor_values(config, models, raw, tokens_Bxt):
    return bare_values(config, models, raw, tokens_Bxt) | anchor_values(config, models, raw)


def agreement_values(config, models, raw):
    return {"agreement": _agreement(_prepared(config, models, raw)).astype(jnp.float32)}


def retention_values(config, models, raw):
    logits = _prepared(dataclasses.replace(config, support="full"), models, raw)
    return {"retain": retention(logits["q_c"], logits["f"])}


def cross_entropy_values(model: ModelConfig, raw: dict[str, jax.Array], tokens_Bxt: jax.Array) -> dict[str, jax.Array]:
    return {"cross_entropy": -divergences.token_logprob(finish_logits(raw["q"], model), tokens_Bxt)}
