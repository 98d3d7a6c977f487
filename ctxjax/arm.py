"""One arm of a run: its training, step by step."""

from __future__ import annotations

from pathlib import Path
import time

import jax

from ctxjax import offenders, sharding
from ctxjax.alarms import Alarms, StopRun
from ctxjax.checkpoint import Checkpoints
from ctxjax.config import Experiment
from ctxjax.data.pipeline import EncodedRows, RetentionRows, training_batches
from ctxjax.evaluator import Evaluation, Evaluator
from ctxjax.folder import ModelFolder
from ctxjax.inputs import sampling_config
from ctxjax.losses import LossConfig
from ctxjax.metrics import Writer
from ctxjax.train_step import StepConfig, init_state, student_params, train_step
from ctxjax.types import Frozen, Params, PrefixKV, Rollout, TrainState


class Arm:
    """One arm: the same base, seed and data order as the others, its own loss. ``samples`` are the responses that the
    teacher gives to its off-policy steps."""

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
    ):
        self.config, self.name, self.folder, self.rows, self.retention = config, name, folder, rows, retention
        self.samples, self.mesh, self.workdir = samples, mesh, workdir
        sampling = sampling_config(config.rollout, folder)
        micro_batches = config.train.micro_batches
        self.step_config = StepConfig(
            folder.config, teacher.config, sampling, loss, config.optim, config.lora, micro_batches
        )
        self.frozen = Frozen(teacher.params, folder.params if config.lora else None, teacher_prefix)
        self.alarms = Alarms(config.alarms, name)

    def train(self, dev: Evaluator, base_on_dev: Evaluation, started: float, seconds: dict[str, float]) -> Params:
        """Runs the arm's steps, from its latest checkpoint where there is one; returns the trained parameters.

        Raises StopRun where an alarm ends the run; checkpoints stay.
        """
        config, train = self.config, self.config.train
        state = init_state(self.folder.params, self.step_config, jax.random.key(config.seed))
        checkpoints = Checkpoints(self.workdir / "checkpoints", train.keep, train.save_every)
        first = checkpoints.latest_step or 0
        if first:
            state = checkpoints.restore(state)
            print(f"{self.name}: continues from the checkpoint of step {first}", flush=True)
        writer = Writer(self.workdir, self.name, train.steps, first, train.log_every, self.alarms)
        if not first:
            writer.write(0, _prefixed(base_on_dev))
        batches = training_batches(
            self.rows,
            self.retention,
            seed=config.seed,
            batch_size=train.batch_size,
            retention_rows=train.retention_rows,
            pad_id=self.folder.pad_id,
            first_step=first,
        )
        programs = {}  # by whether they are given the teacher's samples
        try:
            for step in range(first + 1, train.steps + 1):
                batch, samples = sharding.put_batch((next(batches), self.samples.get(step)), self.mesh)
                if (is_given := samples is not None) not in programs:
                    clock, name = time.monotonic(), f"{self.name} compile"
                    lowered = train_step.lower(state, self.frozen, batch, config=self.step_config, samples=samples)
                    programs[is_given] = lowered.compile()
                    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - clock
                    writer.pause()
                with jax.transfer_guard("disallow"):
                    state, metrics = programs[is_given](state, self.frozen, batch, samples=samples)
                writer.step(step, metrics)
                if self.alarms.is_close_to_stopping:
                    writer.flush()
                if "first step done" not in seconds:
                    jax.block_until_ready(metrics)
                    seconds["first step done"] = time.monotonic() - started
                if config.eval.every and step % config.eval.every == 0:
                    writer.flush()
                    writer.write(step, _prefixed(dev(self._student(state))))
                    writer.pause()
                checkpoints.save(state, step, last=step == train.steps)
            writer.close()
        except StopRun as stop:
            if stop.alarm != "not_finite":
                raise
            tokenizer = self.folder.tokenizer
            inputs = (state, self.frozen, batch, samples)
            path = offenders.save(self.workdir, *inputs, self.step_config, stop.step, tokenizer)
            raise StopRun(f"{stop}. The rows of this step are in {path}", stop.alarm, stop.step) from None
        finally:
            checkpoints.close()
        return self._student(state)

    def _student(self, state: TrainState) -> Params:
        return student_params(state.params, self.frozen, self.step_config)


def _prefixed(evaluation: Evaluation) -> dict[str, float]:
    return {f"dev/{name}": value for name, value in evaluation.metrics.items() if isinstance(value, float)}
