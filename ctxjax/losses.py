"""The objective: distillation, anchoring and retention. The only stop_gradient of the project is here.

    L_distill = KL( q_x || sg f )                 on-policy context distillation, arXiv 2602.12275
    L_anchor  = KL( sg q_x || q_c )               No-Context Anchoring, arXiv 2606.11627
    L_retain  = KL( sg f' || q_c' )               the same student under another context c'
    L         = L_distill + beta * L_anchor + mu * L_retain

    q_x   student(. | x, y<t)          the bare student
    q_c   student(. | c, x, y<t)       the student when the context comes back
    f     teacher(. | c, x, y<t)       frozen, sees the context
    q_c', f'  student and teacher (. | c', x', y'<t), where y' was sampled by the student from (c', x')

All in nats per response token, over the whole vocabulary, at the rollout's temperature. ``q_x`` receives
gradient from the first term only and ``q_c`` from the second only. The first two share the response y and
so one denominator, which makes beta portable between batch sizes.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax import divergences, scoring
from ctxjax.models.transformer import ModelConfig, apply_head, head_weights
from ctxjax.types import Batch, Mean, Params, PrefixKV, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """``divergence`` names the form of L_distill; ``beta`` = 0 and ``mu`` = 0 are plain OPCD, and then the passes
    that those terms need are not run. ``temperature`` divides the logits of all models. ``averaging`` is
    "token_mean" (over all response tokens of the global batch) or "sequence_mean" (within each response,
    then over responses). ``chunk`` is how many response columns have logits at one time."""

    divergence: str = "reverse_kl"
    beta: float = 0.0
    mu: float = 0.0
    temperature: float = 1.0
    averaging: str = "token_mean"
    chunk: int = 128


def distillation(config: LossConfig, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """L_distill per token, [...], from logits [..., V]: KL(q_x || f), or the divergence that config names."""
    return divergences.DIVERGENCES[config.divergence](student, stop_gradient(teacher))


def anchoring(bare: jax.Array, context: jax.Array) -> jax.Array:
    """L_anchor per token: KL(sg q_x || q_c). The student's bare output is the fixed target."""
    return divergences.forward_kl(student=context, teacher=stop_gradient(bare))


def retention(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """L_retain per token: KL(sg f' || q_c'), both under the same other context."""
    return divergences.forward_kl(student=student, teacher=stop_gradient(teacher))


def average(values_BxT: jax.Array, mask_BxT: jax.Array, averaging: str) -> Mean:
    """The mean that the objective uses, as (total, count): of tokens, or of sequences' means."""
    if averaging == "token_mean":
        return Mean.of(values_BxT, mask_BxT)
    tokens_B = jnp.sum(mask_BxT, axis=1)
    total_B = jnp.sum(jnp.where(mask_BxT, values_BxT, 0.0), axis=1)
    return Mean.of(total_B / jnp.maximum(tokens_B, 1), tokens_B > 0)


def objective(
    params: Params,
    frozen: Params,
    model: ModelConfig,
    teacher_model: ModelConfig,
    config: LossConfig,
    batch: Batch,
    rollout: Rollout,
    other_rollout: Rollout | None,
    teacher_prefix: PrefixKV | None = None,
) -> tuple[jax.Array, dict[str, Mean]]:
    """L (a scalar, nats per token) and its parts and companions as Means.

    ``other_rollout`` holds y' for ``batch.other`` and must be given exactly when mu > 0. ``teacher_prefix`` is what
    ``frozen`` made of batch.context.prefix_C; None: it is computed here.
    """
    terms, metrics = bare_and_context_terms(
        params, frozen, model, teacher_model, config, batch, rollout, teacher_prefix
    )
    loss = terms["distill"].value
    if config.beta > 0:
        loss += config.beta * terms["anchor"].value
    if config.mu > 0:
        terms["retain"] = retention_term(params, frozen, model, teacher_model, config, batch.other, other_rollout)
        loss += config.mu * terms["retain"].value
    return loss, terms | metrics


def bare_and_context_terms(params, frozen, model, teacher_model, config, batch, rollout, teacher_prefix=None):
    """L_distill, and L_anchor where beta > 0, on the rollout y; and what the same logits tell for free."""
    hidden = {
        "q_x": scoring.response_hidden(params, model, batch.bare, rollout),
        "f": scoring.response_hidden(frozen, teacher_model, batch.context, rollout, teacher_prefix),
    }
    if config.beta > 0:
        hidden["q_c"] = scoring.response_hidden(params, model, batch.context, rollout)
    views = list(hidden)
    head = {"f": head_weights(frozen, teacher_model)}
    head["q_x"] = head["q_c"] = head_weights(params, model)

    def token_values(tokens_Bxt, *slices):
        logits = {v: apply_head(h, head[v]) / config.temperature for v, h in zip(views, slices)}
        values = {
            "distill": distillation(config, logits["q_x"], logits["f"]),
            "entropy": divergences.entropy(stop_gradient(logits["q_x"])),
            "teacher_entropy": divergences.entropy(stop_gradient(logits["f"])),
            "top1_agreement": jnp.argmax(logits["q_x"], -1) == jnp.argmax(logits["f"], -1),
            "logprob": divergences.token_logprob(stop_gradient(logits["q_x"]), tokens_Bxt),
        }
        if "q_c" in logits:
            values["anchor"] = anchoring(bare=logits["q_x"], context=logits["q_c"])
        return values

    values = scoring.over_token_chunks(token_values, config.chunk, rollout.tokens_BxT, *(hidden[v] for v in views))
    terms = {
        name: average(values.pop(name), rollout.mask_BxT, config.averaging)
        for name in ("distill", "anchor")
        if name in values
    }
    # Decoding and scoring must agree on the log-probability of what was sampled, else the rollout was not on-policy.
    gap_BxT = jnp.where(rollout.mask_BxT, jnp.abs(values.pop("logprob") - rollout.logprobs_BxT), 0.0)
    metrics = {name: Mean.of(value, rollout.mask_BxT) for name, value in values.items()}
    metrics["logprob_gap_max"] = Mean(jnp.max(gap_BxT), jnp.float32(1))
    return terms, metrics


def retention_term(params, frozen, model, teacher_model, config, other: Prompts, rollout: Rollout) -> Mean:
    """L_retain on rows under other contexts."""
    hidden_q = scoring.response_hidden(params, model, other, rollout)
    hidden_f = scoring.response_hidden(frozen, teacher_model, other, rollout)
    head_q, head_f = head_weights(params, model), head_weights(frozen, teacher_model)

    def token_values(q, f):
        return retention(apply_head(q, head_q) / config.temperature, apply_head(f, head_f) / config.temperature)

    values_BxT = scoring.over_token_chunks(token_values, config.chunk, hidden_q, hidden_f)
    return average(values_BxT, rollout.mask_BxT, config.averaging)


def next_token_loss(params: Params, model: ModelConfig, prompts: Prompts, responses: Rollout, chunk: int) -> Mean:
    """Cross-entropy of given responses, nats per token: what base models are trained with from scratch."""
    hidden = scoring.response_hidden(params, model, prompts, responses)
    head = head_weights(params, model)

    def token_values(tokens_Bxt, hidden_BxtxD):
        return -divergences.token_logprob(apply_head(hidden_BxtxD, head), tokens_Bxt)

    return Mean.of(scoring.over_token_chunks(token_values, chunk, responses.tokens_BxT, hidden), responses.mask_BxT)
