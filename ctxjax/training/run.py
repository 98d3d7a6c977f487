"""A run from top to bottom: open its inputs, evaluate the base, train the arms, write the results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import resource
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ctxjax import sharding
from ctxjax.config_sections import Experiment
from ctxjax.data.records import describe_left_out
from ctxjax.distill import optim
from ctxjax.evaluation import metrics as metrics_lib, select as select_lib
from ctxjax.evaluation.evaluator import Evaluation, Evaluator
from ctxjax.evaluation.outcomes import Learning
from ctxjax.host import memory, processes, progress, retry, workdir as workdir_lib
from ctxjax.inputs.data_record import FILE as DATA_FILE, DataRecord
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import Inputs, compute_digests, compute_teacher_prefix, open_inputs
from ctxjax.inputs.teacher_samples import open_teacher_samples
from ctxjax.models import lora as lora_lib, params as params_lib
from ctxjax.monitoring import trackers
from ctxjax.report import results_table, write_report
from ctxjax.report.formatting import shorten
from ctxjax.training.arm import Arm, Shared
from ctxjax.training.fed_rows import FedRows
from ctxjax.types import Params, PrefixKV


def run(config: Experiment, workdir: Path, facts: dict) -> dict[str, dict]:
    """Train and evaluate every arm; write results.json, report.html and a folder for each arm.

    ``facts`` (configuration, command, versions) go into run.json. Return the results by arm. A run that was
    interrupted resumes: each arm from its latest checkpoint, and finished evaluations are not repeated.
    """
    check_settings(config)
    _check_finished_arms_stay(config, workdir)
    started = time.monotonic()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    print(
        f"{workdir}: {config.train.steps} steps of each of {', '.join(config.arms)}, which learn to answer without the "
        "context as the teacher does with it",
        flush=True,
    )
    with workdir_lib.Lock(workdir) as lock, jax.set_mesh(mesh):
        opened = _open(config, workdir, facts, mesh, lock, started)
        models, base_on_dev = _evaluate_untrained(opened)
        arms = _train_arms(opened, base_on_dev)
        results = _collect_results(models, arms, config)
        page = _write_results(opened, results)
    _print_summary(results, opened.seconds, page)
    return results


def check_settings(config: Experiment) -> None:
    """Raise ValueError for what a run could not select by or log to."""
    select_lib.check_select(config.eval.select)
    select_lib.check_select_is_measured(config.eval.select, config.eval)
    if warning := select_lib.describe_wrong_sign(config.eval.select):
        print(f"warning: {warning}", flush=True)
    trackers.check_installed(config.logging)


def _check_finished_arms_stay(config: Experiment, workdir: Path) -> None:
    """Raise ValueError if an arm that the run in this folder has finished would be left out of its results."""
    if not (workdir / "config.json").exists():
        return
    before = workdir_lib.read_config(workdir)["run_arms"]
    finished = [name for name in before if Evaluation.is_saved(workdir / name)]
    if lost := [name for name in finished if name not in config.arms]:
        kept = [name for name in before if name in config.arms or name in finished]
        every = tuple(dict.fromkeys([*kept, *config.arms]))
        raise ValueError(
            f"run_arms = {tuple(config.arms)} leaves out {', '.join(lost)}, which the run in {workdir} has finished: "
            f'its results, report and exports would lose them; give all of them, --config.run_arms="{every}" (what is '
            "finished is not repeated), or choose another --workdir"
        )


@dataclasses.dataclass(frozen=True)
class _OpenRun:
    """A run whose inputs are open and whose workdir is claimed.

    ``manifest``: what run.json holds. ``data``: what data.jsonl does. ``started``: time.monotonic() at the start.
    ``seconds``: part of the run -> its time in seconds, which each phase adds to.
    """

    config: Experiment
    workdir: Path
    mesh: Mesh
    inputs: Inputs
    teacher_prefix: PrefixKV | None
    dev: Evaluator
    test: Evaluator
    manifest: dict
    data: DataRecord
    started: float
    seconds: dict[str, float]

    def evaluate(self, folder: Path, evaluator: Evaluator, params: Params, taken: int) -> Evaluation:
        """Return the evaluation stored in ``folder`` if this code made it after ``taken`` steps, else a new one."""
        identity = {"step": taken} | workdir_lib.select_code_facts(self.manifest)
        found = Evaluation.load(folder, identity)
        if not processes.ask_first(found is not None):
            name, *part = folder.relative_to(self.workdir).parts
            label = f"{name}, best on dev," if part == ["selected"] else name
            found = evaluator(sharding.bring_to_device(params), label)
            found.save(folder, identity)
        if found is None:
            raise FileNotFoundError(
                f"{folder}: the first process finds an evaluation there, and this process does not; give all processes "
                "a --workdir that they share"
            )
        return found


class _TrainedArm(NamedTuple):
    """``evaluation``: of the last step. ``selected``: (step, evaluation) of the checkpoint that is best on dev; None if
    that is the last step or none was evaluated. ``learning``: Acc_xc on dev on the way. ``alarms``: what results.json
    says of the arm's alarms."""

    evaluation: Evaluation
    selected: tuple[int, Evaluation] | None
    learning: Learning
    alarms: dict


