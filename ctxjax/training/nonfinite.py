"""Write the rows of a step whose loss or gradient was not finite to a file for inspection.

The step itself is skipped in distill/train_step.update_step; monitoring/alarms.py counts it and may end the run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from ctxjax import sharding
from ctxjax.data import prompts as prompts_lib
from ctxjax.distill.objective import Networks, WeightedBatch, distillation_values
from ctxjax.distill.rollouts import StepInputs
from ctxjax.distill.train_step import StepConfig, rollout_step, student_params, teacher_params
from ctxjax.host.workdir import write_text
from ctxjax.types import Batch, Frozen, Prompts, Rollout, TrainState


def save_rows(
    folder: Path,
    state: TrainState,
    frozen: Frozen,
    inputs: StepInputs,
    config: StepConfig,
    step: int,
    tokenizer,
) -> Path:
    """Write the batch of ``step``, which was skipped, with its responses. Return the file's path.

    Rows without a finite loss come first. If every row has a finite loss, the gradient was not finite. ``state`` is the
    state after the step: a skipped step leaves the parameters unchanged, so the same student samples the same responses
    again.
    """
    state, batch = state.replace(step=jnp.int32(step)), inputs.batch
    sample_again = jax.jit(rollout_step, static_argnames="config")
    rollout, other_rollout = sample_again(state, frozen, batch, config, inputs.rollout, inputs.other_rollout)
    rows = _make_rows("bare", batch.bare, batch.context, rollout, state, frozen, batch, config, tokenizer)
    if batch.other is not None:
        # Retention is the forward KL from the frozen teacher, whatever distillation is.
        loss = dataclasses.replace(config.loss, teacher="frozen", divergence="forward_kl", support="full")
        held = dataclasses.replace(config, loss=loss)
        rows += _make_rows("other", batch.other, batch.other, other_rollout, state, frozen, batch, held, tokenizer)
    rows.sort(key=lambda row: row["loss"] is not None)
    path = folder / f"not_finite_step_{step + 1}.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _make_rows(
    view: str, student: Prompts, teacher: Prompts, rollout: Rollout, state, frozen, batch: Batch, config, tokenizer
) -> list[dict]:
    loss_B = _compute_row_losses(state, frozen, student, teacher, rollout, config)
    student, teacher, rollout, loss_B, ids = sharding.to_host((student, teacher, rollout, loss_B, batch.row_number_B))
    texts = [tokenizer.batch_decode(prompts_lib.unpad(prompts)) for prompts in (student, teacher)]
    rows = []
    for row, (prompt, teacher_prompt) in enumerate(zip(*texts)):
        tokens = rollout.tokens_BxT[row][rollout.mask_BxT[row]].tolist()
        if not tokens:  # no response: the place of a turn that a game's episode did not have
            continue
        logprobs = rollout.logprobs_BxT[row][rollout.mask_BxT[row]].tolist()
        rows.append({
            "loss": _finite_or_none(loss_B[row]), "view": view, "row_number": int(ids[row]), "prompt": prompt,
            "teacher_prompt": teacher_prompt, "response": tokenizer.decode(tokens), "tokens": tokens,
            "logprobs": [_finite_or_none(value) for value in logprobs],
        })  # fmt: skip
    return rows


@functools.partial(jax.jit, static_argnames="config")
def _compute_row_losses(
    state, frozen, student: Prompts, teacher: Prompts, rollout: Rollout, config: StepConfig
) -> jax.Array:
    """Return the KL of student and teacher by row, [B], in mean nats per response token."""
    mask_BxT = rollout.mask_BxT
    batch = Batch(student, teacher, None, jnp.zeros(mask_BxT.shape[0], jnp.int32))
    params, compared = student_params(state.params, frozen, config), teacher_params(state.ema, frozen, config)
    networks = Networks(params, compared, None, config.model, config.teacher_model)
    loss = dataclasses.replace(config.loss, clip=0.0)  # clipping would hide infinite values
    values_BxT = distillation_values(networks, loss, WeightedBatch(batch, rollout, mask_BxT.astype(jnp.float32)))
    return jnp.sum(values_BxT, axis=1) / jnp.maximum(jnp.sum(mask_BxT, axis=1), 1)


def _finite_or_none(value) -> float | None:
    return float(value) if math.isfinite(value) else None
