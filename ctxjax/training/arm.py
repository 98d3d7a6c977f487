"""One arm of a run: its training, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import math
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ctxjax.config_sections import Experiment
from ctxjax.data.pipeline import Drawn, draw_steps
from ctxjax.data.task import GameTask
from ctxjax.distill.anchors import loss_at
from ctxjax.distill.flops import count_step_flops
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.rollouts import Questions, RolloutSource, StepInputs, TeacherSamples
from ctxjax.distill.train_step import StepConfig, init_state, student_params, train_step
from ctxjax.evaluation.evaluator import Evaluation, Evaluator
from ctxjax.evaluation.select import parse_select
from ctxjax.host import compile_times, memory, preemption
from ctxjax.host.workdir import find_first_start
from ctxjax.inputs.data_record import ROWS_FILE
from ctxjax.inputs.run_inputs import Inputs, make_sampling_config
from ctxjax.inputs.teacher_samples import steps_with_samples
from ctxjax.models import lora as lora_lib, params as params_lib, transformer
from ctxjax.monitoring.alarms import Alarms, StopRun
from ctxjax.monitoring.metric_writer import Writer
from ctxjax.monitoring.step_rows import StepRows
from ctxjax.monitoring.trackers import Trackers
from ctxjax.report.formatting import shorten
from ctxjax.training import nonfinite
from ctxjax.training.checkpoint import Checkpoints, best_step, read_params, saved_steps
from ctxjax.training.fed_rows import FedRows
from ctxjax.training.game_episodes import GameEpisodes
from ctxjax.types import Batch, Frozen, Params, PrefixKV, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all arms of a run share.

    ``teacher_prefix``: the teacher's keys and values of the shared context prefix; None if there is none.
    ``teacher_samples``: the teacher's responses, on the host, by step; they cover the off-policy steps of all arms.
    ``record``: configuration and manifest of the run, which every checkpoint carries. ``fed_rows``: describes what the
    steps are given; None in a process that writes no files.
    """

    config: Experiment
    inputs: Inputs
    teacher_prefix: PrefixKV | None
    teacher_samples: dict[int, Rollout]
    mesh: Mesh
    record: dict
    fed_rows: FedRows | None


class StepKind(NamedTuple):
    """What distinguishes the compiled programs of an arm: the loss, and the structure and shapes of the inputs."""

    loss: LossConfig
    structure: Any
    shapes: tuple[tuple[int, ...], ...]


def make_step_config(config: Experiment, arm: str, loss: LossConfig, inputs: Inputs) -> StepConfig:
    """Return what is static about the steps of an arm, with the objective ``loss``."""
    student, teacher = inputs.student, inputs.teacher
    sampling, optim = make_sampling_config(config.rollout, student), config.optim_of(arm)
    return StepConfig(student.config, teacher.config, sampling, loss, optim, config.lora, config.train.micro_batches)


