"""Who answers: the model of a folder, or one arm of a run at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ctxjax import sharding
from ctxjax.config_sections import Experiment
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.tasks import TASKS
from ctxjax.host import workdir as workdir_lib
from ctxjax.inputs.model_folder import ModelFolder, open_folder
from ctxjax.models import lora
from ctxjax.training import stored_arms
from ctxjax.types import Params

BASE = "base"  # the model that a run's arms started from; its name in results.json


class Run(NamedTuple):
    """``steps``: arm -> the step of its latest checkpoint, of the arms that have one."""

    workdir: Path
    config: Experiment
    steps: dict[str, int]


@dataclasses.dataclass
class Speaker:
    """A model that answers. ``folder``: architecture, tokenizer, stop ids, and the weights of the base. ``params``: the
    weights of ``arm``. ``weights``: as in sampling.SamplingConfig. ``run``: None for a model's folder."""

    folder: ModelFolder
    mesh: Mesh
    prompt: PromptConfig
    weights: str
    params: Params
    run: Run | None = None
    arm: str = BASE

    @property
    def arms(self) -> list[str]:
        """The names that ``switch`` takes."""
        return [BASE, *(self.run.steps if self.run else ())]

    def switch(self, arm: str) -> None:
        """Let another arm answer. Raises ValueError that names the arms if there is none of this name."""
        if arm not in self.arms:
            others = "" if self.run else "; --workdir=RUN in place of --model has the arms of a run"
            raise ValueError(f"there is no arm {arm!r}; choose from {', '.join(self.arms)}{others}")
        self.arm, self.params = BASE, self.folder.params  # frees those of the arm before
        if arm != BASE:
            workdir, config, steps = self.run
            with jax.set_mesh(self.mesh):
                trained = stored_arms.read_trained(workdir, config, self.folder.config, arm, steps[arm], self.mesh)
                joined = trained if config.lora is None else lora.join(self.folder.params, trained, config.lora)
            self.arm, self.params = arm, joined


def open_model(path: str, placement: str | None = None) -> Speaker:
    """Open a model's folder or Hub id. Raises FileNotFoundError or ValueError with the remedy."""
    mesh = sharding.make_mesh(fsdp=jax.device_count())
    folder = open_folder(path, mesh, "auto")
    return Speaker(folder, mesh, PromptConfig(placement=placement or "system"), "gathered", folder.params)


def open_run(workdir: Path, placement: str | None = None) -> Speaker:
    """Open a run: its first arm that has a checkpoint answers, with the run's prompts and end tokens.

    Raises FileNotFoundError or ValueError with the remedy.
    """
    config = stored_arms.read_experiment(workdir)
    stop_ids = tuple(workdir_lib.read_stop_ids(workdir))
    steps = {arm: found[-1] for arm, found in stored_arms.list_steps(workdir, config).items() if found}
    mesh, model = sharding.make_mesh(fsdp=jax.device_count()), config.model
    folder = open_folder(
        stored_arms.find_source(config), mesh, model.dtype, model.param_dtype, attention=model.attention
    )
    with jax.set_mesh(mesh):
        base = stored_arms.join_first_adapter(config, folder.params, mesh)
        stored_arms.check_source(workdir, config, base)
    folder = dataclasses.replace(folder, params=base, stop_ids=stop_ids)
    prompt = dataclasses.replace(config.prompt, placement=placement or config.prompt.placement)
    run = Run(workdir, config, steps)
    speaker = Speaker(folder, mesh, prompt, config.rollout.weights, base, run)
    speaker.switch(next(iter(steps), BASE))
    return speaker


def read_task(run: Run) -> tuple[str, str]:
    """Return (the context that the run internalized, an example of its questions).

    Raises ValueError if its questions do not share one context.
    """
    rows = TASKS[run.config.task][1](run.config.task_config).rows("test")
    contexts = {row.context for row in rows}
    if len(contexts) != 1 or None in contexts:
        found = f"the questions of {run.workdir} have {len(contexts)} contexts"
        raise ValueError(f"{found}; choose one with --context=FILE")
    return contexts.pop(), rows[0].question
