"""Plan a configuration: architectures, lengths, devices, and changes that make it fit."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from ctxjax import config as config_lib
from ctxjax.config_sections import Experiment
from ctxjax.data import splits
from ctxjax.data.contexts import FROM_ROWS
from ctxjax.data.prompts import SHORTEST_PREFIX
from ctxjax.data.shapes import ViewShape, make_shape
from ctxjax.data.task import Task
from ctxjax.data.tasks import TASKS, WORLDS
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import count_passes, needs_ema
from ctxjax.host import progress
from ctxjax.host.hub import find_folder
from ctxjax.inputs.base_model import make_model_config
from ctxjax.inputs.batch_shapes import BatchShapes, make_batch_shapes
from ctxjax.inputs.model_folder import load_tokenizer
from ctxjax.inputs.run_inputs import describe_outliers, encode_training_rows
from ctxjax.inputs.teacher_samples import steps_with_samples
from ctxjax.models.attention import choose_kind
from ctxjax.models.transformer import ModelConfig
from ctxjax.plan import chips
from ctxjax.plan.architectures import find_architecture
from ctxjax.plan.remedies import choose_remedies, estimate_remedies
from ctxjax.plan.report import as_json, judge
from ctxjax.plan.step import Plan, make_plan


class Lengths(NamedTuple):
    """Lengths of prompts that are given in place of data, in tokens.

    ``prefix``: what prompts with a context start with, up to its end; read once for all rows if they have the same
    context. ``question``: the longest prompt without a context.
    """

    prefix: int
    question: int


class Views(NamedTuple):
    """The shapes of a run's prompts, as in BatchShapes. ``note``: what a reader should know of them; may be empty.
    ``turns``: most turns of an episode, each of which is a row of the batch."""

    bare: ViewShape
    context: ViewShape
    other: ViewShape | None
    note: str
    turns: int = 1


def plan(
    config: ConfigDict,
    topology: str | None,
    devices: int | None,
    arm: str | None = None,
    effort: str = "least",
    lengths: Lengths | None = None,
) -> dict:
    """Plan the step of a configuration; return plain values (report.as_json).

    Give exactly one of ``topology`` and ``devices``. ``effort``: how far to compile for a ``topology``, a key of
    step.EFFORTS. ``lengths``: None to read them from the data. Raises ValueError or FileNotFoundError with the remedy.
    """
    generation = chips.parse_generation(topology) if topology else None
    chosen = chips.make_tpu_devices(topology) if topology else chips.get_local_devices(devices)
    experiment = config_lib.experiment(config, len(chosen))
    views = find_views(experiment, lengths)
    made, facts = _plan_step(config, chosen, arm, effort if topology else "full", views)
    facts["devices"] = topology or f"{devices} x {chosen[0].device_kind} ({chosen[0].platform})"
    suggested = []
    if generation and judge(made, chips.CHIPS[generation].hbm_gib) != "fits":
        larger = chips.find_next_larger(topology)
        estimates = estimate_remedies(made, config, experiment.mesh, larger, chips.count_chips(larger) if larger else 0)
        limit = int(chips.USABLE * chips.CHIPS[generation].hbm_gib * 2**30)
        suggested = choose_remedies(
            made, estimates, limit, lambda flag: _plan_with_flag(config, topology, flag, arm, effort, views)
        )
    return as_json(made, facts, generation, suggested)


def _plan_with_flag(
    config: ConfigDict, topology: str, flag: str, arm: str | None, effort: str, views: Views
) -> Plan | None:
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
        return _plan_step(changed, chips.make_tpu_devices(topology), arm, effort, views)[0]
    except ValueError:
        return None


def _plan_step(config: ConfigDict, devices: list, arm: str | None, effort: str, views: Views) -> tuple[Plan, dict]:
    experiment = config_lib.experiment(config, len(devices))
    steps = {name: _find_largest_step(experiment, name) for name in experiment.arms}
    # Of arms with as many passes, one that samples responses is the larger one.
    loss_name = arm or max(steps, key=lambda name: (_count_passes(steps[name][0]), not steps[name][1]))
    if loss_name not in experiment.arms:
        raise ValueError(f"--arm={arm} is not known; choose from run_arms: {', '.join(experiment.arms)}")
    dtype = experiment.model.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    shapes = make_batch_shapes(experiment, views.bare, views.context, views.other, views.turns)
    model, source = _find_student(experiment, dtype)
    _check_positions(model, shapes)
    facts = {"model": f"{source}; {_format_size(model)}", "task": config.task, "arm": loss_name}
    teacher = None
    if experiment.teacher.path:
        teacher, where = find_architecture(experiment.teacher.path, dtype, experiment.model.remat)
        facts["teacher"] = f"{experiment.teacher.path}, read from {where}; {_format_size(teacher)}"
    elif experiment.teacher_base.steps:
        teacher = dataclasses.replace(
            make_model_config(experiment.teacher_base, model.vocab_size), dtype=dtype, remat=experiment.model.remat
        )
        facts["teacher"] = f"a base trained from scratch; {_format_size(teacher)}"
    _check_positions(teacher or model, shapes)
    model, teacher = (
        one and dataclasses.replace(one, attention=choose_kind(experiment.model.attention, one, devices[0]))
        for one in (model, teacher)
    )
    facts["mesh"] = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(experiment.mesh).items() if size)
    facts["rows_over"] = experiment.mesh.data * experiment.mesh.fsdp
    trained = f"LoRA of rank {experiment.lora.rank}" if experiment.lora else "all weights trained"
    facts["batch"] = shapes.describe()
    facts["step"] = f"{model.arithmetic}, {trained}, remat {experiment.model.remat}"
    offloaded = "teacher.offload: the teacher is counted as if it stayed on the device" * experiment.teacher.offload
    loss, has_samples = steps[loss_name]
    given = "all steps learn from the teacher's samples, which are drawn before training" * has_samples
    facts["notes"] = "; ".join(filter(None, [views.note, given, offloaded]))
    return make_plan(experiment, loss, model, teacher, shapes, devices, effort, has_samples), facts


def find_views(config: Experiment, lengths: Lengths | None) -> Views:
    """Return the shapes of the prompts: those of ``lengths``, or else of the task's rows, encoded as a run does.

    Raises ValueError if the rows or the tokenizer are not on this machine.
    """
    if lengths is not None:
        return _make_views(config, lengths)
    try:
        with progress.Bar("reading the questions"):
            opened, tokenizer = _open_task(config)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        raise ValueError(
            f"the lengths of prompts cannot be read: {error}. Or give them in tokens: --prefix=N, what all prompts "
            "with the context start with, and --question=N, the longest prompt without it"
        ) from None
    with progress.Bar("encoding the training questions"):
        encoded, retention = encode_training_rows(config, opened, tokenizer)
    other = retention.shape if retention else None
    turns = _count_turns(config)
    notes = [describe_outliers(encoded, retention), _describe_turns(turns)]
    return Views(**encoded.shapes, other=other, note="; ".join(filter(None, notes)), turns=turns)


def _count_turns(config: Experiment) -> int:
    """Return the most turns of an episode; 1 if the task is no game (GameTask)."""
    return getattr(config.task_config, "turns", 1)


def _describe_turns(turns: int) -> str:
    planned = f"all {turns} turns of every episode are planned as sampled at once; a run samples one at a time"
    return planned if turns > 1 else ""


def _open_task(config: Experiment) -> tuple[Task, object]:
    """Return the task with its rows, and the student's tokenizer."""
    opened, path = TASKS[config.task][1](config.task_config), config.model.path
    splits.check_splits(opened)
    return opened, load_tokenizer(find_folder(path, weights=False)) if path else opened.tokenizer()


