"""Check a configuration and convert it: a ConfigDict goes in, frozen dataclasses come out.

No other module below the commands sees a ConfigDict. The dataclass of a part is declared in the module that it
configures, with its types and bounds; those that configure the run itself are in config_sections.py. The rules between
fields are here.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from ctxjax.config_fields import check_fields, one_of, require
from ctxjax.config_sections import (
    FAMILIES,
    BaseConfig,
    DecodeConfig,
    EvalConfig,
    Experiment,
    ExtractConfig,
    ModelSource,
    RunConfig,
    TeacherSource,
    TrainConfig,
)
from ctxjax.data.chat_template import parse_date
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.prompts import PLACEMENTS, PromptConfig
from ctxjax.data.records import KINDS, RecordsConfig
from ctxjax.data.task import FURTHER_VIEWS, METERS
from ctxjax.data.tasks import GAMES, TASKS, WORLDS
from ctxjax.distill.anchors import ANCHORS, GATES
from ctxjax.distill.divergences import DIVERGENCES, REMAINDERS, SUPPORTS
from ctxjax.distill.losses import CROSS_ENTROPY, LossConfig
from ctxjax.distill.optim import SCHEDULES, OptimConfig
from ctxjax.models.architecture import ATTENTION
from ctxjax.models.hf.adapters import AdapterSource
from ctxjax.models.lora import TARGETS, LoraConfig
from ctxjax.models.remat import POLICIES
from ctxjax.monitoring.alarms import ALARMS, AlarmsConfig
from ctxjax.monitoring.trackers import LoggingConfig
from ctxjax.sharding import DECODE_RULES, MeshConfig, check_divisible, fit_mesh

_SECTIONS = {  # in the order in which they are checked: a section before those that take values from it
    "": (RunConfig,),
    "model": (ModelSource,), "lora": (LoraConfig, AdapterSource), "base": (BaseConfig,), "teacher_base": (BaseConfig,),
    "mesh": (MeshConfig,), "prompt": (PromptConfig,), "rollout": (DecodeConfig,),
    "teacher": (TeacherSource, DecodeConfig), "loss": (LossConfig,),
    "optim": (OptimConfig,), "train": (TrainConfig,), "eval": (EvalConfig, DecodeConfig), "extract": (ExtractConfig,),
    "alarms": (AlarmsConfig,), "logging": (LoggingConfig,), "records": (RecordsConfig,),
}  # fmt: skip
_MADE = {  # taken from other sections
    "loss.temperature", "optim.steps", "eval.max_tokens", "teacher.max_tokens", "eval.weights", "teacher.weights",
}  # fmt: skip


def experiment(config: ConfigDict, device_count: int, trains: bool = True) -> Experiment:
    """Check a run's configuration and convert it to an Experiment.

    ``trains``: False for a command that does not train. Raises ValueError with the field, its value, and what would be
    right.
    """
    sections = _SECTIONS | {name: (task,) for name, (task, _) in TASKS.items()}
    config = ConfigDict(check_fields(config, sections, _MADE))
    one_of("task", config.task, TASKS)
    task_class, _ = TASKS[config.task]
    rollout = DecodeConfig(**config.rollout)
    one_of("rollout.weights", rollout.weights, DECODE_RULES)
    require(rollout.temperature > 0, "rollout.temperature", rollout.temperature, "above 0, as training samples")
    evaluation, samples = config.eval.to_dict(), config.eval.samples
    decode = dataclasses.replace(rollout, **{name: evaluation.pop(name) for name in ("temperature", "top_k", "top_p")})
    require(samples == 1 or decode.temperature > 0, "eval.samples", samples, "1 if eval.temperature = 0")
    for field, known in (("views", FURTHER_VIEWS), ("meters", METERS)):
        for name in evaluation.get(field, ()):
            one_of(f"eval.{field}", name, known)
    optim = OptimConfig(steps=config.train.steps, **config.optim)
    one_of("optim.schedule", optim.schedule, SCHEDULES)
    train = TrainConfig(**config.train)
    train = dataclasses.replace(train, retention_rows=train.retention_rows or train.batch_size)
    if train.retention_rows > train.batch_size:
        size = f"train.batch_size = {train.batch_size}"
        raise ValueError(f"train.retention_rows = {train.retention_rows} is more than {size}")
    prompt = PromptConfig(**config.prompt)
    one_of("prompt.placement", prompt.placement, PLACEMENTS)
    parse_date(prompt.date)
    prompt.collect_variables(has_context=True)  # refuses keywords of another form
    one_of("prompt.overlong", prompt.overlong, ("error", "drop"))
    if "grading" in config[config.task]:
        one_of(f"{config.task}.grading", config[config.task].grading, GRADERS)
    result = Experiment(
        seed=config.seed,
        task=config.task,
        task_config=task_class(**config[config.task], **_share_sections(task_class, config, prompt)),
        model=ModelSource(**config.model),
        teacher=_make_teacher(config.teacher, rollout),
        lora=_make_lora(config.lora),
        lora_init=config.lora.get("init", ""),
        base=BaseConfig(**config.base),
        teacher_base=BaseConfig(**config.teacher_base),
        mesh=fit_mesh(config.mesh.to_dict(), device_count),
        prompt=prompt,
        rollout=rollout,
        optim=optim,
        train=train,
        eval=EvalConfig(decode=decode, **evaluation),
        extract=ExtractConfig(**config.extract),
        alarms=_make_alarms(config.alarms),
        logging=LoggingConfig(**config.logging),
        arms=_make_arms(config, rollout.temperature),
        rates={name: config.arms[name].lr for name in config.run_arms if "lr" in config.arms[name]},
    )
    _check_model(result)
    if config.task in GAMES and result.eval.meters:
        raise ValueError(f"eval.meters = {result.eval.meters}: they read single responses, not games; leave it empty")
    if config.task == "style" and "drift" in result.eval.meters:
        raise ValueError(
            "eval.meters: drift asks the everyday questions that task = 'style' trains on; leave drift out"
        )
    if trains and config.task in GAMES:
        _check_arms_play(result)
    if trains and result.lora is None and result.model.param_dtype != "float32":
        raise ValueError(
            f"model.param_dtype = {result.model.param_dtype!r} and lora.rank = 0: these weights are trained, and their "
            "updates, often 5e-6, would round away; use model.param_dtype=float32 with model.dtype=bfloat16, which "
            "computes in bfloat16 all the same, or an adapter: lora.rank=16. A teacher with a folder of its own "
            "(teacher.path) may have bfloat16 weights: teacher.param_dtype"
        )
    ways = result.mesh.data * result.mesh.fsdp
    rows = {"train.batch_size": train.batch_size, "eval.batch_size": result.eval.batch_size}
    rows["train.retention_rows"] = train.retention_rows
    rows |= {} if config.model.path else {"base.batch_size": result.base.batch_size}
    rows |= {"teacher_base.batch_size": result.teacher_base.batch_size} if result.teacher_base.steps else {}
    for name, value in rows.items():
        check_divisible(name, value, ways)
    for name in ("train.batch_size", "train.retention_rows"):
        if rows[name] // ways % train.micro_batches:
            raise ValueError(
                f"{name} = {rows[name]} does not split into train.micro_batches = {train.micro_batches} parts of rows "
                f"of every device; use a multiple of {ways * train.micro_batches}"
            )
    return result


def _check_arms_play(config: Experiment) -> None:
    """Raise ValueError for an arm that learns from the teacher's samples: in a game only the student plays."""
    for name, loss in config.arms.items():
        if not loss.is_on_policy:
            raise ValueError(
                f"arm {name!r} learns from the teacher's samples (loss.on_policy_fraction = {loss.on_policy_fraction}, "
                f"loss.off_policy_steps = {loss.off_policy_steps}), and in task {config.task!r} only the student "
                "plays; leave the arm out (run_arms)"
            )


