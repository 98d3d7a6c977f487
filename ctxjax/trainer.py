"""A run, from top to bottom: base, arms, evaluation, table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
import resource
import time
from typing import NamedTuple

import jax
import numpy as np

from ctxjax import optim, pretrain, sharding, workdir as workdir_lib
from ctxjax.checkpoint import Checkpoints
from ctxjax.config import DecodeConfig, Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.pipeline import EncodedRows, RetentionRows, encode_rows, training_batches
from ctxjax.data.task import Task
from ctxjax.data.tasks import TASKS
from ctxjax.evaluation import metrics as metrics_lib
from ctxjax.evaluator import Evaluation, Evaluator
from ctxjax.folder import ModelFolder, open_folder
from ctxjax.hub import local_folder
from ctxjax.losses import LossConfig
from ctxjax.metrics import Writer
from ctxjax.models import lora as lora_lib, params as params_lib, transformer
from ctxjax.report import results_table, write_report
from ctxjax.sampling import SamplingConfig
from ctxjax.train_step import StepConfig, init_state, student_params, train_step
from ctxjax.types import Frozen, Params, PrefixKV, TrainState


def run(config: Experiment, workdir: Path, facts: dict) -> dict[str, dict]:
    """Trains and evaluates every arm and writes results.json, report.html and a folder for each arm.

    ``facts`` (configuration, command, versions) go into run.json. Returns the results by arm.
    """
    started = time.monotonic()
    seconds: dict[str, float] = {}
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        task, folder, teacher, train_rows, retention = open_inputs(config, mesh, seconds)
        print(_sizes(config, folder, teacher, mesh), flush=True)
        teacher_prefix = _teacher_prefix(teacher, train_rows)
        dev, test = (_evaluator(config, task, split, folder, teacher, mesh) for split in ("dev", "test"))
        print(
            f"{len(train_rows.rows)} training questions; over-long and dropped: train {train_rows.dropped}, "
            f"dev {dev.dropped}, test {test.dropped}",
            flush=True,
        )
        workdir_lib.claim(workdir, facts["config"])
        clock = time.monotonic()
        base = test(folder.params)
        base_on_dev = dev(folder.params)
        seconds["evaluate base"] = time.monotonic() - clock
        _save_items(workdir / "base", base)
        finished = {"base": base}
        if teacher is not folder:
            clock = time.monotonic()
            finished["teacher"] = _evaluator(config, task, "test", teacher, teacher, mesh)(teacher.params)
            _save_items(workdir / "teacher", finished["teacher"])
            seconds["evaluate teacher"] = time.monotonic() - clock
        for name, loss in config.arms.items():
            clock = time.monotonic()
            arm = _Arm(
                config,
                name,
                loss,
                folder,
                teacher,
                train_rows,
                retention if loss.mu > 0 else None,
                teacher_prefix,
                mesh,
                workdir / name,
            )
            params = arm.train(dev, base_on_dev, started, seconds)
            finished[name] = test(params)
            _save_items(workdir / name, finished[name])
            seconds[name] = time.monotonic() - clock
    results = _results(finished, config)
    seconds["total"] = time.monotonic() - started
    workdir_lib.write_json(
        workdir / "run.json", facts | {"seconds": {name: round(value, 2) for name, value in seconds.items()}}
    )
    workdir_lib.write_json(workdir / "results.json", results)
    page = write_report(workdir)
    print(f"\n{results_table(results)}\n")
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    print(f"peak memory of the host process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"report: {page}")
    return results


class Inputs(NamedTuple):
    """What training reads. ``teacher`` is ``student`` itself where it has no folder of its own; ``retention`` has the
    rows under other contexts, where an arm wants them."""

    task: Task
    student: ModelFolder
    teacher: ModelFolder
    rows: EncodedRows
    retention: RetentionRows | None


def open_inputs(config: Experiment, mesh, seconds: dict[str, float]) -> Inputs:
    """Opens a run's task and models, and encodes the training rows; ``seconds`` takes the times."""
    task = TASKS[config.task][1](config.task_config)
    if config.teacher.path:
        local_folder(config.teacher.path)  # missing: said now, and not when the student is loaded or even trained
    folder, teacher = with_teacher(config, _open_model(config, task, mesh, seconds), mesh, seconds)
    if prompts_lib.ignores_thinking(folder.tokenizer, config.prompt):
        print(f"warning: prompt.thinking = {config.prompt.thinking} changes nothing in this model's chat template")
    rows = encode_rows(folder.tokenizer, task.rows("train"), config.prompt)
    retention = None
    if any(loss.mu > 0 for loss in config.arms.values()):
        retention = RetentionRows.of(folder.tokenizer, task, rows, config.prompt)
    return Inputs(task, folder, teacher, rows, retention)