def _open(
    config: Experiment, workdir: Path, facts: dict, mesh: Mesh, lock: workdir_lib.Lock, started: float
) -> _OpenRun:
    """Open inputs and evaluators, then claim the workdir. A run that cannot start leaves nothing behind."""
    if (workdir / "config.json").exists():
        lock.take()
    seconds: dict[str, float] = {}
    inputs = open_inputs(config, mesh, seconds)
    task, student, teacher, rows, _ = inputs
    with progress.Bar("computing the digests of weights and questions"):
        data, digests = DataRecord(task, rows, inputs.retention), compute_digests(inputs)
    processes.check_same_facts(digests)
    print(_describe_sizes(config, student, teacher, mesh), flush=True)
    memory.warn_if_too_large(_count_held_bytes(config, student, teacher, mesh), "weights, gradients and optimiser")
    prefix = compute_teacher_prefix(teacher, rows)
    dev, test = Evaluator.of_splits(config, task, ("dev", "test"), student, teacher, mesh)
    select_lib.check_select(config.eval.select, dev.measurable)
    dropped = {"train": rows.dropped, "dev": dev.dropped, "test": test.dropped}
    left_out = describe_left_out(dropped, task.skipped)
    print(f"{len(rows.rows)} training questions; left out: {left_out}", flush=True)
    lock.take()
    facts = facts | {"rows_left_out": dict(task.skipped), "task": task.facts, "arithmetic": student.config.arithmetic}
    manifest = workdir_lib.claim(workdir, facts | data.facts, digests)
    workdir_lib.write_text(workdir / DATA_FILE, data.text)
    return _OpenRun(config, workdir, mesh, inputs, prefix, dev, test, manifest, data, started, seconds)


def _evaluate_untrained(run: _OpenRun) -> tuple[dict[str, Evaluation], Evaluation]:
    """Evaluate the base, and the teacher if it is another model. Return their evaluations on test by name, and that of
    the base on dev."""
    config, (task, student, teacher, _, _) = run.config, run.inputs
    clock = time.monotonic()
    models = {"base": run.evaluate(run.workdir / "base", run.test, student.params, 0)}
    base_on_dev = run.evaluate(run.workdir / "base" / "dev", run.dev, student.params, 0)
    select_lib.check_select(config.eval.select, base_on_dev.metrics)
    run.seconds["evaluate base"] = time.monotonic() - clock
    if teacher is not student:
        clock = time.monotonic()
        meters = tuple(name for name in config.eval.meters if name != "drift")  # it does not come from the base
        own = dataclasses.replace(config, eval=dataclasses.replace(config.eval, meters=meters))
        (test,) = Evaluator.of_splits(own, task, ("test",), teacher, teacher, run.mesh)
        models["teacher"] = run.evaluate(run.workdir / "teacher", test, teacher.params, 0)
        run.seconds["evaluate teacher"] = time.monotonic() - clock
    return models, base_on_dev


def _train_arms(run: _OpenRun, base_on_dev: Evaluation) -> dict[str, _TrainedArm]:
    """Train and evaluate the arms one after the other."""
    clock = time.monotonic()
    samples = open_teacher_samples(run.config, run.inputs, run.workdir, run.mesh)
    if samples:
        run.seconds["teacher's samples"] = time.monotonic() - clock
    config = run.manifest["config"]
    record = {"config": config, "manifest": {name: run.manifest[name] for name in run.manifest.keys() - {"config"}}}
    fed_rows = FedRows(run.inputs, run.data) if processes.is_first() else None
    shared = Shared(run.config, run.inputs, run.teacher_prefix, samples, run.mesh, record, fed_rows)
    trained = {}
    for name in run.config.arms:
        clock = time.monotonic()
        trained[name] = _train_arm(run, Arm(shared, name, run.workdir / name), run.workdir / name, base_on_dev)
        run.seconds[name] = time.monotonic() - clock
    return trained


