"""What a term of the objective is: the distributions it compares, its value per token, its weight, and where it counts.

    losses.py    the distillation, reference and retention terms
    anchors.py   the anchor term, and everything else about anchoring
    objective.py runs the passes that the terms of a run need, and adds the terms up

A *pass* is one reading of a response by one set of weights under one kind of prompt. It yields one next-token
distribution for each response token.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ctxjax import sharding
from ctxjax.models.transformer import ModelConfig, finish_logits

Logits = dict[str, jax.Array]  # pass -> [..., V], float32, ready to be compared
# Values per token of passes, without gradient: measure(passes, function of Logits) -> {name: [B, T]}.
Measure = Callable[[tuple[str, ...], Callable[[Logits], dict[str, jax.Array]]], dict[str, jax.Array]]


class Pass(NamedTuple):
    """``weights``: "student", "ema" (its moving average), "teacher" (the frozen one; with ``loss.teacher`` = "ema" the
    moving average) or "frozen" (the frozen teacher, always). ``prompts``: the field of Batch that is read before the
    response: "bare" and "context" go with the response y, "other" with y'."""

    weights: str
    prompts: str


PASSES = {
    "q_x": Pass("student", "bare"),
    "q_c": Pass("student", "context"),
    "f": Pass("teacher", "context"),
    "f_x": Pass("frozen", "bare"),
    "ema": Pass("ema", "bare"),
    "q_other": Pass("student", "other"),
    "f_other": Pass("frozen", "other"),
}


def _always(step) -> float:
    return 1.0


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    ``passes``: names in PASSES, all of the same response. ``values``: from their logits and the response's tokens
    [B, t], float32 [B, t] by name: under the term's own ``name`` its value in nats per token, under others the metrics
    that the same logits give for free. ``weight``: step number (the first is 0) -> the term's weight, a float32 scalar.
    ``row_gate``: (measure, mask [B, T]) -> float32 [B, 1], 1 for responses that the term counts on and 0 for the
    others; None: all. ``needs_whole_vocabulary``: whether ``values`` picks token ids out of the vocabulary, which then
    must not be sharded.
    """

    name: str
    passes: tuple[str, ...]
    values: Callable[[Logits, jax.Array], dict[str, jax.Array]]
    weight: Callable[[jax.Array | int], jax.Array | float] = _always
    row_gate: Callable[[Measure, jax.Array], jax.Array] | None = None
    needs_whole_vocabulary: bool = False

    @property
    def is_on_other(self) -> bool:
        """Whether the term is taken on y', the response under another context, and not on y."""
        return PASSES[self.passes[0]].prompts == "other"


def constant(weight: float) -> Callable:
    """The same weight at every step."""
    return lambda step: jnp.float32(weight)


def ramp(weight: float, steps: int) -> Callable:
    """weight * min((step + 1) / steps, 1): a linear rise over the first ``steps`` steps; 0 steps: no rise."""
    return (lambda step: weight * jnp.minimum((step + 1) / steps, 1.0)) if steps else constant(weight)


def token_values(
    terms: tuple[Term, ...], models: tuple[ModelConfig, ModelConfig], temperature: float, raw: Logits, tokens_Bxt
) -> dict[str, jax.Array]:
    """The values per token of all ``terms``, from the raw head outputs by pass; ``models``: the student's and the
    teacher's architecture."""
    logits = _comparable(raw, models, temperature, any(term.needs_whole_vocabulary for term in terms))
    values = {}
    for term in terms:
        values |= term.values(logits, tokens_Bxt)
    return values


def _comparable(raw: Logits, models: tuple[ModelConfig, ModelConfig], temperature: float, needs_whole: bool) -> Logits:
    """Logits by each model's own rule (soft cap, scale), at the rollout's temperature, over the same token ids.

    Heads may be padded to different sizes: all are cut to the smaller one, which holds every token of the tokenizer.
    A cut, like picking ids, needs the vocabulary whole on every device.
    """
    student, teacher = models
    is_teacher = {name: PASSES[name].weights in ("teacher", "frozen") for name in raw}
    logits = {name: finish_logits(x, teacher if is_teacher[name] else student) for name, x in raw.items()}
    sizes = {x.shape[-1] for x in logits.values()}
    if len(sizes) > 1 or needs_whole:
        replicated = sharding.batch_spec(None, None)
        logits = {name: jax.reshard(x, replicated)[..., : min(sizes)] for name, x in logits.items()}
    return {name: x / temperature for name, x in logits.items()}
