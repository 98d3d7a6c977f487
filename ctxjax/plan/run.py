"""From a configuration to a plan: architectures, lengths, devices, and what would make it fit."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from ctxjax import config as config_lib
from ctxjax.config import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.task import Row
from ctxjax.data.tasks import TASKS, WORLDS
from ctxjax.distill.losses import LossConfig
from ctxjax.inputs.base_model import make_model_config
from ctxjax.models.transformer import ModelConfig
from ctxjax.plan import chips
from ctxjax.plan.architectures import architecture
from ctxjax.plan.remedies import candidates, remedies
from ctxjax.plan.report import as_json, verdict
from ctxjax.plan.step import Plan, Shapes, make_plan


def plan(
    config: ConfigDict, topology: str | None, devices: int | None, arm: str | None = None, effort: str = "least"
) -> dict:
    """The plan of a configuration's step as plain values (report.as_json); exactly one of ``topology`` and ``devices``
    is given. ``effort``, for a ``topology``: how far it is compiled, a key of step.EFFORTS.

    Raises ValueError or FileNotFoundError with the remedy.
    """
    generation = chips.generation(topology) if topology else None
    places = chips.tpu_devices(topology) if topology else chips.local_devices(devices)
    made, facts = _made(config, places, arm, effort if topology else "full")
    facts["devices"] = topology or f"{devices} x {places[0].device_kind} ({places[0].platform})"
    suggested = []
    if generation and verdict(made, chips.CHIPS[generation].hbm_gib) != "fits":
        larger = chips.next_larger(topology)
        estimates = candidates(made, config, facts["rows_over"], larger, chips.chips(larger) if larger else 0)
        limit = int(chips.USABLE * chips.CHIPS[generation].hbm_gib * 2**30)
        suggested = remedies(made, estimates, limit, lambda flag: _changed(config, topology, flag, arm, effort))
    return as_json(made, facts, generation, suggested)


def _changed(config: ConfigDict, topology: str, flag: str, arm: str | None, effort: str) -> Plan | None:
    """The plan with one more flag; None where the configuration does not allow it."""
    name, _, value = flag.removeprefix("--").partition("=")
    changed = config.copy_and_resolve_references()
    if name == "topology":
        topology = value
    else:
        old = changed
        for part in name.removeprefix("config.").split(".")[:-1]:
            old = old[part]
        field = name.split(".")[-1]
        old[field] = type(old[field])(value)
    try:
        return _made(changed, chips.tpu_devices(topology), arm, effort)[0]
    except ValueError:
        return None


def _made(config: ConfigDict, devices: list, arm: str | None, effort: str) -> tuple[Plan, dict]:
    notes = []
    config = config.copy_and_resolve_references()
    task = config.task
    if task not in TASKS:  # its shapes can be planned all the same
        notes.append(f"task {task!r} is not part of this version; its shapes are planned")
        config.task = "qa_jsonl"
    experiment = config_lib.experiment(config, len(devices))
    loss_name = arm or max(experiment.arms, key=lambda name: _passes(experiment.arms[name]))
    if loss_name not in experiment.arms:
        raise ValueError(f"--arm={arm}: the configuration's run_arms are {', '.join(experiment.arms)}")
    dtype = experiment.model.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    model, source, shapes = _student(experiment, dtype, _is_shared(experiment))
    facts = {"model": f"{source}; {_size(model)}", "task": task, "arm": loss_name}
    teacher = None
    if experiment.teacher.path:
        teacher, where = architecture(experiment.teacher.path, dtype, experiment.model.remat)
        facts["teacher"] = f"{experiment.teacher.path}, read from {where}; {_size(teacher)}"
    elif experiment.teacher_base.steps:
        teacher = dataclasses.replace(
            make_model_config(experiment.teacher_base, model.vocab_size), dtype=dtype, remat=experiment.model.remat
        )
        facts["teacher"] = f"a base of its own; {_size(teacher)}"
    kind = experiment.model.attention
    model, teacher = (one and dataclasses.replace(one, attention=kind) for one in (model, teacher))
    facts["mesh"] = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(experiment.mesh).items() if size)
    facts["rows_over"] = experiment.mesh.data * experiment.mesh.fsdp
    trained = f"LoRA of rank {experiment.lora.rank}" if experiment.lora else "all weights trained"
    train, shared = experiment.train, " (the context shared)" if shapes.shared else ""
    facts["step"] = (
        f"{train.batch_size} rows in {train.micro_batches} micro-batches, prompts of {shapes.bare} and "
        f"{shapes.context} tokens{shared}, responses of {experiment.rollout.max_tokens}, {dtype}, {trained}, "
        f"remat {experiment.model.remat}"
    )
    facts["notes"] = "; ".join(notes)
    return make_plan(experiment, experiment.arms[loss_name], model, teacher, shapes, devices, effort), facts


def _is_shared(config: Experiment) -> bool:
    """Whether all rows have one context, which is then read once for all."""
    own = ("context_column", "context_files", "hint")
    return not any(getattr(config.task_config, field, None) for field in own)


def _passes(loss: LossConfig) -> int:
    """How many passes and trees a step of an arm needs, roughly: to find the most demanding one."""
    return (loss.beta > 0) + 2 * (loss.mu > 0) + loss.needs_ema + (loss.reference > 0)


def _size(model: ModelConfig) -> str:
    return f"{model.layers} layers of width {model.width}, vocabulary {model.vocab_size}"


def _student(config: Experiment, dtype: str, shared: bool) -> tuple[ModelConfig, str, Shapes]:
    """(architecture, where it was read, lengths)."""
    bare, context = config.prompt.max_bare_tokens, config.prompt.max_context_tokens
    if config.model.path:
        model, where = architecture(config.model.path, dtype, config.model.remat)
        for name, length in (("max_bare_tokens", bare), ("max_context_tokens", context)):
            if not length:
                raise ValueError(f"prompt.{name} = 0, and a plan reads no data that would tell; set it, in tokens")
        if context < bare:
            raise ValueError(f"prompt.max_context_tokens = {context} is less than prompt.max_bare_tokens = {bare}")
        return model, f"{config.model.path}, read from {where}", Shapes(bare, context, shared)
    assert config.task in WORLDS  # config.experiment has seen to it
    world = TASKS[config.task][1](config.task_config)
    tokenizer, row = world.tokenizer(), world.longest_pretraining_row()
    model = dataclasses.replace(make_model_config(config.base, len(tokenizer)), dtype=dtype, remat=config.model.remat)
    lengths = [
        len(prompts_lib.encode(tokenizer, [Row("", row.question, text, "")], config.prompt)[0])
        for text in (None, row.context)
    ]
    shapes = Shapes(bare or lengths[0], context or lengths[1], shared)
    return model, f"a base of its own (task {config.task})", shapes
