"""Check a configuration and convert it: a ConfigDict goes in, frozen dataclasses come out.

No other module below the commands sees a ConfigDict. The dataclass of a part is declared in the module that it
configures, with its types and bounds; those that configure the run itself are declared here, and so are the rules
between fields.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from ctxjax.config_fields import check_fields, one_of, require
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.prompts import PLACEMENTS, PromptConfig, parse_date
from ctxjax.data.records import KINDS, RecordsConfig
from ctxjax.data.task import FURTHER_VIEWS
from ctxjax.data.tasks import TASKS, WORLDS, check_task_name
from ctxjax.distill.anchors import ANCHORS, GATES
from ctxjax.distill.divergences import DIVERGENCES, REMAINDERS, SUPPORTS
from ctxjax.distill.losses import CROSS_ENTROPY, LossConfig
from ctxjax.distill.optim import SCHEDULES, OptimConfig
from ctxjax.models.architecture import ATTENTION
from ctxjax.models.lora import TARGETS, LoraConfig
from ctxjax.models.remat import POLICIES
from ctxjax.monitoring.alarms import ALARMS, AlarmsConfig
from ctxjax.monitoring.trackers import LoggingConfig
from ctxjax.sharding import DECODE_RULES, MeshConfig, check_divisible, fit_mesh
from ctxjax.types import bounded


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The fields outside of sections; see configs/base.py."""

    seed: int = bounded(zero=True)
    task: str
    compile_cache: str
    cpu_devices: int = bounded(zero=True, at_most=1024)
    slice: str
    run_arms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The folder or Hub id of the model, its number types, and how it is computed."""

    path: str
    dtype: str
    param_dtype: str
    remat: str
    attention: str


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """A base model to train from scratch; see configs/base.py, ``config.base``."""

    seed: int = bounded(zero=True)
    cache: str
    steps: int = bounded(zero=True)
    batch_size: int = bounded(at_most=1_000_000)
    lr: float = bounded(at_most=1.0)
    warmup_steps: int = bounded(zero=True)
    weight_decay: float = bounded(zero=True, at_most=1.0)
    width: int = bounded(at_most=65536)
    layers: int = bounded(at_most=1000)
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int = bounded(at_most=262144)
    rope_theta: float


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How responses are sampled, before the model's end tokens are known; see sampling.SamplingConfig."""

    max_tokens: int = bounded(at_most=1_000_000)
    temperature: float = bounded(zero=True, at_most=100.0)
    top_k: int = bounded(zero=True)
    top_p: float = bounded(at_most=1.0)
    weights: str


@dataclasses.dataclass(frozen=True)
class TeacherSource:
    """See configs/base.py, ``config.teacher``. ``decode``: how the samples for off-policy steps are drawn."""

    path: str
    param_dtype: str
    offload: bool
    decode: DecodeConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """See configs/base.py, ``config.train``. In an Experiment, ``retention_rows`` is the resolved number of rows."""

    steps: int
    batch_size: int = bounded(at_most=1_000_000)
    micro_batches: int
    retention_rows: int = bounded(zero=True)
    save_every: int
    keep: int
    log_every: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """See configs/base.py, ``config.eval``. ``decode`` has its temperature, top_k and top_p."""

    every: int = bounded(zero=True)
    batch_size: int = bounded(at_most=1_000_000)
    views: tuple[str, ...]
    samples: int
    bootstrap: int = bounded(at_most=1_000_000)
    select: str
    decode: DecodeConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run. ``arms``: name -> loss, in the order in which the arms run. ``lora``: None if all weights are
    trained."""

    seed: int
    task: str
    task_config: Any
    model: ModelSource
    teacher: TeacherSource
    lora: LoraConfig | None
    base: BaseConfig
    teacher_base: BaseConfig
    mesh: MeshConfig
    prompt: PromptConfig
    rollout: DecodeConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    alarms: AlarmsConfig
    logging: LoggingConfig
    arms: dict[str, LossConfig]

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is another model; otherwise the student's initial weights are the teacher."""
        return bool(self.teacher.path or self.teacher_base.steps)


