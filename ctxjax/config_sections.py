"""The sections of a configuration that configure the run itself, as frozen dataclasses, and the whole run.

What configures a part (loss, optimiser, prompts, ...) is declared in the module of that part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ctxjax.data.prompts import PromptConfig
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.models.lora import LoraConfig
from ctxjax.monitoring.alarms import AlarmsConfig
from ctxjax.monitoring.trackers import LoggingConfig
from ctxjax.sharding import MeshConfig
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


FAMILIES = ("llama", "qwen2", "qwen3")  # the families of models/hf that a base can have


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
    family: str = "llama"


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
    reasoning: str = "keep"


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
    meters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """See configs/base.py, ``config.extract``."""

    seed: int = bounded(zero=True)
    candidates: int = bounded(at_most=10_000)
    traces: int = bounded(at_most=10_000)
    limit: int
    max_tokens: int = bounded(at_most=1_000_000)
    solution: str
    request: str
    budget: int
    level: float = bounded(at_most=1.0)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run. ``arms``: name -> loss, in the order in which the arms run. ``rates``: the peak learning rates of
    the arms that have one of their own. ``lora``: None if all weights are trained. ``lora_init``: AdapterSource.init.
    """

    seed: int
    task: str
    task_config: Any
    model: ModelSource
    teacher: TeacherSource
    lora: LoraConfig | None
    lora_init: str
    base: BaseConfig
    teacher_base: BaseConfig
    mesh: MeshConfig
    prompt: PromptConfig
    rollout: DecodeConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    extract: ExtractConfig
    alarms: AlarmsConfig
    logging: LoggingConfig
    arms: dict[str, LossConfig]
    rates: dict[str, float]

    def optim_of(self, arm: str) -> OptimConfig:
        """Return the optimiser of an arm."""
        return dataclasses.replace(self.optim, lr=self.rates.get(arm, self.optim.lr))

    @property
    def has_retention(self) -> bool:
        """Whether an arm also trains on rows under other contexts."""
        return any(loss.mu > 0 for loss in self.arms.values())

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is another model; otherwise the student's initial weights are the teacher."""
        return bool(self.teacher.path or self.teacher_base.steps)
