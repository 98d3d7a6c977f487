"""Evaluate a trained arm with its change scaled: ``python -m ctxjax.study.dose --workdir=RUN --arm=ARM --out=FILE``.

Nothing is trained: the weights are those of the base plus a multiple of what training added, from none of it to a
quarter more. The file has all metrics at each scale, as results.json has them, and how much each matrix of each layer
has changed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
import sys

import jax
from ml_collections import ConfigDict

from ctxjax import sharding
from ctxjax.evaluation.evaluator import Evaluator
from ctxjax.evaluation.metrics import METRICS
from ctxjax.export import add_checkpoint_flags, choose_checkpoint
from ctxjax.host import command, preemption, workdir as workdir_lib
from ctxjax.inputs.run_inputs import open_inputs
from ctxjax.models import change, lora
from ctxjax.report.formatting import UNITS
from ctxjax.training import stored_arms

SCALES = "0,0.25,0.5,0.75,1,1.25"
SHOWN = ("acc_x", "acc_xc", "harm", "obedience", "dlen", "view_kl")


def measure_doses(workdir: Path, arm: str | None, step: int | None, scales: list[float], split: str = "test") -> dict:
    """Return {"arm", "step", "split", "change": models.change.measure, "doses": [{"scale", metrics ...}]}.

    ``arm`` and ``step``: as in ``export``. Raises ValueError or OSError, which names what exists.
    """
    config = stored_arms.read_experiment(workdir)
    arm, step = choose_checkpoint(workdir, config, arm, step)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task, student, teacher, _, _ = open_inputs(config, mesh, {})
        stored_arms.check_source(workdir, config, student.params)
        trained = stored_arms.read_trained(workdir, config, student.config, arm, step, mesh)
        if config.lora is not None:
            trained = lora.merged(lora.join(student.params, trained, config.lora))
        (evaluator,) = Evaluator.of_splits(config, task, (split,), student, teacher, mesh)
        doses = []
        for scale in scales:
            params = change.scale(student.params, trained, scale)
            doses.append({"scale": scale} | evaluator(params, f"scale {scale:g}").metrics)
        size = change.measure(student.params, trained)
    return {"arm": arm, "step": step, "split": split, "change": size, "doses": doses}


def format_doses(doses: list[dict]) -> str:
    """Return the table of the main metrics by scale."""
    shown = [metric for metric in METRICS if metric.key in SHOWN and any(metric.key in row for row in doses)]
    header = ["scale", *(metric.header + UNITS[metric.unit].suffix for metric in shown)]
    rows = [[f"{row['scale']:g}", *(UNITS[m.unit].form(row.get(m.key)) for m in shown)] for row in doses]
    lines = [" | ".join(cells) for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, and print the table. Return 0, or 2 after one line on stderr if it fails."""
    parser = argparse.ArgumentParser(
        prog="ctxjax dose",
        description="Evaluate a trained arm with its change scaled.",
        epilog="example: ctxjax dose --workdir=runs/tiny --arm=opcd --out=dose.json",
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write; must not exist")
    parser.add_argument("--scales", default=SCALES, help=f"multiples of the change; default: {SCALES}")
    parser.add_argument("--split", default="test", choices=("dev", "test"), help="the questions to ask")
    options = parser.parse_args(arguments)

    def run() -> None:
        workdir, out = command.parse_folder("--workdir", options.workdir), command.parse_new("--out", options.out)
        try:
            scales = [float(part) for part in options.scales.split(",")]
        except ValueError:
            scales = [math.nan]
        if not all(map(math.isfinite, scales)):
            raise ValueError(f"--scales={options.scales} must be numbers, such as {SCALES}")
        command.prepare(ConfigDict(workdir_lib.read_config(workdir)))
        found = measure_doses(workdir, options.arm, options.step, scales, options.split)
        workdir_lib.write_json(out, found)
        print(f"{format_doses(found['doses'])}\n\n{out}: {found['arm']}, step {found['step']}, on {found['split']}")

    return command.end_readably(run, "evaluate in the host's memory: JAX_PLATFORMS=cpu")


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
