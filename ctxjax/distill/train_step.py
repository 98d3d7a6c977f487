"""One optimiser step on one batch of fresh rollouts, as a single compiled program.

    train_step = rollout_step, then update_step

``rollout_step`` samples y from the bare student, and y' under the other contexts. ``update_step`` scores them, takes
the gradient and moves the parameters. Both are public: a game's environment runs on the host between them. In an
off-policy step y comes from the frozen teacher (``teacher_rollout``), the same for every arm of a run.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from ctxjax import rng, sharding
from ctxjax.distill import losses, objective, optim
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import Networks, WeightedBatch
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.response_stats import response_metrics
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.models import lora as lora_lib, params as params_lib
from ctxjax.models.lora import LoraConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Batch, Frozen, Max, Mean, Params, Rollout, TrainState, map_rows


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything static about a step. Hashable; each value has its own compiled program.

    ``lora`` None: all weights are trained. ``micro_batches``: the batch's gradient is accumulated over this many parts.
    """

    model: ModelConfig
    teacher_model: ModelConfig
    sampling: SamplingConfig
    loss: LossConfig
    optim: OptimConfig
    lora: LoraConfig | None = None
    micro_batches: int = 1


def init_state(params: Params, config: StepConfig, key: jax.Array, adapter: Params | None = None) -> TrainState:
    """Return the state at step 0 of a student that starts from ``params``, on the current mesh.

    With an adapter, the state holds only the adapter: a new one, or a copy of ``adapter``. Otherwise it holds a copy of
    ``params``: a step overwrites the state in place, and the caller's arrays may serve as the frozen teacher.
    """
    start = params if config.lora is None else adapter
    if start is not None:
        trained = jax.tree.map(jnp.copy, sharding.bring_to_device(start))
    else:
        specs = lora_lib.specs(config.model, config.lora)
        trained = params_lib.init(specs, rng.key_for(key, 0, "adapter"), jax.sharding.get_mesh())
    opt_state = jax.jit(optim.optimizer(config.optim).init)(trained)
    ema = jax.tree.map(jnp.copy, trained) if objective.needs_ema(config.loss) else None
    return TrainState(step=jnp.int32(0), params=trained, opt_state=opt_state, key=key, ema=ema)


def student_params(trained: Params, frozen: Frozen, config: StepConfig) -> Params:
    """Return the student's whole parameter tree: the trained weights, or the base joined with the adapter."""
    return trained if config.lora is None else lora_lib.join(frozen.base, trained, config.lora)


def off_policy_steps(loss: LossConfig, key: jax.Array, steps: int) -> np.ndarray:
    """Return bool [steps]: True for the steps, of a run with root key ``key``, that learn from teacher samples."""
    uniform = jax.vmap(lambda step: jax.random.uniform(rng.key_for(key, step, "policy")))(jnp.arange(steps))
    return (np.arange(steps) < loss.off_policy_steps) | (np.asarray(uniform) >= loss.on_policy_fraction)


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def teacher_rollout(
    teacher: Params, batch: Batch, key: jax.Array, step: jax.Array, model: ModelConfig, sampling: SamplingConfig
) -> Rollout:
    """Sample the frozen teacher's responses, with the context, for ``step`` of a run with root key ``key``."""
    keys_B = rng.row_keys(rng.key_for(key, step, "rollout"), batch.row_number_B)
    return sample(sharding.bring_to_device(teacher), model, sampling, batch.context, keys_B)


def teacher_params(ema: Params | None, frozen: Frozen, config: StepConfig) -> Params:
    """Return the whole parameter tree of the teacher: the frozen one, or the student's moving average."""
    if config.loss.teacher == "ema":
        return student_params(ema, frozen, config)
    return sharding.bring_to_device(frozen.teacher)


def rollout_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    config: StepConfig,
    rollout: Rollout | None = None,
    other_rollout: Rollout | None = None,
) -> tuple[Rollout, Rollout | None]:
    """(y, y'): the student's responses to the bare prompts, and to those under other contexts if the batch has any.

    A response that is given is returned as it is: the teacher's samples of an off-policy step, or a game's turns.
    """
    student = student_params(state.params, frozen, config)

    def respond(prompts, stream):
        rows_B = batch.row_number_B[: prompts.tokens_BxP.shape[0]]
        keys_B = rng.row_keys(rng.key_for(state.key, state.step, stream), rows_B)
        return sample(student, config.model, config.sampling, prompts, keys_B)

    if rollout is None:
        rollout = respond(batch.bare, "rollout")
    if other_rollout is None and batch.other is not None:
        other_rollout = respond(batch.other, "retention")
    return rollout, other_rollout


