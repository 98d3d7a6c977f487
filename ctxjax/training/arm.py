"""One arm of a run: its training, step by step."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax

from ctxjax.config import Experiment
from ctxjax.data.pipeline import EncodedRows, RetentionRows, training_batches
from ctxjax.distill.anchors import loss_at
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.rollouts import Questions, RolloutSource, StepInputs, TeacherSamples
from ctxjax.distill.train_step import StepConfig, init_state, student_params, train_step
from ctxjax.evaluation.evaluator import Evaluation, Evaluator
from ctxjax.evaluation.metrics import parse_select
from ctxjax.host import preemption
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import make_sampling_config
from ctxjax.models import lora as lora_lib, params as params_lib, transformer
from ctxjax.monitoring.alarms import Alarms, StopRun
from ctxjax.monitoring.metric_writer import Writer
from ctxjax.training import nonfinite
from ctxjax.training.checkpoint import Checkpoints, best_step, read_params, saved_steps
from ctxjax.types import Batch, Frozen, Params, PrefixKV, Rollout, TrainState


class StepKind(NamedTuple):
    """What distinguishes the compiled programs of an arm: the loss, and the structure and shapes of the inputs."""

    loss: LossConfig
    structure: Any
    shapes: tuple[tuple[int, ...], ...]


class Arm:
    """One arm: the same base, seed and data order as the others, its own loss.

    ``samples`` are the responses that the teacher gives to its off-policy steps. ``record``: configuration and manifest
    of the run, which every checkpoint carries. ``scores``: the dev metric by which checkpoints are chosen
    (config.eval.select) at every step that was evaluated, higher being better.
    """

    def __init__(
        self,
        config: Experiment,
        name: str,
        loss: LossConfig,
        folder: ModelFolder,
        teacher: ModelFolder,
        rows: EncodedRows,
        retention: RetentionRows | None,
        teacher_prefix: PrefixKV | None,
        samples: dict[int, Rollout],
        mesh,
        workdir: Path,
        record: dict,
    ):
        self.config, self.name, self.folder, self.rows, self.retention = config, name, folder, rows, retention
        self.samples, self.mesh, self.workdir, self.record = samples, mesh, workdir, record
        sampling = make_sampling_config(config.rollout, folder)
        micro_batches = config.train.micro_batches
        self.step_config = StepConfig(
            folder.config, teacher.config, sampling, loss, config.optim, config.lora, micro_batches
        )
        self.frozen = Frozen(teacher.params, folder.params if config.lora else None, teacher_prefix)
        self.alarms = Alarms(config.alarms, name)
        self.scores: dict[int, float] = {}

    def train(self, dev: Evaluator, base_on_dev: Evaluation, started: float, seconds: dict[str, float]) -> Params:
        """Runs the arm's steps, from its latest checkpoint where there is one; returns the trained parameters.

        Raises StopRun where an alarm ends the run, and Preempted where SIGTERM does; checkpoints stay.
        """
        config, train = self.config, self.config.train
        state = init_state(self.folder.params, self.step_config, jax.random.key(config.seed))
        checkpoints = Checkpoints(self.workdir / "checkpoints", train.keep, self.scores)
        first, found = 0, checkpoints.restore(state)
        if found is not None:
            state, record = found
            first = record["data_position"]
            print(f"{self.name}: continues from the checkpoint of step {first}", flush=True)
        writer = Writer(self.workdir, self.name, train.steps, first, train.log_every, self.alarms)
        self.scores |= {row["step"]: self._score(row) for row in writer.kept if row["step"] and _is_dev(row)}
        if not first:
            writer.write(0, _prefixed(base_on_dev))
        source, programs = None, {}
        if first < train.steps:
            source = self._source(first)
            clock = time.monotonic()
            programs = self._programs(state, source, range(first, train.steps))
            seconds[f"{self.name} compile"] = time.monotonic() - clock
        with preemption.training():
            try:
                # A run that was preempted in an evaluation saved without it.
                evaluated = any(row["step"] == first and _is_dev(row) for row in writer.kept)
                if self._is_evaluated(first) and not evaluated and not self._evaluate(first, state, dev, writer):
                    raise preemption.Preempted
                writer.pause()
                for step in range(first, train.steps):
                    inputs = source.next(state, step)
                    with jax.transfer_guard("disallow"):
                        program = programs[self._kind(step, inputs)]
                        state, metrics = program(state, self.frozen, **inputs._asdict())
                    taken = step + 1  # steps taken so far: the number that people read
                    writer.step(taken, metrics)
                    if self.alarms.is_close_to_stopping:
                        writer.flush()
                    if "first step done" not in seconds:
                        jax.block_until_ready(metrics)
                        seconds["first step done"] = time.monotonic() - started
                    if self._is_evaluated(taken):
                        self._evaluate(taken, state, dev, writer)
                    preempted = preemption.reached(taken)
                    is_due = taken in (train.steps, best_step(self.scores)) or taken % train.save_every == 0
                    if is_due or preempted:
                        writer.sync()
                        checkpoints.save(state, taken, self.record | {"data_position": taken})
                    if preempted:
                        raise preemption.Preempted
                writer.close()
            except StopRun as stop:
                if stop.alarm != "not_finite":
                    raise
                tokenizer = self.folder.tokenizer
                path = nonfinite.save_rows(
                    self.workdir, state, self.frozen, inputs, self.step_config, stop.step - 1, tokenizer
                )
                raise StopRun(f"{stop}. The rows of this step are in {path}", stop.alarm, stop.step) from None
            finally:
                writer.end_bar()
                checkpoints.close()
        return self._student(state)

    def _source(self, first: int) -> RolloutSource:
        """Where this arm's responses come from, from step ``first`` on."""
        return TeacherSamples(Questions(self._batches(first), self.mesh), self.samples, self.mesh)

    def _kind(self, step: int, inputs: StepInputs) -> StepKind:
        leaves, structure = jax.tree.flatten(inputs)
        return StepKind(loss_at(self.step_config.loss, step), structure, tuple(leaf.shape for leaf in leaves))

    def _programs(self, state: TrainState, source: RolloutSource, steps: range) -> dict[StepKind, Any]:
        """Compile every kind of step among ``steps``, before the first one: SIGTERM can then end the run at once."""
        programs = {}
        for step in steps:
            for inputs in source.examples(step):
                kind = self._kind(step, inputs)
                if kind not in programs:
                    config = dataclasses.replace(self.step_config, loss=kind.loss)
                    lowered = train_step.lower(state, self.frozen, config=config, **inputs._asdict())
                    programs[kind] = lowered.compile()
        return programs

    @property
    def selected_step(self) -> int | None:
        """The step of the checkpoint that is best on dev; None where no checkpoint was evaluated there."""
        saved = saved_steps(self.workdir / "checkpoints")
        return best_step({step: self.scores[step] for step in saved if step in self.scores})

    def params_at(self, step: int) -> Params:
        """The student of an earlier checkpoint."""
        mesh, model, lora = self.mesh, self.folder.config, self.config.lora
        specs = transformer.param_specs(model) if lora is None else lora_lib.specs(model, lora)
        kind = self.config.model.param_dtype if lora is None else "float32"
        trained = read_params(self.workdir / "checkpoints", step, params_lib.abstract(specs, mesh, kind))
        return student_params(trained, self.frozen, self.step_config)

    def _batches(self, first: int) -> Iterator[Batch]:
        return training_batches(
            self.rows,
            self.retention,
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            retention_rows=self.config.train.retention_rows,
            pad_id=self.folder.pad_id,
            first_step=first,
        )

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and step > 0 and step % every == 0

    def _evaluate(self, step: int, state: TrainState, dev: Evaluator, writer: Writer) -> bool:
        """Adds the step's row of dev metrics; False where SIGTERM came while they were made."""
        writer.flush()
        try:
            row = _prefixed(dev(self._student(state)))
        except preemption.Preempted:
            return False
        writer.write(step, row)
        self.scores[step] = self._score(row)
        writer.pause()
        return True

    def _score(self, row: dict[str, float]) -> float:
        key, sign = parse_select(self.config.eval.select)
        return sign * row.get(f"dev/{key}", math.nan)

    def _student(self, state: TrainState) -> Params:
        return student_params(state.params, self.frozen, self.step_config)


def _prefixed(evaluation: Evaluation) -> dict[str, float]:
    return {f"dev/{name}": value for name, value in evaluation.metrics.items() if isinstance(value, float)}


def _is_dev(row: dict[str, float]) -> bool:
    return any(name.startswith("dev/") for name in row)
