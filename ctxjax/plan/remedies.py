"""First changes to a configuration that does not fit: by arithmetic on its plan, or by compiling them where that is
cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from ctxjax.plan.step import Plan

# Seconds: plans that were compiled faster are tried out, others are only estimated.
CHEAP = 20


class Remedy(NamedTuple):
    """A change as it is written on the command line, and a chip's bytes with it: compiled, or else estimated."""

    flag: str
    total_bytes: int
    compiled: bool


def candidates(plan: Plan, config: ConfigDict, ways: int, larger: str | None, larger_chips: int) -> Iterator[Remedy]:
    """Estimates of single changes, the mildest first. ``ways``: devices that the rows of a batch are spread over.

    What of the temporaries is neither gradients nor cache nor a copy of weights goes with the rows of a micro-batch
    and with what layers keep; the estimate takes all of it to do so, and is the better the more of it does.
    """
    kept = min(max(plan.inside["gradients"], sum(plan.inside.values()) - plan.inside["gradients"]), plan.temporaries)
    activations = plan.temporaries - kept
    parts = config.train.micro_batches
    if config.train.batch_size % (2 * parts * ways) == 0:
        yield Remedy(f"--config.train.micro_batches={2 * parts}", plan.total - activations // 2, False)
    if config.model.remat in ("none", "dots"):
        yield Remedy("--config.model.remat=full", plan.total - activations * 3 // 4, False)
    if config.rollout.weights == "gathered":
        yield Remedy(
            "--config.rollout.weights=stored",
            plan.total - plan.inside["weights for decoding"] * (ways - 1) // ways,
            False,
        )
    if config.lora.rank == 0:
        less = plan.held.get("optimiser moments", 0) + plan.held.get("trained weights", 0) + plan.inside["gradients"]
        yield Remedy("--config.lora.rank=16", plan.total - min(less, plan.total), False)
    if larger:
        share = plan.chips / larger_chips
        yield Remedy(f"--topology={larger}", int(plan.total * share), False)


def remedies(
    plan: Plan, estimates: Iterator[Remedy], limit: int, compile_with: Callable[[str], Plan | None]
) -> list[Remedy]:
    """The changes that bring a plan under ``limit`` bytes, or where no single one does, all with what they leave.

    Where the plan compiled in less than CHEAP seconds, each is compiled by ``compile_with``; None: it cannot be.
    """
    found = []
    for remedy in estimates:
        tried = compile_with(remedy.flag) if plan.compile_seconds < CHEAP else None
        found.append(remedy if tried is None else Remedy(remedy.flag, tried.total, True))
    return [remedy for remedy in found if remedy.total_bytes <= limit] or found
