"""Measure harm, removability and obedience on several worlds and contexts: configs/tiny.py over seeds x contexts.

    python benchmarks/tiny_worlds.py --workdir=DIR [--seeds=3] [--contexts=3] [--quick] [--config.FIELD=VALUE ...]

Every run is the main command; only the seed, the table to internalize and the given fields change, and dev evaluations
during training are off. Runs that are already finished in DIR are not repeated. The number of CPU devices changes the
last digits of sums, which gives other base models: compare only machines with the same number of cores. Prints one row
per run and arm, mean and range by arm, and one JSON object as the last line. Recorded numbers: benchmarks/README.md.
"""

import argparse
import itertools
import json
from pathlib import Path
import subprocess
import sys

METRICS = ("acc_x", "acc_xc", "harm", "both_correct", "obedience", "acc_empty", "view_kl", "dlen", "cosine")
METRICS += ("lowest_acc_xc",)  # needs dev evaluations: --config.eval.every=20


def run_once(config: str, folder: Path, flags: list[str]) -> dict[str, dict]:
    """Run the main command, or go on with it, with its output in a log next to ``folder``; return its results.json."""
    if not (folder / "results.json").exists():
        command = [sys.executable, "-m", "ctxjax.main", f"--config={config}", f"--workdir={folder}", *flags]
        log = folder.with_name(f"{folder.name}.log")
        with log.open("a") as output:
            code = subprocess.run(command, stdout=output, stderr=output).returncode
        if code:
            raise SystemExit(f"{' '.join(command)} failed with exit code {code}; see {log}")
    return json.loads((folder / "results.json").read_text())


def run(workdir: Path, seed: int, context: int, extra: list[str]) -> dict[str, dict]:
    flags = [f"--config.seed={seed}", f"--config.rules.context_index={context}", "--config.eval.every=0", *extra]
    return run_once("configs/tiny.py", workdir / f"seed{seed}_context{context}", flags)


def value(arm: dict, metric: str) -> float | None:
    if metric == "cosine":
        layers = arm["cosine_by_layer"][1:]
        return sum(layers) / len(layers)
    return arm.get(metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run of a few steps, to check that it works")
    options, extra = parser.parse_known_args()
    if unknown := [argument for argument in extra if not argument.startswith("--config.")]:
        parser.error(f"unknown arguments {unknown}")
    if options.quick:
        options.seeds = options.contexts = 1
        extra += ["--config.train.steps=4", "--config.base.steps=4", "--config.rules.test_questions=32"]
    options.workdir.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(range(options.seeds), range(options.contexts)))
    runs = [(seed, context, run(options.workdir, seed, context, extra)) for seed, context in pairs]
    print("| seed | context | arm | " + " | ".join(METRICS) + " |")
    print("|---" * (3 + len(METRICS)) + "|")
    collected: dict[str, dict[str, list[float]]] = {}
    for seed, context, results in runs:
        for name, arm in results.items():
            cells = [value(arm, metric) for metric in METRICS]
            for metric, cell in zip(METRICS, cells):
                if cell is not None:
                    collected.setdefault(name, {}).setdefault(metric, []).append(cell)
            shown = " | ".join("-" if cell is None else f"{cell:.4f}" for cell in cells)
            print(f"| {seed} | {context} | {name} | {shown} |")
    summary = {
        arm: {m: {"mean": sum(v) / len(v), "min": min(v), "max": max(v), "runs": len(v)} for m, v in metrics.items()}
        for arm, metrics in collected.items()
    }
    print(json.dumps({"benchmark": "tiny_worlds", "seeds": options.seeds, "contexts": options.contexts} | summary))


if __name__ == "__main__":
    main()
