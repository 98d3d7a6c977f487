"""Everything about the anchor, the term that keeps a context removable.

    L_anchor = KL( stop_gradient(q_x) || q_c )      No-Context Anchoring, arXiv 2606.11627

It holds the student's context view q_c to a target, by default to the student's own bare output. The anchors that the
literature compares:

    bare          KL( sg q_x || q_c )        No-Context Anchoring
    ema           KL( sg ema || q_c )        the moving average of the student, bare
    teacher_bare  KL( sg f_x || q_c )        the frozen teacher's bare output: what was there before training
    joint         KL( q_x || q_c )           like "bare", but q_x is moved towards q_c too
    symmetric     (KL(q_x||q_c) + KL(q_c||q_x)) / 2, both moved: "SymKL"
    teacher       KL( q_c || sg f )          the context view is distilled like the bare one: "DualOPD"
    handover      KL( sg m || q_c )          m = w q_x + (1 - w) f with w = sum_v min(q_x, f): KL( sg f || q_c ) while
                                             the bare student knows nothing yet (forward; "teacher" is the reverse),
                                             as "bare" once it has learned

Only "bare" and "ema" are known to remove the harm. "bare" drags the context view to a bare view that may not have
learned anything yet, so that the model stops using the context before the context is in its weights; "handover" is to
avoid that. The others are here for comparison.

To add an anchor: a line in ANCHORS; if it needs a new distribution, a line in terms.PASSES too.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax.distill.divergences import kl
from ctxjax.distill.losses import LossConfig, top1_agreement
from ctxjax.distill.terms import Logits, Measure, Term, ramp


class Anchor(NamedTuple):
    """``targets``: the passes (terms.PASSES) that q_c is compared with. ``value``: Logits -> nats per token, [...]."""

    targets: tuple[str, ...]
    value: Callable[[Logits], jax.Array]


def handover_target(logits: Logits) -> jax.Array:
    """log m, m = w q_x + (1 - w) f, with w in [0, 1] the overlap of the two: 1 minus their total variation."""
    q_x, f = jax.nn.softmax(logits["q_x"]), jax.nn.softmax(logits["f"])
    # Rounded probabilities may add up to a little over 1, and 1 - w must not be negative: m would be, for some tokens.
    w = jnp.minimum(jnp.sum(jnp.minimum(q_x, f), axis=-1, keepdims=True), 1.0)
    return jnp.log(w * q_x + (1 - w) * f)


ANCHORS = {
    "bare": Anchor(("q_x",), lambda p: kl(stop_gradient(p["q_x"]), p["q_c"])),
    "ema": Anchor(("ema",), lambda p: kl(stop_gradient(p["ema"]), p["q_c"])),
    "teacher_bare": Anchor(("f_x",), lambda p: kl(stop_gradient(p["f_x"]), p["q_c"])),
    "joint": Anchor(("q_x",), lambda p: kl(p["q_x"], p["q_c"])),
    "symmetric": Anchor(("q_x",), lambda p: 0.5 * (kl(p["q_x"], p["q_c"]) + kl(p["q_c"], p["q_x"]))),
    "teacher": Anchor(("f",), lambda p: kl(p["q_c"], stop_gradient(p["f"]))),
    "handover": Anchor(("q_x", "f"), lambda p: kl(stop_gradient(handover_target(p)), p["q_c"])),
}
# What the anchor is taken on: all tokens; the tokens whose likeliest id the bare student and the teacher share; or the
# responses in which at least ``gate_threshold`` of the tokens are such.
GATES = ("none", "token", "response")


def anchor_term(config: LossConfig) -> Term | None:
    """beta * L_anchor, or None if beta is 0.

    beta rises over ``beta_ramp`` steps. With ``anchor_every`` k, only every k-th step has the term, with k times its
    weight (see ``loss_at``).
    """
    if config.beta == 0:
        return None
    anchor = ANCHORS[config.anchor]
    gate_passes = ("q_x", "f") if config.gate == "token" else ()

    def values(logits: Logits, tokens_Bxt) -> dict[str, jax.Array]:
        value = anchor.value(logits)
        if config.gate != "token":
            return {"anchor": value}
        gate = top1_agreement(logits)
        return {"anchor": jnp.where(gate, value, 0.0), "gate": gate.astype(jnp.float32)}

    return Term(
        name="anchor",
        passes=tuple(dict.fromkeys(("q_c", *anchor.targets, *gate_passes))),
        values=values,
        weight=ramp(config.beta * config.anchor_every, config.beta_ramp),
        row_gate=_response_gate(config) if config.gate == "response" else None,
    )


def _response_gate(config: LossConfig) -> Callable[[Measure, jax.Array], jax.Array]:
    """1 for a response if the bare student agrees with the teacher on at least ``gate_threshold`` of its tokens.

    It costs both heads once more: the gate of a response's first token depends on its last one.
    """

    def gate(measure: Measure, mask_BxT: jax.Array) -> jax.Array:
        agrees = measure(("q_x", "f"), lambda logits: {"agrees": top1_agreement(logits).astype(jnp.float32)})
        share_B = jnp.sum(agrees["agrees"], axis=1) / jnp.maximum(jnp.sum(mask_BxT, axis=1), 1)
        return (share_B >= config.gate_threshold).astype(jnp.float32)[:, None]

    return gate


def loss_at(config: LossConfig, step: int, off_policy: bool = False) -> LossConfig:
    """The objective of ``step`` (the first is 0): ``config``, with or without the anchor, and with its divergence.

    The anchor is taken in the last of every ``anchor_every`` steps. ``off_policy``: it is a step on the teacher's
    samples, and the objective returned is that of a run with such steps only; else of one without them.
    """
    config = config.of_off_policy_steps if off_policy else config
    config = dataclasses.replace(config, on_policy_fraction=0.0 if off_policy else 1.0, off_policy_steps=0)
    is_due = (step + 1) % config.anchor_every == 0
    return config if is_due else dataclasses.replace(config, beta=0.0)
