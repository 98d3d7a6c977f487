"""The objective of a batch: runs the passes that its terms need, and adds the terms up.

    L = L_distill + beta * L_anchor + mu * L_retain        (losses.py)

Everything is a weighted sum over tokens whose weights are known before the passes run, so that the losses of a batch's
parts add up to the loss of the batch, and chunked_head can make the gradient while it makes the loss.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from flax import struct
import jax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax import sharding
from ctxjax.distill import chunked_head, losses, scoring
from ctxjax.distill.anchors import ANCHORS
from ctxjax.distill.losses import LossConfig, Scales, average, token_weights
from ctxjax.models.transformer import ModelConfig, head_weights
from ctxjax.types import Batch, Max, Mean, Params, PrefixKV, Prompts, Rollout, map_rows


@struct.dataclass
class Rows:
    """All that a loss needs of a batch, or of a part of one. ``weight_BxT`` is each response token's share of the mean
    over the *whole* batch, 0 where a token is not trained on; ``other_weight_BxT`` likewise, of ``other_rollout``."""

    batch: Batch
    rollout: Rollout
    weight_BxT: jax.Array
    other_rollout: Rollout | None = None
    other_weight_BxT: jax.Array | None = None


class Models(NamedTuple):
    """Whole parameter trees and their architectures. ``ema`` is the student's average, or None where none is kept;
    ``teacher_prefix`` is the teacher's reading of what the context prompts start with, where the caller keeps it."""

    student: Params
    teacher: Params
    ema: Params | None
    config: ModelConfig
    teacher_config: ModelConfig
    teacher_prefix: PrefixKV | None = None


class _Passes:
    """Hidden states and heads of the views, each pass run once, when it is first asked for."""

    def __init__(
        self,
        models: Models,
        bare: Prompts | None,
        context: Prompts,
        rollout: Rollout,
        teacher_prefix: PrefixKV | None = None,
    ):
        student = (models.student, models.config)
        teacher = (models.teacher, models.teacher_config)
        self._views = {
            "q_x": (*student, bare),
            "q_c": (*student, context),
            "f": (*teacher, context),
            "f_x": (*teacher, bare),
            "ema": (models.ema, models.config, bare),
        }
        self._rollout, self._prefixes, self._hidden = rollout, {"f": teacher_prefix}, {}
        self._student_head = head_weights(*student)
        self._teacher_head = head_weights(*teacher)

    def hidden(self, views) -> dict[str, jax.Array]:
        for view in views:
            if view not in self._hidden:
                prefix = self._prefixes.get(view)
                self._hidden[view] = scoring.response_hidden(*self._views[view], self._rollout, prefix)
        return {view: self._hidden[view] for view in views}

    def heads(self, views) -> dict[str, jax.Array]:
        own = {"q_x": self._student_head, "q_c": self._student_head, "f": self._teacher_head, "f_x": self._teacher_head}
        return {view: own[view] if view in own else head_weights(*self._views[view][:2]) for view in views}


def objective(models: Models, config: LossConfig, rows: Rows, at: Scales) -> tuple[jax.Array, dict[str, Mean | Max]]:
    """L of these rows (a scalar; over all rows of a batch, nats per token), and its terms and companions.

    Adding up the losses of a batch's parts gives the loss of the batch, and so with the terms.
    ``rows.other_rollout`` must be given exactly when mu > 0.
    """
    loss, metrics = bare_and_context_terms(models, config, rows, at.beta)
    if config.mu > 0:
        retained, metrics["retain"] = _retention_term(models, config, rows, at.mu)
        loss += retained
    return loss, metrics


def bare_and_context_terms(
    models: Models, config: LossConfig, rows: Rows, beta: jax.Array | float
) -> tuple[jax.Array, dict[str, Mean | Max]]:
    """L_distill + beta L_anchor + the reference term on the rollout y, with all their metrics."""
    batch, rollout, weight = rows.batch, rows.rollout, rows.weight_BxT
    passes = _Passes(models, batch.bare, batch.context, rollout, models.teacher_prefix)
    configs = (models.config, models.teacher_config)
    has_anchor = config.beta > 0
    on_all_rows = has_anchor and config.anchor_fraction == 1
    weights, views, function = {"distill": weight}, ["q_x"], losses.bare_values
    if config.needs_teacher:
        views.append("f")
    if config.reference:
        weights["reference"] = config.reference * weight
        views.append("f_x")
    gate = _response_gate(config, configs, passes, weight) if on_all_rows else None
    if on_all_rows:
        weights["anchor"] = beta * weight if gate is None else beta * weight * gate
        views += [view for view in _anchor_views(config) if view not in views]
        function = losses.bare_and_anchor_values
    function = functools.partial(function, config, configs)
    hidden, heads, mask = passes.hidden(views), passes.heads(views), weight > 0
    loss, values = chunked_head.chunked(function, config.chunk, hidden, heads, weights, mask, rollout.tokens_BxT)
    values = _gated(values, gate)
    # Decoding and scoring must agree on the log-probability of what was sampled, else the rollout was not on-policy.
    gap_BxT = jnp.where(mask, jnp.abs(values.pop("logprob") - rollout.logprobs_BxT), 0.0)
    terms = {name: average(values.pop(name), mask, config.averaging) for name in weights}
    metrics = terms | {name: Mean.of(value, mask) for name, value in values.items()}
    if config.is_on_policy:
        metrics |= {"logprob_gap": Mean.of(gap_BxT, mask), "logprob_gap_max": Max(jnp.max(gap_BxT))}
    if has_anchor and not on_all_rows:
        anchored, more = _anchor_on_some_rows(models, config, rows, passes, beta)
        loss, metrics = loss + anchored, metrics | more
    return loss, metrics


