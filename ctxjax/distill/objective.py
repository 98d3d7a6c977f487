"""The objective of a batch: run the passes that its terms need, and add the terms up.

    L = L_distill + beta * L_anchor + mu * L_retain        (losses.py, anchors.py)

Every term is a weighted sum over tokens, and the weights are known before the passes run. So the losses of a batch's
parts add up to the loss of the batch, and chunked_head can compute the gradient together with the loss.
"""

from __future__ import annotations

from collections import Counter
import functools
from typing import NamedTuple

from flax import struct
import jax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax.distill import anchors, chunked_head, losses, scoring
from ctxjax.distill.divergences import token_logprob
from ctxjax.distill.losses import LossConfig, average, token_weights
from ctxjax.distill.terms import PASSES, Logits, Term, token_values
from ctxjax.models.transformer import ModelConfig, finish_logits, head_weights
from ctxjax.types import Batch, Max, Mean, Params, PrefixKV, Prompts, Rollout

# Functions LossConfig -> Term, or None if the configuration leaves the term out. A new term is a line here.
TERMS = (losses.distillation_term, losses.reference_term, anchors.anchor_term, losses.retention_term)


def terms(config: LossConfig) -> tuple[Term, ...]:
    """The terms of an objective, in the order of TERMS."""
    found = (term(config) for term in TERMS)
    return tuple(term for term in found if term is not None)


def count_passes(config: LossConfig) -> Counter[str]:
    """Return the number of forward passes by the weights that they run (terms.Pass)."""
    return Counter(PASSES[name].weights for name in {name for term in terms(config) for name in term.passes})


def needs_ema(config: LossConfig) -> bool:
    """Whether a run keeps a moving average of the student: as its teacher, or since a term compares with it."""
    return config.teacher == "ema" or count_passes(config)["ema"] > 0


@struct.dataclass
class WeightedBatch:
    """A batch, or a part of one, with its responses. ``weight_BxT`` is each response token's share of the mean over the
    *whole* batch, 0 for a token that is not trained on; ``other_weight_BxT`` the same for ``other_rollout``."""

    batch: Batch
    rollout: Rollout
    weight_BxT: jax.Array
    other_rollout: Rollout | None = None
    other_weight_BxT: jax.Array | None = None


class Networks(NamedTuple):
    """Whole parameter trees and their architectures. ``ema``: the student's moving average, None if none is kept.
    ``teacher_prefix``: the teacher's keys and values of the shared context prefix, if the caller has computed them.
    ``frozen``: the frozen teacher if ``teacher`` is the moving average, None if ``teacher`` is frozen itself."""

    student: Params
    teacher: Params
    ema: Params | None
    config: ModelConfig
    teacher_config: ModelConfig
    teacher_prefix: PrefixKV | None = None
    frozen: Params | None = None


