"""Evaluate any model folder (also ``python -m ctxjax.evaluate``)::

    ctxjax evaluate --model=my-model --task=math --config.math.path=rows.jsonl --context=prompt.txt --out=evaluation

Questions, views, decoding and graders are those of a training run; set them with ``--config.TASK.path=...``,
``--config.eval.temperature=...`` and so on (configs/base.py). Without a context there is no context view, and no metric
that compares views.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags

from ctxjax.host import command, preemption, progress

NAME = "model"  # the key of the evaluated model in results.json


def main(
    config: ConfigDict, model: str | None, task: str | None, context: str | None, split: str, out: str | None
) -> None:
    """Run the command with the values of its flags (see ``command_line``)."""
    if out is None:
        raise ValueError("--out is missing; give a folder for results.json and the responses")
    out = command.parse_new("--out", out)
    command.prepare(config)
    apply_flags(config, model, task, context)
    from ctxjax import report
    from ctxjax.host import workdir
    from ctxjax.inputs import data_record

    evaluation, facts, data = evaluate(config, split)
    line = shlex.join(["python", "-m", "ctxjax.evaluate", *sys.argv[1:]])
    facts = workdir.collect_facts(config) | facts | data.facts | {"command": line}
    with workdir.new_folder(out) as partial:
        evaluation.save(partial / NAME, {"step": 0} | workdir.select_code_facts(facts))
        workdir.write_json(partial / "run.json", facts)
        workdir.write_text(partial / data_record.FILE, data.text)
        workdir.write_json(partial / "results.json", {NAME: evaluation.metrics})
    print(f"\n{report.results_table({NAME: evaluation.metrics})}\n")
    print(_format_readable(evaluation.metrics))
    print(f"results and responses: {out}")


def apply_flags(config: ConfigDict, model: str | None, task: str | None, context: str | None) -> None:
    """Copy the command's flags into the configuration. Raises ValueError if the task takes no context."""
    if model is not None:
        if config.model.path not in ("", model):  # of a run's config.json: the adapter was for that model
            config.lora.update({"init": "", "rank": 0})
        config.model.path = model
    if not config.model.path:
        raise ValueError("--model is missing; give the folder or the Hub id of a model")
    if task is not None:
        config.task = task
    if context is None:
        return
    section = config.get(config.task, ConfigDict())
    if "context_file" not in section:
        raise ValueError(f"--context={context}: task {config.task!r} makes its own contexts; leave --context out")
    empty = dict.fromkeys(("context", "context_column", "context_template", "teacher_messages"), "")
    for field, value in (empty | {"context_files": ()}).items():
        if field in section:
            section[field] = value
    section.context_file = context


def evaluate(config: ConfigDict, split: str):
    """Evaluate config.model.path on a split of config.task, with itself as teacher. Return (Evaluation, facts,
    DataRecord)."""
    from ctxjax import config as config_lib, sharding
    from ctxjax.data import prompts as prompts_lib, splits
    from ctxjax.data.records import describe_left_out
    from ctxjax.data.tasks import TASKS
    from ctxjax.evaluation.evaluator import Evaluator
    from ctxjax.host import processes
    from ctxjax.inputs.data_record import DataRecord
    from ctxjax.inputs.run_inputs import open_student

    processes.check_alone("ctxjax evaluate")
    config = config.copy_and_resolve_references()
    # The model is its own base here, and has not drifted from itself.
    config.eval.meters = tuple(name for name in config.eval.meters if name != "drift")
    experiment = config_lib.experiment(config, jax.device_count(), trains=False)
    task_config = experiment.task_config
    if hasattr(task_config, "required"):
        task_config = dataclasses.replace(task_config, required=False)
    with progress.Bar("reading the questions"):
        task = TASKS[experiment.task][1](task_config)
        splits.check_splits(task, (split,))
    mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
    with jax.set_mesh(mesh):
        if experiment.model.param_dtype != "float32":
            print(
                f"note: weights are read as model.param_dtype = {experiment.model.param_dtype}, which rounds small "
                "updates of a merged adapter away; --config.model.param_dtype=float32 keeps them",
                flush=True,
            )
        folder = open_student(experiment, experiment.model.path, mesh, {})
        (evaluator,) = Evaluator.of_splits(experiment, task, (split,), folder, folder, mesh)
        quoted = prompts_lib.describe_quoted_control_tokens(folder.tokenizer, task.rows(split))
        if quoted:
            print(f"warning: {quoted}")
        left_out = describe_left_out({split: evaluator.dropped}, task.skipped)
        print(f"{len(task.rows(split))} {split} questions; left out: {left_out}", flush=True)
        facts = {"task": task.facts, "split": split, "rows_left_out": dict(task.skipped)}
        return evaluator(folder.params), facts, DataRecord(task)


def suggest_less_memory(config: ConfigDict, device_count: int) -> str:
    """Return what to try if an evaluation with this configuration ran out of memory."""
    from ctxjax import config as config_lib

    mesh = config_lib.experiment(config, device_count, trains=False).mesh
    half = config.eval.batch_size // 2 // (mesh.data * mesh.fsdp) * mesh.data * mesh.fsdp
    flags = [f"--config.eval.batch_size={half}"] * (half > 0)
    flags += ["--config.model.param_dtype=bfloat16"] * (config.model.param_dtype == "float32")
    return f"Repeat the command with one of these: {', '.join(flags)}" if flags else "Take more devices"


def _format_readable(metrics: dict) -> str:
    """Format the share of readable responses, and the reasons why the others are not readable."""
    lines = []
    for view, name in (("x", "without context"), ("xc", "with context")):
        if f"parse_{view}" in metrics:
            lenient = metrics.get(f"acc_{view}_lenient")
            line = f"{name}: {100 * metrics[f'parse_{view}']:.1f} % of the responses are readable"
            line += "" if lenient is None else f"; read leniently, {100 * lenient:.1f} % are right"
            reasons = "; ".join(f"{reason}: {count}" for reason, count in metrics[f"unparsed_{view}"].items())
            lines.append(line + (f" ({reasons})" if reasons else ""))
    return "\n".join(lines)


def command_line() -> None:
    """Read the flags and run the command. The flags are declared here and not at import, since the training command has
    flags of the same names."""
    preemption.listen()
    config = config_flags.DEFINE_config_file(
        "config", command.find_config("configs/base.py"), "The configuration that --config.* flags change."
    )
    options = (
        flags.DEFINE_string("model", None, "A Hugging Face folder or Hub id; default: config.model.path."),
        flags.DEFINE_string("task", None, "The task with questions and grader; default: config.task."),
        flags.DEFINE_string("context", None, "Text file with the context; default: the task's own, or none."),
        flags.DEFINE_enum("split", "test", ["train", "dev", "test"], "The questions to ask."),
        flags.DEFINE_string("out", None, "Folder to write; must not exist."),
    )
    command.run(
        lambda _: main(config.value, *(option.value for option in options)),
        config,
        lambda: suggest_less_memory(config.value, jax.device_count()),
    )


if __name__ == "__main__":
    command_line()