def _share_sections(task_class, config: ConfigDict, prompt: PromptConfig) -> dict[str, Any]:
    """Return the task's fields ``records`` and ``prompt`` from the sections of these names, if it has such fields."""
    records = RecordsConfig(**config.records)
    for kind in records.skip:
        one_of("records.skip", kind, KINDS)
    shared = {"records": records, "prompt": prompt}
    return {name: value for name, value in shared.items() if name in task_class.__dataclass_fields__}


def _make_teacher(config: ConfigDict, rollout: DecodeConfig) -> TeacherSource:
    fields = config.to_dict()
    one_of("teacher.reasoning", fields.get("reasoning", "keep"), ("keep", "cut"))
    decode = dataclasses.replace(rollout, **{name: fields.pop(name) for name in ("temperature", "top_k", "top_p")})
    return TeacherSource(decode=decode, **fields)


def _make_arms(config: ConfigDict, temperature: float) -> dict[str, LossConfig]:
    if not config.run_arms:
        raise ValueError(f"run_arms is empty; name at least one of {sorted(config.arms)}")
    arms = {}
    for name in config.run_arms:
        one_of("run_arms", name, config.arms)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ValueError(f"run_arms: {name!r} names a folder of the workdir; use letters, digits, '_', '-' and '.'")
        changes = {field: value for field, value in config.arms[name].items() if field != "lr"}
        arms[name] = LossConfig(temperature=temperature, **{**config.loss, **changes})
        _check_loss(name, arms[name], config)
    _check_loss_is_used(config)
    for taken in {"base", "teacher"} & arms.keys():
        raise ValueError(f'run_arms: "{taken}" is the name of an untrained model in the results; rename the arm')
    return arms


def _check_loss_is_used(config: ConfigDict) -> None:
    """Raise ValueError for a field of config.loss that was set, and that every arm of the run sets in its own way."""
    usual = LossConfig()
    for field, value in config.loss.items():
        if value != getattr(usual, field) and all(field in config.arms[name] for name in config.run_arms):
            own = ", ".join(f"arms.{name}.{field} = {config.arms[name][field]!r}" for name in config.run_arms)
            raise ValueError(
                f"loss.{field} = {value!r} has no effect: every arm of run_arms has a value of its own ({own}); set "
                "these instead"
            )