class _Passes:
    """Hidden states and heads by pass. Each pass runs once, when it is first asked for; so does each head."""

    def __init__(self, networks: Networks, batch: Batch, rollout: Rollout):
        self._weights = {
            "student": (networks.student, networks.config),
            "teacher": (networks.teacher, networks.teacher_config),
            "ema": (networks.ema, networks.config),
            "frozen": (networks.frozen, networks.teacher_config),
        }
        self._is_teacher_frozen = networks.frozen is None
        self._batch, self._rollout = batch, rollout
        self._prefixes = {"f": networks.teacher_prefix}
        self._hidden, self._heads = {}, {}

    def hidden(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        for name in names:
            if name not in self._hidden:
                prompts = getattr(self._batch, PASSES[name].prompts)
                self._hidden[name] = scoring.response_hidden(
                    *self._weights[self._find_weights(name)], prompts, self._rollout, self._prefixes.get(name)
                )
        return {name: self._hidden[name] for name in names}

    def heads(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        by_name = {name: self._find_weights(name) for name in names}
        for weights in by_name.values():
            if weights not in self._heads:
                self._heads[weights] = head_weights(*self._weights[weights])
        return {name: self._heads[weights] for name, weights in by_name.items()}

    def _find_weights(self, name: str) -> str:
        """One name for a frozen teacher, so that its passes share one head."""
        weights = PASSES[name].weights
        return "teacher" if weights == "frozen" and self._is_teacher_frozen else weights


def objective(
    networks: Networks, config: LossConfig, rows: WeightedBatch, step: jax.Array | int
) -> tuple[jax.Array, dict[str, Mean | Max]]:
    """(L, metrics) of these rows at ``step`` (the first is 0).

    L is a float32 scalar; over all rows of a batch it is in nats per token. The losses of a batch's parts add up to the
    loss of the batch, and so do the metrics: the mean of every term by its name, and what the terms' logits give.
    ``rows.other_rollout`` must be given exactly if a term is taken on it (mu > 0).
    """
    loss, metrics, responses = jnp.float32(0), {}, ((rows.rollout, rows.weight_BxT),)
    if rows.other_rollout is not None:
        responses += ((rows.other_rollout, rows.other_weight_BxT),)
    for is_other, (rollout, weight_BxT) in enumerate(responses):
        mine = tuple(term for term in terms(config) if term.is_on_other == is_other)
        if not mine:
            continue
        part, values = _sweep(networks, config, mine, rows.batch, rollout, weight_BxT, step)
        loss += part
        metrics |= _metrics(config, mine, values, rollout, weight_BxT > 0)
    return loss, metrics


def term_loss(
    networks: Networks, config: LossConfig, term: Term, rows: WeightedBatch, step: jax.Array | int
) -> jax.Array:
    """One term alone, with its weight at ``step``: the terms of an objective add up to L."""
    rollout, weight_BxT = rows.rollout, rows.weight_BxT
    if term.is_on_other:
        rollout, weight_BxT = rows.other_rollout, rows.other_weight_BxT
    return _sweep(networks, config, (term,), rows.batch, rollout, weight_BxT, step)[0]


def distillation_values(networks: Networks, config: LossConfig, rows: WeightedBatch) -> jax.Array:
    """L_distill of every response token, nats, float32 [B, T]; 0 for tokens of weight 0."""
    mine = (losses.distillation_term(config),)
    return _sweep(networks, config, mine, rows.batch, rows.rollout, rows.weight_BxT, 0)[1]["distill"]


def _sweep(
    networks: Networks, config: LossConfig, mine: tuple[Term, ...], batch: Batch, rollout: Rollout, weight_BxT, step
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of terms on one response, and their values per token {name: [B, T]}."""
    passes, models = _Passes(networks, batch, rollout), (networks.config, networks.teacher_config)
    mask_BxT = weight_BxT > 0

    def measure(names: tuple[str, ...], function) -> dict[str, jax.Array]:
        probe = Term("", names, lambda logits, tokens: function(logits))
        of_tokens = functools.partial(token_values, (probe,), models, config.temperature)
        hidden, heads = stop_gradient((passes.hidden(names), passes.heads(names)))
        return chunked_head.chunked(of_tokens, config.chunk, hidden, heads, {}, mask_BxT, rollout.tokens_BxT)[1]

    gates = {term.name: term.row_gate(measure, mask_BxT) for term in mine if term.row_gate is not None}
    weights = {term.name: term.weight(step) * weight_BxT for term in mine}
    weights |= {name: weights[name] * gate_Bx1 for name, gate_Bx1 in gates.items()}
    names = tuple(dict.fromkeys(name for term in mine for name in term.passes))
    of_tokens = functools.partial(token_values, mine, models, config.temperature)
    hidden, heads = passes.hidden(names), passes.heads(names)
    loss, values = chunked_head.chunked(of_tokens, config.chunk, hidden, heads, weights, mask_BxT, rollout.tokens_BxT)
    for name, gate_Bx1 in gates.items():
        values[name] = gate_Bx1 * values[name]
        values["gate"] = jnp.broadcast_to(gate_Bx1, values[name].shape)
    return loss, values


def _metrics(
    config: LossConfig, mine: tuple[Term, ...], values: dict[str, jax.Array], rollout: Rollout, mask_BxT: jax.Array
) -> dict[str, Mean | Max]:
    """Terms averaged as the loss averages them, everything else over tokens."""
    names = [term.name for term in mine]
    metrics = {name: average(values[name], mask_BxT, config.averaging) for name in names}
    metrics |= {name: Mean.of(value, mask_BxT) for name, value in values.items() if name not in (*names, "logprob")}
    if "logprob" in values and config.is_on_policy:
        # Sampling and scoring must agree on log p of the sampled tokens, otherwise the rollout was not on-policy.
        gap_BxT = jnp.where(mask_BxT, jnp.abs(values["logprob"] - rollout.logprobs_BxT), 0.0)
        metrics |= {"logprob_gap": Mean.of(gap_BxT, mask_BxT), "logprob_gap_max": Max(jnp.max(gap_BxT))}
    return metrics


def next_token_loss(params: Params, model: ModelConfig, prompts: Prompts, responses: Rollout, chunk: int) -> jax.Array:
    """Cross-entropy of given responses, nats per token: the loss that base models are trained with from scratch."""
    hidden = {"q": scoring.response_hidden(params, model, prompts, responses)}
    weights = {"cross_entropy": token_weights(responses.mask_BxT, "token_mean")}
    heads, function = {"q": head_weights(params, model)}, functools.partial(_cross_entropy, model)
    return chunked_head.chunked(function, chunk, hidden, heads, weights, responses.mask_BxT, responses.tokens_BxT)[0]


def _cross_entropy(model: ModelConfig, raw: Logits, tokens_Bxt: jax.Array) -> dict[str, jax.Array]:
    return {"cross_entropy": -token_logprob(finish_logits(raw["q"], model), tokens_Bxt)}
