"""Plan a configuration: architectures, lengths, devices, and changes that make it fit."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from ctxjax import config as config_lib
from ctxjax.config import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.task import Row
from ctxjax.data.tasks import TASKS, WORLDS
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import needs_ema
from ctxjax.inputs.base_model import make_model_config
from ctxjax.models.attention import choose_kind
from ctxjax.models.transformer import ModelConfig
from ctxjax.plan import chips
from ctxjax.plan.architectures import find_architecture
from ctxjax.plan.remedies import choose_remedies, estimate_remedies
from ctxjax.plan.report import as_json, judge
from ctxjax.plan.step import Plan, Shapes, make_plan


def plan(
    config: ConfigDict, topology: str | None, devices: int | None, arm: str | None = None, effort: str = "least"
) -> dict:
    """Plan the step of a configuration; return plain values (report.as_json).

    Give exactly one of ``topology`` and ``devices``. ``effort``: how far to compile for a ``topology``, a key of
    step.EFFORTS. Raises ValueError or FileNotFoundError with the remedy.
    """
    generation = chips.parse_generation(topology) if topology else None
    chosen = chips.make_tpu_devices(topology) if topology else chips.get_local_devices(devices)
    made, facts = _plan_step(config, chosen, arm, effort if topology else "full")
    facts["devices"] = topology or f"{devices} x {chosen[0].device_kind} ({chosen[0].platform})"
    suggested = []
    if generation and judge(made, chips.CHIPS[generation].hbm_gib) != "fits":
        larger = chips.find_next_larger(topology)
        estimates = estimate_remedies(
            made, config, facts["rows_over"], larger, chips.count_chips(larger) if larger else 0
        )
        limit = int(chips.USABLE * chips.CHIPS[generation].hbm_gib * 2**30)
        suggested = choose_remedies(
            made, estimates, limit, lambda flag: _plan_with_flag(config, topology, flag, arm, effort)
        )
    return as_json(made, facts, generation, suggested)


def _plan_with_flag(config: ConfigDict, topology: str, flag: str, arm: str | None, effort: str) -> Plan | None:
    """Plan with one more flag; None if the configuration does not allow it."""
    name, _, value = flag.removeprefix("--").partition("=")
    changed = config.copy_and_resolve_references()
    if name == "topology":
        topology = value
    else:
        section = changed
        for part in name.removeprefix("config.").split(".")[:-1]:
            section = section[part]
        field = name.split(".")[-1]
        section[field] = type(section[field])(value)
    try:
        return _plan_step(changed, chips.make_tpu_devices(topology), arm, effort)[0]
    except ValueError:
        return None


def _plan_step(config: ConfigDict, devices: list, arm: str | None, effort: str) -> tuple[Plan, dict]:
    notes = []
    config = config.copy_and_resolve_references()
    task = config.task
    if task not in TASKS:  # its shapes are enough for a plan
        notes.append(f"task {task!r} is not part of this version; only its shapes are planned")
        config.task = "qa_jsonl"
    experiment = config_lib.experiment(config, len(devices))
    loss_name = arm or max(experiment.arms, key=lambda name: _count_passes(experiment.arms[name]))
    if loss_name not in experiment.arms:
        raise ValueError(f"--arm={arm} is not known; choose from run_arms: {', '.join(experiment.arms)}")
    dtype = experiment.model.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    model, source, shapes = _read_student(experiment, dtype, _is_context_shared(experiment))
    _check_positions(model, shapes, experiment)
    facts = {"model": f"{source}; {_format_size(model)}", "task": task, "arm": loss_name}
    teacher = None
    if experiment.teacher.path:
        teacher, where = find_architecture(experiment.teacher.path, dtype, experiment.model.remat)
        facts["teacher"] = f"{experiment.teacher.path}, read from {where}; {_format_size(teacher)}"
    elif experiment.teacher_base.steps:
        teacher = dataclasses.replace(
            make_model_config(experiment.teacher_base, model.vocab_size), dtype=dtype, remat=experiment.model.remat
        )
        facts["teacher"] = f"a base trained from scratch; {_format_size(teacher)}"
    _check_positions(teacher or model, shapes, experiment)
    model, teacher = (
        one and dataclasses.replace(one, attention=choose_kind(experiment.model.attention, one, devices[0]))
        for one in (model, teacher)
    )
    facts["mesh"] = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(experiment.mesh).items() if size)
    facts["rows_over"] = experiment.mesh.data * experiment.mesh.fsdp
    trained = f"LoRA of rank {experiment.lora.rank}" if experiment.lora else "all weights trained"
    train, shared = experiment.train, " (shared context)" if shapes.shared else ""
    facts["step"] = (
        f"{train.batch_size} rows in {train.micro_batches} micro-batches, prompts of {shapes.bare} and "
        f"{shapes.context} tokens{shared}, responses of {experiment.rollout.max_tokens}, {model.arithmetic}, "
        f"{trained}, remat {experiment.model.remat}"
    )
    facts["notes"] = "; ".join(notes)
    return make_plan(experiment, experiment.arms[loss_name], model, teacher, shapes, devices, effort), facts


def _is_context_shared(config: Experiment) -> bool:
    """Whether all rows have the same context, which is then read once for all."""
    own = ("context_column", "context_files", "hint")
    return not any(getattr(config.task_config, field, None) for field in own)


def _check_positions(model: ModelConfig, shapes: Shapes, config: Experiment) -> None:
    """Raise ValueError if the planned prompts and responses exceed the model's positions; a run refuses them too."""
    tokens = config.rollout.max_tokens
    if max(shapes.bare, shapes.context) + tokens > model.max_positions:
        raise ValueError(
            f"prompts of {shapes.bare} and {shapes.context} tokens and rollout.max_tokens = {tokens} are together more "
            f"than a model's {model.max_positions} positions (max_position_embeddings in its config.json); lower them, "
            "or take a model for longer texts"
        )