def with_teacher(
    config: Experiment, student: ModelFolder, mesh, seconds: dict[str, float]
) -> tuple[ModelFolder, ModelFolder]:
    """(student, teacher), which are one and the same where the teacher has no folder of its own.

    Both read the student's tokens and stop at the ends of either: a base student comes to end as its teacher does.
    """
    if not config.teacher.path:
        return student, student
    clock = time.monotonic()
    loaded = open_folder(config.teacher.path, mesh, config.model.dtype, config.teacher.param_dtype, student=student)
    seconds["load teacher"] = time.monotonic() - clock
    print(f"teacher: {config.teacher.path}", flush=True)
    student = dataclasses.replace(student, stop_ids=tuple(sorted({*student.stop_ids, *loaded.stop_ids})))
    return student, dataclasses.replace(student, config=loaded.config, params=loaded.params)


def _open_model(config: Experiment, task: Task, mesh, seconds: dict[str, float]) -> ModelFolder:
    clock = time.monotonic()
    path = config.model.path
    if not path:
        path = pretrain.ensure_base(config.base, config.task, task, mesh)
        seconds["base from scratch"] = time.monotonic() - clock
        clock = time.monotonic()
    folder = open_folder(path, mesh, config.model.dtype, config.model.param_dtype, config.model.remat)
    seconds["load"] = time.monotonic() - clock
    print(f"model: {path}", flush=True)
    return folder


def _teacher_prefix(teacher: ModelFolder, rows: EncodedRows) -> PrefixKV | None:
    """What the teacher makes of the context that all rows start with: its weights are frozen, so once for all arms."""
    prefix_C = rows.prefixes["context"]
    if not prefix_C:
        return None
    print(f"{len(prefix_C)} tokens of every prompt with context are the same and are read once a pass", flush=True)
    compute = jax.jit(transformer.prefix_kv, static_argnames="config")
    return compute(teacher.params, config=teacher.config, prefix_C=np.asarray(prefix_C, np.int32))


def _sizes(config: Experiment, student: ModelFolder, teacher: ModelFolder, mesh) -> str:
    """What the weights and the optimiser hold, in scalars and in bytes of the whole mesh."""
    trained = student.params
    if config.lora is not None:
        trained = params_lib.abstract(lora_lib.specs(student.config, config.lora), mesh)
    optimiser = jax.eval_shape(optim.optimizer(config.optim).init, trained)

    def count(tree) -> str:
        return _short(sum(leaf.size for leaf in jax.tree.leaves(tree))).strip()

    def size(tree) -> str:
        return _short(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))) + "B"

    if config.lora is None:
        frozen = {"frozen in the teacher": teacher}
    elif teacher is student:
        frozen = {"frozen, student's base and teacher in one": teacher}
    else:
        frozen = {"frozen in the student's base": student, "frozen in the teacher": teacher}
    held = [f"{count(trained)} trained ({size(trained)})"]
    held += [f"{count(model.params)} {where} ({size(model.params)})" for where, model in frozen.items()]
    return f"parameters: {', '.join(held)}; optimiser: {size(optimiser)}"


