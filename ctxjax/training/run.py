"""A run, from top to bottom: base, arms, evaluation, table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import resource
import time

import jax

from ctxjax import sharding
from ctxjax.config import Experiment
from ctxjax.data.records import format_counts
from ctxjax.distill import optim
from ctxjax.evaluation import metrics as metrics_lib
from ctxjax.evaluation.evaluator import Evaluation, Evaluator
from ctxjax.host import processes, retry, workdir as workdir_lib
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import compute_digests, compute_teacher_prefix, open_inputs
from ctxjax.inputs.teacher_samples import open_teacher_samples, steps_with_samples
from ctxjax.models import lora as lora_lib, params as params_lib
from ctxjax.report import results_table, write_report
from ctxjax.training.arm import Arm
from ctxjax.types import Params


def run(config: Experiment, workdir: Path, facts: dict) -> dict[str, dict]:
    """Trains and evaluates every arm and writes results.json, report.html and a folder for each arm.

    ``facts`` (configuration, command, versions) go into run.json. Returns the results by arm. A run that was ended, in
    whatever way, goes on: arms from their latest checkpoint, and what has been evaluated is not evaluated again.
    """
    metrics_lib.check_select(config.eval.select)
    started = time.monotonic()
    seconds: dict[str, float] = {}
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with workdir_lib.Lock(workdir) as lock, jax.set_mesh(mesh):
        if (workdir / "config.json").exists():
            lock.take()
        inputs = open_inputs(config, mesh, seconds)
        task, folder, teacher, train_rows, retention = inputs
        print(_sizes(config, folder, teacher, mesh), flush=True)
        prefix = compute_teacher_prefix(teacher, train_rows)
        dev, test = Evaluator.of_splits(config, task, ("dev", "test"), folder, teacher, mesh)
        print(
            f"{len(train_rows.rows)} training questions; over-long and dropped: train {train_rows.dropped}, "
            f"dev {dev.dropped}, test {test.dropped}; rows of data files left "
            f"out: {format_counts(task.skipped) or 'none'}",
            flush=True,
        )
        lock.take()
        facts |= {"rows_left_out": dict(task.skipped), "task": task.facts}
        manifest = workdir_lib.claim(workdir, facts, compute_digests(inputs))
        code = workdir_lib.select_code_facts(manifest)

        def evaluated(folder: Path, evaluator: Evaluator, params: Params, step: int) -> Evaluation:
            """The evaluation that lies in the folder, where it is of this step and made by this code, or a new one."""
            identity = {"step": step} | code
            found = Evaluation.load(folder, identity)
            if not processes.ask_first(found is not None):
                found = evaluator(sharding.bring_to_device(params))
                found.save(folder, identity)
            if found is None:
                raise FileNotFoundError(f"{folder}: the first process sees an evaluation there, and this one does not")
            return found

        clock = time.monotonic()
        base = evaluated(workdir / "base", test, folder.params, 0)
        base_on_dev = evaluated(workdir / "base" / "dev", dev, folder.params, 0)
        metrics_lib.check_select(config.eval.select, base_on_dev.metrics)
        seconds["evaluate base"] = time.monotonic() - clock
        finished, selected, alarms = {"base": base}, {}, {}
        if teacher is not folder:
            clock = time.monotonic()
            (own,) = Evaluator.of_splits(config, task, ("test",), teacher, teacher, mesh)
            finished["teacher"] = evaluated(workdir / "teacher", own, teacher.params, 0)
            seconds["evaluate teacher"] = time.monotonic() - clock
        clock = time.monotonic()
        samples = open_teacher_samples(config, inputs, workdir, mesh)
        if samples:
            seconds["teacher's samples"] = time.monotonic() - clock
        for name, loss in config.arms.items():
            clock = time.monotonic()
            arm = Arm(
                config,
                name,
                loss,
                folder,
                teacher,
                train_rows,
                retention if loss.mu > 0 else None,
                prefix,
                {step: samples[step] for step in steps_with_samples(config, name)},
                mesh,
                workdir / name,
                {"config": manifest["config"], "manifest": {k: manifest[k] for k in manifest.keys() - {"config"}}},
            )
            params = arm.train(dev, base_on_dev, started, seconds)
            finished[name] = evaluated(workdir / name, test, params, config.train.steps)
            del params
            step = arm.selected_step
            if step not in (None, config.train.steps):
                selected[name] = step, evaluated(workdir / name / "selected", test, arm.params_at(step), step)
            alarms[name] = arm.alarms.record
            seconds[name] = time.monotonic() - clock
        results = _results(finished, config)
        results |= {name: results[name] | found for name, found in alarms.items()}
        for name, (step, evaluation) in selected.items():
            results[name]["selected"] = {"step": step} | evaluation.metrics
        seconds["total"] = time.monotonic() - started
        manifest |= {"retries": dict(retry.counts)}
        manifest |= {"seconds": {name: round(value, 2) for name, value in seconds.items()}}
        workdir_lib.write_json(workdir / "run.json", manifest)
        workdir_lib.write_json(workdir / "results.json", results)
        page = write_report(workdir) if processes.is_first() else None
    print(f"\n{results_table(results)}\n")
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    print(f"peak memory of the host process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"report: {page}")
    return results


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


def _results(finished: dict[str, Evaluation], config: Experiment) -> dict[str, dict]:
    """Return results.json: the metrics by arm, with each arm compared to the first one, usually plain OPCD."""
    results = {name: dict(evaluation.metrics) for name, evaluation in finished.items()}
    first, *others = config.arms
    for name in config.arms:
        results[name]["step"] = config.train.steps
    for name in others:
        pair = finished[name].outcomes, finished[first].outcomes
        results[name] |= metrics_lib.compare_arms(*pair, first, config.eval.bootstrap)
    return results
