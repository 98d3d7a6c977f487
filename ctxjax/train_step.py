"""One optimiser step on one batch of fresh rollouts, as a single compiled program.

    train_step = update_step after rollout_step

``rollout_step`` samples y from the bare student (and y' under the other contexts); ``update_step`` scores
them, takes the gradient and moves the parameters. The halves are public for hosts that must act between
them, such as a game's environment.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from ctxjax import losses, masks, optim, rng
from ctxjax.losses import LossConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.optim import OptimConfig
from ctxjax.sampling import SamplingConfig, sample
from ctxjax.types import Batch, Mean, Params, PrefixKV, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All static facts of a step. Hashable; one compiled program for each value."""

    model: ModelConfig
    teacher_model: ModelConfig
    sampling: SamplingConfig
    loss: LossConfig
    optim: OptimConfig


def init_state(params: Params, config: StepConfig, key: jax.Array) -> TrainState:
    """The state at step 0. ``params`` are copied, since a step overwrites its own in place: the caller's may
    serve as the frozen teacher."""
    params = jax.tree.map(jnp.copy, params)
    opt_state = jax.jit(optim.optimizer(config.optim).init)(params)
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, key=key)


def rollout_step(state: TrainState, batch: Batch, config: StepConfig) -> tuple[Rollout, Rollout | None]:
    """(y, y'): responses of the student to the bare view, and to the other contexts where there are any."""

    def respond(prompts, stream):
        rows_B = batch.example_id_B[: prompts.tokens_BxP.shape[0]]
        keys_B = rng.row_keys(rng.key_for(state.key, state.step, stream), rows_B)
        return sample(state.params, config.model, config.sampling, prompts, keys_B)

    other = respond(batch.other, "retention") if batch.other is not None else None
    return respond(batch.bare, "rollout"), other


def update_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    rollout: Rollout,
    other_rollout: Rollout | None,
    config: StepConfig,
    teacher_prefix: PrefixKV | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The new state and the step's metrics, float32 scalars (losses in nats per token)."""

    def loss_of(params):
        return losses.objective(
            params,
            frozen,
            config.model,
            config.teacher_model,
            config.loss,
            batch,
            rollout,
            other_rollout,
            teacher_prefix,
        )

    (loss, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optim.optimizer(config.optim).update(grads, state.opt_state, state.params)
    metrics = {name: mean.value for name, mean in parts.items()} | response_metrics(rollout, config.sampling)
    metrics |= {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "lr": jnp.float32(optim.schedule(config.optim)(state.step)),
    }
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def response_metrics(rollout: Rollout, sampling: SamplingConfig) -> dict[str, jax.Array]:
    """Mean length in tokens, end token included, and the share of responses cut at the limit."""
    from_end = jnp.any(rollout.mask_BxT & masks.is_any(rollout.tokens_BxT, sampling.eos_ids), axis=1)
    length_B = jnp.sum(rollout.mask_BxT, axis=1)
    everything = jnp.ones_like(from_end)
    return {
        "response_length": Mean.of(length_B, everything).value,
        "response_tokens": jnp.sum(rollout.mask_BxT, dtype=jnp.float32),
        "truncated": Mean.of(~from_end, everything).value,
    }


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    state: TrainState, frozen: Params, batch: Batch, config: StepConfig, teacher_prefix: PrefixKV | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Sample, score, update: the whole step in one program. ``state`` is donated; ``frozen`` is the teacher, and
    ``teacher_prefix`` what it made of the shared context, where the caller keeps that (see losses.objective)."""
    rollout, other_rollout = rollout_step(state, batch, config)
    return update_step(state, frozen, batch, rollout, other_rollout, config, teacher_prefix)