def update_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    rollout: Rollout,
    other_rollout: Rollout | None,
    config: StepConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Return the new state and the step's metrics, float32 scalars (losses in nats per token).

    A step whose loss or gradient is not finite is ``skipped``: parameters, moments and moving average do not change;
    the step number, and with it data, keys and learning rate, advances.
    """
    rows = _weighted_rows(batch, rollout, other_rollout, config)
    (loss, parts), grads = _gradient(state, frozen, rows, config)
    updates, opt_state = optim.optimizer(config.optim).update(grads, state.opt_state, state.params)
    metrics = {name: mean.value for name, mean in parts.items()} | response_metrics(rollout, config.sampling)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    is_response_B, has_tokens_B = jnp.any(rollout.mask_BxT, axis=1), jnp.any(rows.weight_BxT > 0, axis=1)
    metrics |= {
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": jnp.float32(optim.schedule(config.optim)(state.step)),
        "skipped": 1.0 - is_finite.astype(jnp.float32),
        "untrained": Mean.of(~has_tokens_B, is_response_B).value,
    }
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda old, new: old + (1 - config.loss.ema_decay) * (new - old), ema, params)
    moved, stays = (params, opt_state, ema), (state.params, state.opt_state, state.ema)

    def choose(new, old):
        # The schedule's count stays that of the step, so that the schedule ends with the training.
        return new if optim.is_schedule_count(new) else jnp.where(is_finite, new, old)

    params, opt_state, ema = jax.tree.map(choose, moved, stays, is_leaf=optim.is_schedule_count)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics


def _weighted_rows(batch: Batch, rollout: Rollout, other_rollout: Rollout | None, config: StepConfig) -> WeightedBatch:
    """Add every token's share of the mean, which is known before any pass runs."""

    def weights(responses):
        mask_BxT = losses.trained_tokens(config.loss, responses, config.sampling.eos_ids)
        return losses.token_weights(mask_BxT, config.loss.averaging)

    other = (other_rollout, weights(other_rollout)) if other_rollout is not None else ()
    return WeightedBatch(batch, rollout, weights(rollout), *other)


def _networks(trained: Params, state: TrainState, frozen: Frozen, config: StepConfig) -> Networks:
    """The student of ``trained``, and what it is compared with."""
    student, teacher = student_params(trained, frozen, config), teacher_params(state.ema, frozen, config)
    ema = student_params(state.ema, frozen, config) if state.ema is not None else None
    models = config.model, config.teacher_model
    if config.loss.teacher == "frozen":
        return Networks(student, teacher, ema, *models, teacher_prefix=frozen.teacher_prefix)
    return Networks(student, teacher, ema, *models, frozen=sharding.bring_to_device(frozen.teacher))


def _gradient(state: TrainState, frozen: Frozen, rows: WeightedBatch, config: StepConfig):
    """Return ((loss, {metric: Mean or Max}), gradient with respect to the trained weights), over the whole batch."""

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_of(trained, rows):
        return objective.objective(_networks(trained, state, frozen, config), config.loss, rows, state.step)

    count = config.micro_batches
    if count == 1:
        return loss_of(state.params, rows)
    parts = map_rows(
        lambda x: sharding.split_micro_batches(x, count), rows, shared=lambda x: jnp.broadcast_to(x, (count, *x.shape))
    )
    part = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], parts))
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(loss_of, state.params, part))

    def is_metric(node):
        return isinstance(node, (Mean, Max))

    def add(total, part):
        return jax.tree.map(operator.add, total, loss_of(state.params, part), is_leaf=is_metric), None

    return lax.scan(add, nothing, parts)[0]


@functools.partial(jax.jit, static_argnames="config")
def term_gradients(state: TrainState, frozen: Frozen, batch: Batch, config: StepConfig) -> dict[str, Params]:
    """Return the gradient of each term of the objective alone, by the term's name, on responses that are sampled now.

    With their weights, they add up to the gradient of a step without micro-batches.
    """
    rollout, other_rollout = rollout_step(state, frozen, batch, config)
    rows = _weighted_rows(batch, rollout, other_rollout, config)

    def loss_of(trained, term):
        return objective.term_loss(_networks(trained, state, frozen, config), config.loss, term, rows, state.step)

    return {term.name: jax.grad(loss_of)(state.params, term) for term in objective.terms(config.loss)}


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    config: StepConfig,
    rollout: Rollout | None = None,
    other_rollout: Rollout | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Sample, score, update: the whole step in one program. ``state`` is donated, the rest is not.

    1. rollout_step samples y ~ student(. | x), and y' under the other contexts, unless they are given.
    2. The objective runs the passes of its terms over [prompt; response] and the head in chunks (objective.py).
    3. AdamW moves what is trained; a step whose loss or gradient is not finite changes nothing.

    Returns the new state and float32 metrics (update_step).
    """
    rollout, other_rollout = rollout_step(state, frozen, batch, config, rollout, other_rollout)
    return update_step(state, frozen, batch, rollout, other_rollout, config)