def _make_views(config: Experiment, lengths: Lengths) -> Views:
    (prefix, question), turns = lengths, _count_turns(config)
    if prefix < 0 or question < 1:
        raise ValueError(f"--prefix={prefix} --question={question}: give 0 or more and 1 or more tokens")
    shared = prefix if _is_context_shared(config) and prefix >= SHORTEST_PREFIX else 0
    notes = ["prompts have the lengths of --prefix and --question; no data was read", _describe_turns(turns)]
    return Views(
        make_shape(question, 0),
        make_shape(prefix + question, shared),
        make_shape(prefix + question, 0) if config.has_retention else None,
        "; ".join(filter(None, notes)),
        turns,
    )


def _is_context_shared(config: Experiment) -> bool:
    """Whether all rows have the same context, which is then read once for all."""
    own = ("context_column", "context_files", "hint", *FROM_ROWS)
    return not any(getattr(config.task_config, field, None) for field in own)


def _check_positions(model: ModelConfig, shapes: BatchShapes) -> None:
    """Raise ValueError if the planned prompts and responses exceed the model's positions; a run refuses them too."""
    if shapes.longest + shapes.responses > model.max_positions:
        raise ValueError(
            f"a prompt of {shapes.longest} tokens and rollout.max_tokens = {shapes.responses} are together more than a "
            f"model's {model.max_positions} positions (max_position_embeddings in its config.json); lower them, or "
            "take a model for longer texts"
        )


def _find_largest_step(config: Experiment, arm: str) -> tuple[LossConfig, bool]:
    """Return the objective of the arm's largest step, and whether that step is given the teacher's samples.

    It is if all steps of the arm are off-policy. Otherwise a step that samples responses is larger.
    """
    loss = config.arms[arm]
    if len(steps_with_samples(config, arm)) < config.train.steps:
        return loss, False
    return loss.of_off_policy_steps, True


def _count_passes(loss: LossConfig) -> int:
    """Return roughly how many passes and parameter trees a step of an arm needs, to find the largest step."""
    return count_passes(loss).total() + needs_ema(loss)


def _format_size(model: ModelConfig) -> str:
    return f"{model.layers} layers of width {model.width}, vocabulary {model.vocab_size}"


def _find_student(config: Experiment, dtype: str) -> tuple[ModelConfig, str]:
    """Return the student's architecture and its source."""
    if config.model.path:
        model, where = find_architecture(config.model.path, dtype, config.model.remat)
        return model, f"{config.model.path}, read from {where}"
    assert config.task in WORLDS  # config.experiment has checked it
    model = make_model_config(config.base, len(TASKS[config.task][1](config.task_config).tokenizer()))
    return dataclasses.replace(model, dtype=dtype, remat=config.model.remat), (
        f"a base trained from scratch (task {config.task})"
    )
