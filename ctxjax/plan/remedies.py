"""Suggest changes to a configuration that does not fit: estimated from its plan, or compiled if that is fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from ctxjax.plan.step import Plan

CHEAP = 20  # seconds; if the plan compiled faster, changes are compiled too, otherwise only estimated


class Remedy(NamedTuple):
    """A change as a command-line flag, and the bytes of a chip with it: compiled or estimated."""

    flag: str
    total_bytes: int
    compiled: bool


def estimate_remedies(
    plan: Plan, config: ConfigDict, ways: int, larger: str | None, larger_chips: int
) -> Iterator[Remedy]:
    """Estimate the memory of single changes, the mildest first. ``ways``: devices that share the rows of a batch.

    Temporaries that are not gradients, cache or copies of weights are assumed to be activations, which shrink with the
    rows of a micro-batch and with what layers keep for the backward pass. This is only approximately true.
    """
    kept = min(
        max(plan.temporary_parts["gradients"], sum(plan.temporary_parts.values()) - plan.temporary_parts["gradients"]),
        plan.temporaries,
    )
    activations = plan.temporaries - kept
    parts = config.train.micro_batches
    if config.train.batch_size % (2 * parts * ways) == 0:
        yield Remedy(f"--config.train.micro_batches={2 * parts}", plan.total - activations // 2, False)
    if config.model.remat in ("none", "dots"):
        yield Remedy("--config.model.remat=full", plan.total - activations * 3 // 4, False)
    if config.rollout.weights == "gathered":
        yield Remedy(
            "--config.rollout.weights=stored",
            plan.total - plan.temporary_parts["weights for decoding"] * (ways - 1) // ways,
            False,
        )
    if config.lora.rank == 0:
        less = (
            plan.buffers.get("optimiser moments", 0)
            + plan.buffers.get("trained weights", 0)
            + plan.temporary_parts["gradients"]
        )
        yield Remedy("--config.lora.rank=16", plan.total - min(less, plan.total), False)
    if larger:
        share = plan.chips / larger_chips
        yield Remedy(f"--topology={larger}", int(plan.total * share), False)


def choose_remedies(
    plan: Plan, estimates: Iterator[Remedy], limit: int, compile_with: Callable[[str], Plan | None]
) -> list[Remedy]:
    """Return the changes that bring a plan under ``limit`` bytes; if no single change does, return all of them.

    If the plan compiled in less than CHEAP seconds, ``compile_with`` compiles each change. It returns None if the
    configuration does not allow the change; the estimate then stays.
    """
    found = []
    for remedy in estimates:
        tried = compile_with(remedy.flag) if plan.compile_seconds < CHEAP else None
        found.append(remedy if tried is None else Remedy(remedy.flag, tried.total, True))
    return [remedy for remedy in found if remedy.total_bytes <= limit] or found
