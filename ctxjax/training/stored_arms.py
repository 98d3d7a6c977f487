"""Read what a run left: its configuration, the model that it started from, and the trained arms."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ctxjax import config as config_lib, sharding
from ctxjax.config_sections import Experiment
from ctxjax.data.tasks import TASKS
from ctxjax.host import progress, workdir as workdir_lib
from ctxjax.host.checksum import compute_fingerprint
from ctxjax.inputs import base_model
from ctxjax.inputs.run_inputs import read_first_adapter
from ctxjax.models import lora, params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.training import checkpoint
from ctxjax.types import Params


def read_experiment(workdir: Path) -> Experiment:
    """Return the run's configuration for one device: to read weights, the mesh of the training is not needed.

    Raises ValueError if the folder holds no run, or one that this version cannot read.
    """
    stored = workdir_lib.read_config(workdir)
    one_device = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1, "slices": 0}}
    try:
        return config_lib.experiment(ConfigDict(stored | one_device), device_count=1, trains=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{workdir}/config.json does not fit this version of ctxjax: {error}") from None


def find_source(config: Experiment) -> str:
    """Return the folder or Hub id of the model that the run's arms started from."""
    if config.model.path:
        return config.model.path
    task = TASKS[config.task][1](config.task_config)
    return str(base_model.find_base_folder(config.base, config.task, task))


def join_first_adapter(config: Experiment, params: Params, mesh: Mesh) -> Params:
    """Return the model that the run's arms started from: ``params``, the weights of ``find_source``, and the adapter of
    lora.init, if there is one."""
    adapter = read_first_adapter(config, find_source(config), mesh)
    return params if adapter is None else lora.join(params, adapter, config.lora)


def check_source(workdir: Path, config: Experiment, params: Params) -> None:
    """Check that ``params``, the model that the run's arms start from, is the one that the run began with.

    A Hub id can move, a folder be written anew. Raises ValueError that names the model and the remedy.
    """
    source = find_source(config)
    with progress.Bar("computing the digest of the base"):
        before, now = workdir_lib.read_model_digest(workdir), compute_fingerprint(sharding.bring_to_device(params))
    if before != now:
        raise ValueError(
            f"{source} is not the model that the run began with (digest {before} in {workdir}/run.json, now {now}); "
            "bring it back, or set model.path in the run's config.json to that model, of the Hub org/name@revision"
        )


def list_steps(workdir: Path, config: Experiment) -> dict[str, list[int]]:
    """Return the steps of the complete checkpoints of each arm, in ascending order."""
    return {name: checkpoint.saved_steps(workdir / name / "checkpoints") for name in config.arms}


def describe_steps(workdir: Path, steps: dict[str, list[int]]) -> str:
    """Say which checkpoints there are, for messages."""
    saved = "; ".join(f"{name}: step {', '.join(map(str, found))}" for name, found in steps.items() if found)
    return f"{workdir} has checkpoints of {saved}" if saved else f"{workdir} has no checkpoint yet"


def read_trained(workdir: Path, config: Experiment, model: ModelConfig, arm: str, step: int, mesh: Mesh) -> Params:
    """Read what an arm trained, onto ``mesh``: all weights, or its adapter (then ``lora.join`` makes the student)."""
    specs, kind = transformer.param_specs(model), config.model.param_dtype
    if config.lora is not None:
        specs, kind = lora.specs(model, config.lora), "float32"
    folder = workdir / arm / "checkpoints"
    return checkpoint.read_params(folder, step, params_lib.abstract(specs, mesh, kind))