def _short(number: int) -> str:
    """Three digits and a unit, ready for a "B" behind it: "8.03 G", "21 M", "512 "."""
    rounded = float(f"{number:.3g}")
    power = min((len(str(int(rounded))) - 1) // 3, 4)
    return f"{rounded / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"


def sampling_config(decode: DecodeConfig, folder: ModelFolder) -> SamplingConfig:
    return SamplingConfig(
        max_tokens=decode.max_tokens,
        eos_ids=folder.stop_ids,
        pad_id=folder.pad_id,
        temperature=decode.temperature,
        top_k=decode.top_k,
        top_p=decode.top_p,
    )


def _evaluator(
    config: Experiment, task: Task, split: str, folder: ModelFolder, teacher: ModelFolder, mesh
) -> Evaluator:
    return Evaluator(
        task,
        split,
        folder,
        teacher,
        config.prompt,
        judged=sampling_config(config.eval.decode, folder),
        rollout=sampling_config(config.rollout, folder),
        batch_size=config.eval.batch_size,
        seed=config.seed,
        mesh=mesh,
    )


class _Arm:
    """One arm: the same base, seed and data order as the others, its own loss."""

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
        mesh,
        workdir: Path,
    ):
        self.config, self.name, self.folder, self.rows, self.retention = config, name, folder, rows, retention
        self.mesh, self.workdir = mesh, workdir
        sampling = sampling_config(config.rollout, folder)
        micro_batches = config.train.micro_batches
        self.step_config = StepConfig(
            folder.config, teacher.config, sampling, loss, config.optim, config.lora, micro_batches
        )
        self.frozen = Frozen(teacher.params, folder.params if config.lora else None, teacher_prefix)

    def train(self, dev: Evaluator, base_on_dev: Evaluation, started: float, seconds: dict[str, float]) -> Params:
        """Runs the arm's steps, from its latest checkpoint where there is one; returns the trained parameters."""
        config, train = self.config, self.config.train
        state = init_state(self.folder.params, self.step_config, jax.random.key(config.seed))
        checkpoints = Checkpoints(self.workdir / "checkpoints", train.keep, train.save_every)
        first = checkpoints.latest_step or 0
        if first:
            state = checkpoints.restore(state)
            print(f"{self.name}: continues from the checkpoint of step {first}", flush=True)
        writer = Writer(self.workdir, self.name, train.steps, first, train.log_every)
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
        compiled = None
        for step in range(first + 1, train.steps + 1):
            batch = sharding.put_batch(next(batches), self.mesh)
            if compiled is None:
                clock = time.monotonic()
                compiled = train_step.lower(state, self.frozen, batch, config=self.step_config).compile()
                seconds[f"{self.name} compile"] = time.monotonic() - clock
                writer.pause()
            with jax.transfer_guard("disallow"):
                state, metrics = compiled(state, self.frozen, batch)
            writer.step(step, metrics)
            if "first step done" not in seconds:
                jax.block_until_ready(metrics)
                seconds["first step done"] = time.monotonic() - started
            if config.eval.every and step % config.eval.every == 0:
                writer.flush()
                writer.write(step, _prefixed(dev(self._student(state))))
                writer.pause()
            checkpoints.save(state, step, last=step == train.steps)
        writer.close()
        checkpoints.close()
        return self._student(state)

    def _student(self, state: TrainState) -> Params:
        return student_params(state.params, self.frozen, self.step_config)


def _prefixed(evaluation: Evaluation) -> dict[str, float]:
    return {f"dev/{name}": value for name, value in evaluation.metrics.items() if isinstance(value, float)}


def _results(finished: dict[str, Evaluation], config: Experiment) -> dict[str, dict]:
    """results.json: the metrics by arm; each arm's harm beside that of the first one, usually plain OPCD."""
    results = {name: dict(evaluation.metrics) for name, evaluation in finished.items()}
    reference, *others = config.arms
    plain = finished[reference].outcomes
    for name in config.arms:
        results[name]["step"] = config.train.steps
    for name in others:
        arm = finished[name].outcomes
        results[name][f"harm_minus_{reference}"] = metrics_lib.harm_difference(
            (arm["bare"].correct, arm["context"].correct),
            (plain["bare"].correct, plain["context"].correct),
            config.eval.bootstrap,
        )
    return results


def _save_items(folder: Path, evaluation: Evaluation) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_text(folder / "items.jsonl", "".join(json.dumps(item) + "\n" for item in evaluation.items))