class Arm:
    """One arm: the same base, seed and data order as the other arms, its own loss. ``folder`` is the arm's folder in
    the workdir."""

    def __init__(self, shared: Shared, name: str, folder: Path):
        config, student, teacher = shared.config, shared.inputs.student, shared.inputs.teacher
        self._shared, self._config, self._student, self._name, self._folder = shared, config, student, name, folder
        self._step_config = make_step_config(config, name, config.arms[name], shared.inputs)
        self._off_policy = frozenset(steps_with_samples(config, name))
        self._frozen = Frozen(teacher.params, student.params if config.lora else None, shared.teacher_prefix)
        # taken -> the dev metric that chooses checkpoints (config.eval.select); higher is better.
        self._scores: dict[int, float] = {}
        self._acc_xc: dict[int, float] = {}  # taken -> Acc_xc on dev
        self.alarms = Alarms(config.alarms, name)

    def train(self, dev: Evaluator, base_on_dev: Evaluation, started: float, seconds: dict[str, float]) -> Params:
        """Run the arm's steps, from its latest checkpoint if there is one. Return the trained student's parameters.

        ``seconds`` gets the time of compiling and, once per run, the time from ``started`` to the end of the first
        step. Raises StopRun if an alarm ends the run, and Preempted if SIGTERM does; checkpoints are kept.
        """
        train = self._config.train
        checkpoints = Checkpoints(self._folder / "checkpoints", train.keep, self._scores)
        state, first = self._restore_or_init(checkpoints)
        record = self._shared.record
        first_start = find_first_start(record["manifest"])
        trackers = Trackers(self._config.logging, self._folder, record["config"], first_start)
        writer = Writer(self._folder, self._name, train.steps, first, train.log_every, self.alarms, trackers)
        dev_rows = {row["step"]: row for row in writer.kept if _has_dev_metrics(row)}
        for taken, row in dev_rows.items():
            self._note(taken, row)
        if not first:
            writer.write(0, _make_dev_row(base_on_dev))
        source, programs = None, {}
        fed = StepRows(self._folder / ROWS_FILE, first)
        if first < train.steps:
            source = self._make_source(first, fed)
            clock = time.monotonic()
            programs = self._compile_programs(state, source, range(first, train.steps))
            seconds[f"{self._name} compile"] = time.monotonic() - clock
        with preemption.training():
            try:
                # A run that was preempted during an evaluation saved without it.
                is_missing = self._is_evaluation_due(first) and first not in dev_rows
                if is_missing and not self._evaluate(first, state, dev, writer):
                    raise preemption.Preempted
                writer.begin()
                for step in range(first, train.steps):
                    try:
                        inputs = source.next(state, step)
                    except preemption.Preempted:  # a game's episodes are given up; no step has used ``state``
                        if step > first:
                            self._save(state, step, checkpoints, writer, fed)
                        raise
                    with jax.transfer_guard("disallow"):
                        program = programs[self._find_kind(step, inputs)]
                        state, metrics = program(state, self._frozen, **inputs._asdict())
                    taken = step + 1
                    writer.step(taken, metrics)
                    if self.alarms.is_close_to_stopping:
                        writer.flush()
                    if "first step done" not in seconds:
                        jax.block_until_ready(metrics)
                        seconds["first step done"] = time.monotonic() - started
                    if self._is_evaluation_due(taken):
                        self._evaluate(taken, state, dev, writer)
                    preempted = preemption.is_due()
                    if preempted or self._is_save_due(taken):
                        self._save(state, taken, checkpoints, writer, fed)
                    if preempted:
                        raise preemption.Preempted
                writer.close()
                fed.close()
                if isinstance(source, GameEpisodes):
                    print(f"{self._name}: {source.player.clock}", flush=True)
            except StopRun as stop:
                if stop.alarm != "not_finite":
                    raise
                last = stop.step - 1
                config = dataclasses.replace(self._step_config, loss=self._find_kind(last, inputs).loss)
                tokenizer = self._student.tokenizer
                path = nonfinite.save_rows(self._folder, state, self._frozen, inputs, config, last, tokenizer)
                raise StopRun(f"{stop}. The rows of this step are in {path}", stop.alarm, stop.step) from None
            finally:
                writer.end_bar()
                trackers.close()
                checkpoints.close()
        return self._join_student(state)

    @property
    def accuracies_with_context(self) -> tuple[float, ...]:
        """Acc_xc at the arm's evaluations on dev, by step."""
        return tuple(self._acc_xc[taken] for taken in sorted(self._acc_xc))

    @property
    def selected_step(self) -> int | None:
        """``taken`` of the saved checkpoint that is best on dev; None if no saved checkpoint was evaluated."""
        saved = saved_steps(self._folder / "checkpoints")
        return best_step({taken: self._scores[taken] for taken in saved if taken in self._scores})

    def read_student(self, taken: int) -> Params:
        """Return the student's parameters after ``taken`` steps, from the checkpoint."""
        model, lora = self._student.config, self._config.lora
        specs = transformer.param_specs(model) if lora is None else lora_lib.specs(model, lora)
        dtype = self._config.model.param_dtype if lora is None else "float32"
        like = params_lib.abstract(specs, self._shared.mesh, dtype)
        trained = read_params(self._folder / "checkpoints", taken, like)
        return student_params(trained, self._frozen, self._step_config)

    def _restore_or_init(self, checkpoints: Checkpoints) -> tuple[TrainState, int]:
        """Return the state and the first step to run: from the latest checkpoint, or new and 0 if there is none."""
        key = jax.random.key(self._config.seed)
        state = init_state(self._student.params, self._step_config, key, self._student.adapter)
        found = checkpoints.restore(state)
        if found is None:
            return state, 0
        state, record = found
        first = record["data_position"]
        print(f"{self._name}: continues from the checkpoint of step {first}", flush=True)
        return state, first

    def _make_source(self, first: int, fed: StepRows) -> RolloutSource:
        """Return the source of this arm's responses, from step ``first`` on. ``fed`` gets what it gives to each."""
        mesh, samples = self._shared.mesh, self._shared.teacher_samples

        def note(number: int, drawn: Drawn) -> None:
            if self._shared.fed_rows is not None:
                fed.append(self._shared.fed_rows.describe(number, drawn))

        if isinstance(self._shared.inputs.task, GameTask):
            retains = self._step_config.loss.mu > 0
            return GameEpisodes.of_run(self._config, self._shared.inputs, retains, self._join_student, mesh, note)
        own = {step: samples[step] for step in self._off_policy}
        return TeacherSamples(Questions(self._make_batches(first, note), mesh), own, mesh)

    def _make_batches(self, first: int, note: Callable[[int, Drawn], None]) -> Iterator[Batch]:
        inputs, train = self._shared.inputs, self._config.train
        steps = draw_steps(
            inputs.rows,
            inputs.retention if self._step_config.loss.mu > 0 else None,
            seed=self._config.seed,
            batch_size=train.batch_size,
            retention_rows=train.retention_rows,
            pad_id=self._student.pad_id,
            first_step=first,
        )
        for number, drawn in enumerate(steps, first + 1):
            note(number, drawn)
            yield drawn.batch

    def _compile_programs(self, state: TrainState, source: RolloutSource, steps: range) -> dict[StepKind, Any]:
        """Compile every kind of step among ``steps`` before the first one runs: once training has begun, no
        compilation delays the end on SIGTERM. Print what the steps cost at most."""
        programs, flops, costs, held = {}, {}, [], 0
        for step in steps:
            kinds = []
            for inputs in source.examples(step):
                kinds.append(kind := self._find_kind(step, inputs))
                if kind not in programs:
                    config = dataclasses.replace(self._step_config, loss=kind.loss)
                    with compile_times.show(f"compiling a training step of {self._name}", (config, kind)):
                        traced = train_step.trace(state, self._frozen, config=config, **inputs._asdict())
                        flops[kind] = count_step_flops(traced.jaxpr.jaxpr, config)
                        programs[kind] = traced.lower().compile()
                    held = max(held, _count_held_bytes(programs[kind].memory_analysis()))
            costs.append(max(flops[kind] for kind in kinds))
        responses = sum(len(prompts.tokens_BxP) for prompts in (inputs.batch.bare, inputs.batch.other) if prompts)
        tokens = responses * self._step_config.sampling.max_tokens
        each = f"{tokens:,} response tokens and {shorten(max(costs))}FLOPs"
        every = f"{tokens * len(steps):,} response tokens and {shorten(sum(costs))}FLOPs"
        print(f"{self._name}: {len(steps)} steps of up to {each}; in all up to {every}", flush=True)
        held *= len(jax.local_devices())
        print(f"{self._name}: a step holds {shorten(held)}B of this machine's memory", flush=True)
        memory.warn_if_too_large(held, f"the steps of {self._name}")
        return programs

    def _find_kind(self, step: int, inputs: StepInputs) -> StepKind:
        leaves, structure = jax.tree.flatten(inputs)
        loss = loss_at(self._step_config.loss, step, step in self._off_policy)
        return StepKind(loss, structure, tuple(leaf.shape for leaf in leaves))

    def _is_evaluation_due(self, taken: int) -> bool:
        every = self._config.eval.every
        return every > 0 and taken > 0 and taken % every == 0

    def _is_save_due(self, taken: int) -> bool:
        train = self._config.train
        return taken in (train.steps, best_step(self._scores)) or taken % train.save_every == 0

    def _save(self, state: TrainState, taken: int, checkpoints: Checkpoints, writer: Writer, fed: StepRows) -> None:
        """Save a checkpoint, and before it the rows of the steps that it contains."""
        writer.sync()
        fed.sync()
        checkpoints.save(state, taken, self._shared.record | {"data_position": taken})

    def _evaluate(self, taken: int, state: TrainState, dev: Evaluator, writer: Writer) -> bool:
        """Evaluate on dev and write the row of metrics. Return False, without a row, if SIGTERM came during it."""
        writer.flush()
        try:
            row = _make_dev_row(dev(self._join_student(state), self._name))
        except preemption.Preempted:
            return False
        writer.write(taken, row)
        self._note(taken, row)
        writer.pause()
        return True

    def _note(self, taken: int, row: dict[str, float]) -> None:
        """Take an evaluation on dev into account; that after 0 steps is the base's."""
        if not taken:
            return
        key, sign = parse_select(self._config.eval.select)
        self._scores[taken] = sign * row.get(f"dev/{key}", math.nan)
        if "dev/acc_xc" in row:
            self._acc_xc[taken] = row["dev/acc_xc"]

    def _join_student(self, state: TrainState) -> Params:
        return student_params(state.params, self._frozen, self._step_config)


def _count_held_bytes(program) -> int:
    """Return the bytes of a device that a program holds while it runs. ``program``: of ``Compiled.memory_analysis``."""
    written = max(program.output_size_in_bytes - program.alias_size_in_bytes, 0)
    return program.argument_size_in_bytes + program.temp_size_in_bytes + written


def _make_dev_row(evaluation: Evaluation) -> dict[str, float]:
    return {f"dev/{name}": value for name, value in evaluation.metrics.items() if isinstance(value, float)}


def _has_dev_metrics(row: dict[str, float]) -> bool:
    return any(name.startswith("dev/") for name in row)
