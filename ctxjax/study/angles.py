"""Measure the angles between gradients: ``python -m ctxjax.study.angles --workdir=RUN --arm=ARM --out=FILE``.

The cosine of two terms' gradients is below 0 if one term undoes what the other one teaches, and near 0 if neither
touches the other. Nothing is trained: the gradients are those of an arm's checkpoint, on the training batches that
would follow it, with responses sampled from it, also if the arm trains on the teacher's. The anchor is measured in arms
without it, too, and retention if any arm of the run has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from ctxjax import sharding
from ctxjax.config_sections import Experiment
from ctxjax.data.pipeline import draw_steps
from ctxjax.data.task import GameTask
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import needs_ema, terms
from ctxjax.distill.rollouts import Questions
from ctxjax.distill.train_step import term_gradients
from ctxjax.export import add_checkpoint_flags, choose_checkpoint
from ctxjax.host import command, preemption, workdir as workdir_lib
from ctxjax.inputs.run_inputs import Inputs, open_inputs
from ctxjax.training import stored_arms
from ctxjax.training.arm import make_step_config
from ctxjax.types import Frozen, Params, TrainState


def measure_angles(workdir: Path, arm: str | None, step: int | None, batches: int = 4) -> dict:
    """Return {"arm", "step", "norms": {term: norm of its mean gradient}, "cosines": {"term, term": ...}}.

    The cosines are "whole", of the mean gradients over ``batches``; "by_batch"; "by_layer"; and "by_matrix", those of
    matrices that layers do not have. A norm has the term's weight in it, 1 for a term that the arm lacks. ``arm`` and
    ``step``: as in ``export``. Raises ValueError or OSError, which names what exists.
    """
    config = stored_arms.read_experiment(workdir)
    arm, step = choose_checkpoint(workdir, config, arm, step)
    if config.arms[arm].gate == "response" or needs_ema(config.arms[arm]):
        raise ValueError(
            f"arm {arm!r} keeps a moving average of the student or gates its anchor by whole responses; the angles of "
            "such an arm are not measured, choose another one (--arm)"
        )
    if not config.arms[arm].needs_teacher:
        raise ValueError(
            f"arm {arm!r} has the loss {config.arms[arm].divergence}, which on the student's own responses has no "
            "gradient but noise; choose another arm (--arm)"
        )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        inputs = open_inputs(config, mesh, {})
        stored_arms.check_source(workdir, config, inputs.student.params)
        if isinstance(inputs.task, GameTask):
            raise ValueError(f"task {config.task!r} is a game, and the angles are measured for questions only")
        loss = _with_all_terms(config.arms[arm], inputs)
        own = make_step_config(config, arm, loss, inputs)
        trained = stored_arms.read_trained(workdir, config, inputs.student.config, arm, step, mesh)
        state = TrainState(jnp.int32(step), trained, None, jax.random.key(config.seed))
        frozen = Frozen(inputs.teacher.params, inputs.student.params if config.lora else None)
        source, found = Questions(_draw_batches(config, inputs, step), mesh), []
        for number in range(batches):
            batch = source.next(state, step + number).batch
            found.append(jax.device_get(term_gradients(state, frozen, batch, own)))
            state = state.replace(step=state.step + 1)
    mean = jax.tree.map(lambda *own: sum(own) / batches, *found)
    norms = {term: float(np.sqrt(_dot(gradient, gradient))) for term, gradient in mean.items()}
    pairs = itertools.combinations([term.name for term in terms(loss)], 2)
    return {
        "arm": arm,
        "step": step,
        "norms": norms,
        "cosines": {f"{a}, {b}": _compare(mean, found, a, b) for a, b in pairs},
    }


def _with_all_terms(loss: LossConfig, inputs: Inputs) -> LossConfig:
    """The arm's loss, with an anchor and, if the run has rows under other contexts, with retention."""
    mu = (loss.mu or 1.0) if inputs.retention is not None else 0.0
    return dataclasses.replace(loss, beta=loss.beta or 1.0, mu=mu)


def _draw_batches(config: Experiment, inputs: Inputs, first: int):
    train, student = config.train, inputs.student
    sizes = {"batch_size": train.batch_size, "retention_rows": train.retention_rows, "pad_id": student.pad_id}
    steps = draw_steps(inputs.rows, inputs.retention, seed=config.seed, first_step=first, **sizes)
    return (drawn.batch for drawn in steps)


def _compare(mean: dict[str, Params], found: list[dict[str, Params]], one: str, other: str) -> dict:
    a, b = mean[one], mean[other]
    layers = range(len(next(iter(a["layers"].values()))))
    single = [name for name in a if name != "layers"]
    return {
        "whole": _cosine(a, b),
        "by_batch": [_cosine(own[one], own[other]) for own in found],
        "by_layer": [_cosine(*({name: w[n] for name, w in g["layers"].items()} for g in (a, b))) for n in layers],
        "by_matrix": {name: _cosine(a[name], b[name]) for name in single},
    }


def _dot(a: Params, b: Params) -> float:
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _cosine(a: Params, b: Params) -> float | None:
    """Return the cosine of two trees as vectors; None if one of them is zero."""
    size = np.sqrt(_dot(a, a) * _dot(b, b))
    return _dot(a, b) / size if size else None


def format_cosines(cosines: dict[str, dict]) -> str:
    """Return the table of the cosines by pair of terms."""
    lines = ["| terms | cosine | over the batches | layers, first to last |", "| --- | --- | --- | --- |"]
    for pair, own in cosines.items():
        by_batch = [value for value in own["by_batch"] if value is not None]
        span = f"{min(by_batch):.2f} to {max(by_batch):.2f}" if by_batch else "-"
        layers = " ".join(_format(value) for value in own["by_layer"])
        lines.append(f"| {pair} | {_format(own['whole'])} | {span} | {layers} |")
    return "\n".join(lines)


def _format(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table. Return 0, or 2 after one line on stderr if it fails."""
    parser = argparse.ArgumentParser(
        prog="ctxjax angles",
        description="Measure the angles between the gradients of an arm's terms.",
        epilog="example: ctxjax angles --workdir=runs/tiny --arm=opcd --out=angles.json",
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write; must not exist")
    parser.add_argument("--batches", type=int, default=4, help="training batches; default: 4")
    options = parser.parse_args(arguments)

    def run() -> None:
        workdir, out = command.parse_folder("--workdir", options.workdir), command.parse_new("--out", options.out)
        if options.batches < 1:
            raise ValueError(f"--batches={options.batches} must be at least 1")
        command.prepare(ConfigDict(workdir_lib.read_config(workdir)))
        found = measure_angles(workdir, options.arm, options.step, options.batches)
        workdir_lib.write_json(out, found)
        print(f"{format_cosines(found['cosines'])}\n\n{out}: {found['arm']}, step {found['step']}")

    return command.end_readably(run, "measure in the host's memory: JAX_PLATFORMS=cpu")


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