def _check_loss(arm: str, loss: LossConfig, config: ConfigDict) -> None:
    of_samples = loss.of_off_policy_steps
    names = {
        "divergence": {*DIVERGENCES, CROSS_ENTROPY}, "support": SUPPORTS, "remainder": REMAINDERS, "anchor": ANCHORS,
        "gate": GATES, "teacher": ("frozen", "ema"), "averaging": ("token_mean", "sequence_mean"),
    }  # fmt: skip
    for field, known in names.items():
        one_of(f"loss.{field}", getattr(loss, field), known)
    if loss.off_policy_divergence:
        one_of("loss.off_policy_divergence", loss.off_policy_divergence, names["divergence"])
    require(loss.alpha < 1, "loss.alpha", loss.alpha, "below 1")
    if not loss.needs_teacher and (loss.on_policy_fraction > 0 or loss.support != "full"):
        raise ValueError(
            f"loss.divergence = {loss.divergence!r} is taken on the teacher's samples; set loss.on_policy_fraction = 0 "
            f"(here {loss.on_policy_fraction}) and loss.support = full (here {loss.support})"
        )
    if not (loss.is_on_policy or of_samples.needs_teacher or loss.support == "full"):
        raise ValueError(
            f"loss.off_policy_divergence = {of_samples.divergence!r} compares no distributions, and loss.support = "
            f"{loss.support} is of these; set loss.support = full"
        )
    if config.teacher.get("reasoning") == "cut" and of_samples.needs_teacher and not loss.is_on_policy:
        raise ValueError(
            f"teacher.reasoning = 'cut', and arm {arm!r} compares with the teacher's distributions after its reasoning "
            f"({of_samples.divergence!r}); take arms with cross_entropy on the teacher's samples, such as sft, or "
            "leave it at 'keep'"
        )
    most = config.rollout.max_tokens
    require(loss.skip_first < most, "loss.skip_first", loss.skip_first, f"below rollout.max_tokens = {most}")
    steps = config.train.steps
    require(loss.anchor_every <= steps, "loss.anchor_every", loss.anchor_every, f"at most train.steps = {steps}")
    if loss.teacher == "ema" and (config.teacher.path or config.teacher_base.steps):
        raise ValueError(
            f"loss.teacher = 'ema' averages the student, and teacher.path = {config.teacher.path!r} or "
            f"teacher_base.steps = {config.teacher_base.steps} names another teacher; leave one of the two out"
        )


def _make_alarms(config: ConfigDict) -> AlarmsConfig:
    alarms = AlarmsConfig(**config)
    for name in alarms.stop:
        one_of("alarms.stop", name, ALARMS)
    return alarms


def _make_lora(config: ConfigDict) -> LoraConfig | None:
    targets = config.targets
    for target in targets:
        one_of("lora.targets", target, TARGETS)
    require(0 < len(targets) == len(set(targets)), "lora.targets", targets, "at least one matrix, each named once")
    if config.get("init") and not config.rank:
        raise ValueError(f"lora.init = {config.init!r} and lora.rank = 0: set lora.rank, alpha and targets to its own")
    return LoraConfig(config.rank, config.alpha, targets, config.get("rslora", False)) if config.rank else None


def _check_model(config: Experiment) -> None:
    one_of("model.remat", config.model.remat, POLICIES)
    one_of("model.attention", config.model.attention, ("auto", *ATTENTION))
    one_of("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16"))
    one_of("model.param_dtype", config.model.param_dtype, ("float32", "bfloat16"))
    one_of("teacher.param_dtype", config.teacher.param_dtype, ("float32", "bfloat16"))
    teacher, from_scratch = config.teacher, config.teacher_base.steps
    is_one = not (teacher.path and from_scratch)
    require(is_one, "teacher_base.steps", from_scratch, f"0 if teacher.path is set (here {teacher.path!r})")
    if teacher.offload and config.lora is not None and not config.has_teacher:
        raise ValueError(
            "teacher.offload = True, but an adapter's base, which every pass uses, is its own teacher (lora.rank = "
            f"{config.lora.rank}); leave one of the two out"
        )
    if from_scratch and config.task not in WORLDS:
        raise ValueError(
            f"teacher_base.steps = {from_scratch}: only task = {' or '.join(WORLDS)} can train one; set teacher.path"
        )
    for name, base in (("base", config.base), ("teacher_base", config.teacher_base)):
        one_of(f"{name}.family", base.family, FAMILIES)
        if base.query_heads % base.kv_heads:
            raise ValueError(
                f"{name}.query_heads = {base.query_heads} is not a multiple of {name}.kv_heads = {base.kv_heads}"
            )
    if config.model.path:
        return
    if not config.base.steps or config.task not in WORLDS:
        raise ValueError(
            f"model.path is empty; give the folder or the Hub id of a model (only task = {' or '.join(WORLDS)} can "
            f"train its own base, with base.steps > 0; here task = {config.task!r}, base.steps = {config.base.steps})"
        )