def _anchor_views(config: LossConfig) -> list[str]:
    views = ["q_c", ANCHORS[config.anchor].view]
    return views + ["q_x", "f"] if config.gate == "token" else views


def _response_gate(config: LossConfig, configs, passes: _Passes, weight_BxT: jax.Array) -> jax.Array | None:
    """[B, 1], 1.0 where the bare student agrees with the teacher on most of its response, if that is the gate. Costs
    both heads once more, since the gate of a response's first token depends on its last."""
    if config.gate != "response":
        return None
    hidden, heads, mask = stop_gradient(passes.hidden(["q_x", "f"])), passes.heads(["q_x", "f"]), weight_BxT > 0
    function = functools.partial(losses.agreement_values, config, configs)
    _, values = chunked_head.chunked(function, config.chunk, hidden, stop_gradient(heads), {}, mask)
    share_B = jnp.sum(values["agreement"], axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return (share_B >= config.gate_threshold).astype(jnp.float32)[:, None]


def _gated(values: dict[str, jax.Array], gate_Bx1: jax.Array | None) -> dict[str, jax.Array]:
    """The anchor as the loss takes it, and where it does, as a gate by token reports them."""
    if gate_Bx1 is None:
        return values
    return values | {"anchor": gate_Bx1 * values["anchor"], "gate": jnp.broadcast_to(gate_Bx1, values["anchor"].shape)}


def _anchor_on_some_rows(models: Models, config: LossConfig, rows: Rows, passes: _Passes, beta):
    """The anchor on the first rows of each device, weighted as if on all; the bare passes are not run again."""
    configs = (models.config, models.teacher_config)
    per_device = rows.weight_BxT.shape[0] // sharding.batch_ways()
    count = max(round(config.anchor_fraction * per_device), 1)
    first = functools.partial(sharding.first_rows, count=count)
    mine = (rows.batch.replace(other=None), rows.rollout, rows.weight_BxT)  # of rows under other contexts are fewer
    some = Rows(*(map_rows(first, x) for x in mine))
    own = _Passes(models, some.batch.bare, some.batch.context, some.rollout)
    views = _anchor_views(config)
    hidden = own.hidden(["q_c"]) | jax.tree.map(first, passes.hidden([view for view in views if view != "q_c"]))
    gate = jax.tree.map(first, _response_gate(config, configs, passes, rows.weight_BxT))
    weight = beta * per_device / count * some.weight_BxT
    weight = weight if gate is None else weight * gate
    function = functools.partial(losses.anchor_values, config, configs)
    mask = some.weight_BxT > 0
    loss, values = chunked_head.chunked(function, config.chunk, hidden, own.heads(views), {"anchor": weight}, mask)
    values = _gated(values, gate)
    anchor = average(values.pop("anchor"), mask, config.averaging)
    return loss, {"anchor": anchor} | {name: Mean.of(value, mask) for name, value in values.items()}


def _retention_term(models: Models, config: LossConfig, rows: Rows, mu) -> tuple[jax.Array, Mean]:
    """mu L_retain on the rows under other contexts, and its mean."""
    passes, weight = _Passes(models, None, rows.batch.other, rows.other_rollout), rows.other_weight_BxT
    hidden, heads, mask = passes.hidden(["q_c", "f"]), passes.heads(["q_c", "f"]), weight > 0
    function = functools.partial(losses.retention_values, config, (models.config, models.teacher_config))
    loss, values = chunked_head.chunked(function, config.chunk, hidden, heads, {"retain": mu * weight}, mask)
    return loss, average(values["retain"], mask, config.averaging)


def next_token_loss(params: Params, model: ModelConfig, prompts: Prompts, responses: Rollout, chunk: int) -> jax.Array:
    """Cross-entropy of given responses, nats per token: what base models are trained with from scratch."""
    hidden = {"q": scoring.response_hidden(params, model, prompts, responses)}
    weights = {"cross_entropy": token_weights(responses.mask_BxT, "token_mean")}
    function = functools.partial(losses.cross_entropy_values, model)
    heads = {"q": head_weights(params, model)}
    return chunked_head.chunked(function, chunk, hidden, heads, weights, responses.mask_BxT, responses.tokens_BxT)[0]
