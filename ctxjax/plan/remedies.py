"""Suggest changes to a configuration that does not fit: estimated from its plan, or compiled if that is fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from ctxjax.host.changes import CHANGEABLE
from ctxjax.plan.step import Plan
from ctxjax.sharding import MeshConfig

CHEAP = 20  # seconds; if the plan compiled faster, changes are compiled too, otherwise only estimated


class Remedy(NamedTuple):
    """A change as a command-line flag, and the bytes of a chip with it: compiled or estimated."""

    flag: str
    total_bytes: int
    compiled: bool


def list_flags(config: ConfigDict, ways: int) -> list[str]:
    """Return the single changes of a configuration that save memory in a step, as flags, the mildest first.

    ``ways``: devices that share the rows of a batch.
    """
    flags, parts = [], 2 * config.train.micro_batches
    if all(rows % (parts * ways) == 0 for rows in (config.train.batch_size, config.train.retention_rows)):
        flags.append(f"--config.train.micro_batches={parts}")
    if config.model.remat in ("none", "dots"):
        flags.append("--config.model.remat=full")
    if config.rollout.weights == "gathered":
        flags.append("--config.rollout.weights=stored")
    if config.lora.rank == 0:
        flags.append("--config.lora.rank=16")
    return flags


def suggest_less_memory(config: ConfigDict, ways: int) -> str:
    """Return what to try if a run with this configuration ran out of memory; see ``list_flags``."""
    flags = list_flags(config, ways)
    same = [flag for flag in flags if _name_field(flag) in CHANGEABLE]
    half = config.eval.batch_size // 2 // ways * ways
    other = [flag for flag in flags if flag not in same] + [f"--config.eval.batch_size={half}"] * (half > 0)
    lines = [f"The same command goes on with one of these, the mildest first: {', '.join(same)}"] * bool(same)
    lines += [f"A new run, in another --workdir, may have: {', '.join(other)}"] * bool(other)
    return ". ".join([*lines, "python -m ctxjax.plan shows what a step needs on how many devices"])


def _name_field(flag: str) -> str:
    return flag.removeprefix("--config.").partition("=")[0]


def estimate_remedies(
    plan: Plan, config: ConfigDict, mesh: MeshConfig, larger: str | None, larger_chips: int
) -> Iterator[Remedy]:
    """Estimate the memory of single changes, the mildest first. ``mesh``: its sizes, none of them -1.

    Temporaries that are not gradients, cache or copies of weights are assumed to be activations, which shrink with the
    rows of a micro-batch and with what layers keep for the backward pass. This is only approximately true.
    """
    kept = min(
        max(plan.temporary_parts["gradients"], sum(plan.temporary_parts.values()) - plan.temporary_parts["gradients"]),
        plan.temporaries,
    )
    activations = plan.temporaries - kept
    trained = plan.buffers.get("optimiser moments", 0) + plan.buffers.get("trained weights", 0)
    copies = [parts.get("weights for decoding", 0) for parts in (plan.temporary_parts, plan.teacher_stage)]
    of_step, of_teacher = (size * (mesh.fsdp - 1) // mesh.fsdp for size in copies)
    saved = {
        "train.micro_batches": activations // 2,
        "model.remat": activations * 3 // 4,
        "rollout.weights": of_step,
        "lora.rank": min(trained + plan.temporary_parts["gradients"], plan.total),
    }
    for flag in list_flags(config, mesh.data * mesh.fsdp):
        name = _name_field(flag)
        before = sum(plan.teacher_stage.values()) - of_teacher * (name == "rollout.weights")
        yield Remedy(flag, max(plan.total - saved[name], before), False)
    if larger:
        share = plan.chips / larger_chips
        yield Remedy(f"--topology={larger}", int(plan.peak * share), False)


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
        found.append(remedy if tried is None else Remedy(remedy.flag, tried.peak, True))
    return [remedy for remedy in found if remedy.total_bytes <= limit] or found