_SECTIONS = {  # in the order in which they are checked: a section before those that take values from it
    "": (RunConfig,),
    "model": (ModelSource,), "lora": (LoraConfig,), "base": (BaseConfig,), "teacher_base": (BaseConfig,),
    "mesh": (MeshConfig,), "prompt": (PromptConfig,), "rollout": (DecodeConfig,),
    "teacher": (TeacherSource, DecodeConfig), "loss": (LossConfig,),
    "optim": (OptimConfig,), "train": (TrainConfig,), "eval": (EvalConfig, DecodeConfig), "alarms": (AlarmsConfig,),
    "logging": (LoggingConfig,), "records": (RecordsConfig,),
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
    check_task_name(config.task)
    task_class, _ = TASKS[config.task]
    rollout = DecodeConfig(**config.rollout)
    one_of("rollout.weights", rollout.weights, DECODE_RULES)
    require(rollout.temperature > 0, "rollout.temperature", rollout.temperature, "above 0, as training samples")
    evaluation, samples = config.eval.to_dict(), config.eval.samples
    decode = dataclasses.replace(rollout, **{name: evaluation.pop(name) for name in ("temperature", "top_k", "top_p")})
    require(samples == 1 or decode.temperature > 0, "eval.samples", samples, "1 if eval.temperature = 0")
    for view in evaluation["views"]:
        one_of("eval.views", view, FURTHER_VIEWS)
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
    one_of("prompt.overlong", prompt.overlong, ("error", "drop"))
    if "grading" in config[config.task]:
        one_of(f"{config.task}.grading", config[config.task].grading, GRADERS)
    result = Experiment(
        seed=config.seed,
        task=config.task,
        task_config=task_class(**config[config.task], **_make_records(config, task_class)),
        model=ModelSource(**config.model),
        teacher=_make_teacher(config.teacher, rollout),
        lora=_make_lora(config.lora),
        base=BaseConfig(**config.base),
        teacher_base=BaseConfig(**config.teacher_base),
        mesh=fit_mesh(config.mesh.to_dict(), device_count),
        prompt=prompt,
        rollout=rollout,
        optim=optim,
        train=train,
        eval=EvalConfig(decode=decode, **evaluation),
        alarms=_make_alarms(config.alarms),
        logging=LoggingConfig(**config.logging),
        arms=_make_arms(config, rollout.temperature),
    )
    _check_model(result)
    if trains and result.lora is None and result.model.param_dtype != "float32":
        raise ValueError(
            f"model.param_dtype = {result.model.param_dtype!r} and lora.rank = 0: these weights are trained, and their "
            "updates, often 5e-6, would round away; use model.param_dtype=float32 with model.dtype=bfloat16, which "
            "computes in bfloat16 all the same, or an adapter: lora.rank=16. teacher.param_dtype may be bfloat16"
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


def _make_records(config: ConfigDict, task_class) -> dict[str, Any]:
    """Return the task's field ``records`` from the section of that name, if the task has such a field."""
    records = RecordsConfig(**config.records)
    for kind in records.skip:
        one_of("records.skip", kind, KINDS)
    return {"records": records} if "records" in task_class.__dataclass_fields__ else {}


def _make_teacher(config: ConfigDict, rollout: DecodeConfig) -> TeacherSource:
    fields = config.to_dict()
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
        arms[name] = LossConfig(temperature=temperature, **{**config.loss, **config.arms[name]})
        _check_loss(arms[name], config)
    for taken in {"base", "teacher"} & arms.keys():
        raise ValueError(f'run_arms: "{taken}" is the name of an untrained model in the results; rename the arm')
    return arms


def _check_loss(loss: LossConfig, config: ConfigDict) -> None:
    names = {
        "divergence": {*DIVERGENCES, CROSS_ENTROPY}, "support": SUPPORTS, "remainder": REMAINDERS, "anchor": ANCHORS,
        "gate": GATES, "teacher": ("frozen", "ema"), "averaging": ("token_mean", "sequence_mean"),
    }  # fmt: skip
    for field, known in names.items():
        one_of(f"loss.{field}", getattr(loss, field), known)
    require(loss.alpha < 1, "loss.alpha", loss.alpha, "below 1")
    if not loss.needs_teacher and (loss.on_policy_fraction > 0 or loss.support != "full"):
        raise ValueError(
            f"loss.divergence = {loss.divergence!r} is taken on the teacher's samples; set loss.on_policy_fraction = 0 "
            f"(here {loss.on_policy_fraction}) and loss.support = full (here {loss.support})"
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
    return LoraConfig(config.rank, config.alpha, targets) if config.rank else None


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