def _count_passes(loss: LossConfig) -> int:
    """Return roughly how many passes and parameter trees a step of an arm needs, to find the largest step."""
    return (loss.beta > 0) + 2 * (loss.mu > 0) + needs_ema(loss) + (loss.reference > 0)


def _format_size(model: ModelConfig) -> str:
    return f"{model.layers} layers of width {model.width}, vocabulary {model.vocab_size}"


def _read_student(config: Experiment, dtype: str, shared: bool) -> tuple[ModelConfig, str, Shapes]:
    """Return (architecture, its source, lengths)."""
    bare, context = config.prompt.max_bare_tokens, config.prompt.max_context_tokens
    if config.model.path:
        model, where = find_architecture(config.model.path, dtype, config.model.remat)
        for name, length in (("max_bare_tokens", bare), ("max_context_tokens", context)):
            if not length:
                raise ValueError(f"prompt.{name} = 0, but a plan reads no data to find the length; set it, in tokens")
        if context < bare:
            raise ValueError(f"prompt.max_context_tokens = {context} is less than prompt.max_bare_tokens = {bare}")
        return model, f"{config.model.path}, read from {where}", Shapes(bare, context, shared)
    assert config.task in WORLDS  # config.experiment has checked it
    world = TASKS[config.task][1](config.task_config)
    tokenizer, row = world.tokenizer(), world.longest_pretraining_row()
    model = dataclasses.replace(make_model_config(config.base, len(tokenizer)), dtype=dtype, remat=config.model.remat)
    lengths = [
        len(prompts_lib.encode(tokenizer, [Row("", row.question, text, "")], config.prompt)[0])
        for text in (None, row.context)
    ]
    shapes = Shapes(bare or lengths[0], context or lengths[1], shared)
    return model, f"a base trained from scratch (task {config.task})", shapes
