"""AdamW with gradient clipping and a learning-rate schedule, from optax."""

from __future__ import annotations

import dataclasses

import optax

from ctxjax.types import bounded


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW's hyperparameters.

    ``lr``: peak learning rate. ``schedule``: "constant", or "cosine" (to 0 at step ``steps``); both begin with
    ``warmup_steps`` steps of linear warm-up, from lr / warmup_steps in the first step to lr in the last of them: a step
    with the rate 0 would waste its rollouts. ``clip`` bounds the gradient's global norm.
    """

    lr: float = bounded(zero=True, at_most=1.0)
    steps: int
    schedule: str = "constant"
    warmup_steps: int = bounded(0, zero=True)
    b1: float = bounded(0.9, zero=True, at_most=0.99999)
    b2: float = bounded(0.999, zero=True, at_most=0.9999999)
    weight_decay: float = bounded(0.01, zero=True, at_most=1.0)
    clip: float = 1.0


def _constant(config: OptimConfig) -> optax.Schedule:
    if config.warmup_steps == 0:
        return optax.constant_schedule(config.lr)
    return optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1)


def _cosine(config: OptimConfig) -> optax.Schedule:
    warmup = max(config.warmup_steps, 1)
    return optax.warmup_cosine_decay_schedule(config.lr / warmup, config.lr, warmup - 1, max(config.steps, warmup))


SCHEDULES = {"constant": _constant, "cosine": _cosine}


def schedule(config: OptimConfig) -> optax.Schedule:
    """Return the schedule: step number (the first is 0) -> learning rate."""
    return SCHEDULES[config.schedule](config)


def is_schedule_count(node) -> bool:
    """Whether a node of the optimiser's state is the schedule's count of steps."""
    return isinstance(node, optax.ScaleByScheduleState)


def optimizer(config: OptimConfig, rate: optax.Schedule | None = None) -> optax.GradientTransformation:
    """Return the optimiser: clip by global norm, then AdamW. ``rate``: None for the schedule of ``config``."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate or schedule(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