def _train_arm(run: _OpenRun, arm: Arm, folder: Path, base_on_dev: Evaluation) -> _TrainedArm:
    last, selected = run.config.train.steps, None
    params = arm.train(run.dev, base_on_dev, run.started, run.seconds)
    evaluation = run.evaluate(folder, run.test, params, last)
    del params  # its memory is needed for the selected checkpoint
    taken = arm.selected_step
    if taken not in (None, last):
        selected = taken, run.evaluate(folder / "selected", run.test, arm.read_student(taken), taken)
    learning = Learning(base_on_dev.metrics["acc_xc"], arm.accuracies_with_context)
    return _TrainedArm(evaluation, selected, learning, arm.alarms.record)


def _collect_results(
    models: dict[str, Evaluation], arms: dict[str, _TrainedArm], config: Experiment
) -> dict[str, dict]:
    """Return results.json: metrics by name, with each arm compared to the first one, usually plain OPCD."""
    results = {name: dict(evaluation.metrics) for name, evaluation in models.items()}
    results |= {name: arm.evaluation.metrics | {"step": config.train.steps} for name, arm in arms.items()}
    first, *others = arms
    for name in others:
        pair = arms[name].evaluation.outcomes, arms[first].evaluation.outcomes
        results[name] |= metrics_lib.compare_arms(*pair, first)
    for name, arm in arms.items():
        results[name] |= metrics_lib.compute_metrics({"learning": arm.learning}, config.eval.bootstrap) | arm.alarms
        if arm.selected is not None:
            taken, evaluation = arm.selected
            results[name]["selected"] = {"step": taken} | evaluation.metrics
    return results


def _write_results(run: _OpenRun, results: dict[str, dict]) -> Path | None:
    """Write run.json, results.json and the report. Return the report's path; None in all processes but the first."""
    run.seconds["total"] = time.monotonic() - run.started
    seconds = {name: round(value, 2) for name, value in run.seconds.items()}
    manifest = run.manifest | {"retries": dict(retry.counts), "seconds": seconds}
    workdir_lib.write_json(run.workdir / "run.json", manifest)
    workdir_lib.write_json(run.workdir / "results.json", results)
    with progress.Bar("drawing the report"):
        return write_report(run.workdir) if processes.is_first() else None


def _print_summary(results: dict[str, dict], seconds: dict[str, float], page: Path | None) -> None:
    print(f"\n{results_table(results)}\n")
    print("seconds of this start: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    print(f"peak memory of the host process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"report: {page}")


def _describe_sizes(config: Experiment, student: ModelFolder, teacher: ModelFolder, mesh: Mesh) -> str:
    """Describe the sizes of weights and optimiser state, in scalars and in bytes on all devices together."""
    trained, optimiser = _make_trained(config, student, mesh)

    def count(tree) -> str:
        return shorten(sum(leaf.size for leaf in jax.tree.leaves(tree))).strip()

    def size(tree) -> str:
        return shorten(_count_bytes(tree)) + "B"

    if config.lora is None:
        frozen = {"frozen in the teacher": teacher}
    elif teacher is student:
        frozen = {"frozen, student's base and teacher in one": teacher}
    else:
        frozen = {"frozen in the student's base": student, "frozen in the teacher": teacher}
    held = [f"{count(trained)} trained ({size(trained)})"]
    held += [f"{count(model.params)} {role} ({size(model.params)})" for role, model in frozen.items()]
    return f"parameters: {', '.join(held)}; optimiser: {size(optimiser)}"


def _make_trained(config: Experiment, student: ModelFolder, mesh: Mesh) -> tuple:
    """Return what is trained, and the state of its optimiser; both may be abstract."""
    trained = student.params
    if config.lora is not None:
        trained = params_lib.abstract(lora_lib.specs(student.config, config.lora), mesh)
    return trained, jax.eval_shape(optim.optimizer(config.optim).init, trained)


def _count_held_bytes(config: Experiment, student: ModelFolder, teacher: ModelFolder, mesh: Mesh) -> int:
    """Return the bytes, on all devices together, of weights, gradients and optimiser: what every step holds."""
    trained, optimiser = _make_trained(config, student, mesh)
    frozen = [student.params] + [teacher.params] * (teacher is not student)  # a run keeps its start for the next arm
    return sum(map(_count_bytes, [trained, trained, optimiser, *frozen]))


def _count_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
