"""Harm, removability and obedience on several worlds and contexts: configs/tiny.py over seeds x contexts.

    python benchmarks/tiny_worlds.py --workdir=DIR [--seeds=3] [--contexts=3] [--jobs=2] [--quick]

Every run is the main command with its settings untouched but for the seed, the table to internalize, and the dev
evaluations during training, which are off. Runs that are already finished in DIR are not repeated. Prints a
row per run and arm, mean and range by arm, and one JSON object as the last line.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
from pathlib import Path
import queue
import subprocess
import sys
import threading

METRICS = ("acc_x", "acc_xc", "harm", "both_correct", "obedience", "acc_empty", "view_kl", "dlen", "cosine")


def run(workdir: Path, seed: int, context: int, core: int, extra: list[str]) -> dict[str, dict]:
    """One main command on one core, its output in a log beside its workdir; returns its results.json."""
    folder = workdir / f"seed{seed}_context{context}"
    if not (folder / "results.json").exists():
        command = [sys.executable, "-m", "ctxjax.main", "--config=configs/tiny.py", f"--workdir={folder}"]
        command += [f"--config.seed={seed}", f"--config.rules.context_index={context}", "--config.eval.every=0", *extra]
        log = workdir / f"{folder.name}.log"
        with log.open("w") as output:
            # One core each: two runs side by side are faster than two cores for one run after the other.
            code = subprocess.run(
                command, stdout=output, stderr=output, preexec_fn=lambda: os.sched_setaffinity(0, {core})
            ).returncode
        if code:
            raise SystemExit(f"{' '.join(command)} failed with exit code {code}; see {log}")
    return json.loads((folder / "results.json").read_text())


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
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one run of a few steps: does it work at all")
    options = parser.parse_args()
    extra = []
    if options.quick:
        options.seeds = options.contexts = 1
        extra = ["--config.train.steps=4", "--config.base.steps=4", "--config.rules.test_questions=32"]
    options.workdir.mkdir(parents=True, exist_ok=True)
    cores: queue.Queue[int] = queue.Queue()
    for job in range(options.jobs):
        cores.put(sorted(os.sched_getaffinity(0))[job % len(os.sched_getaffinity(0))])
    # A world's base is trained by the run of its first context; the others wait for it.
    base_made = [threading.Event() for _ in range(options.seeds)]

    def work(pair: tuple[int, int]) -> tuple[int, int, dict]:
        context, seed = pair
        if context:
            base_made[seed].wait()
        core = cores.get()
        try:
            return seed, context, run(options.workdir, seed, context, core, extra)
        finally:
            cores.put(core)
            base_made[seed].set()

    pairs = list(itertools.product(range(options.contexts), range(options.seeds)))
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = sorted(pool.map(work, pairs), key=lambda result: result[:2])
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
