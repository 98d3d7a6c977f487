"""Measure what a real model learns of a document, and what is left when the document comes back, over documents.

    python -m benchmarks.real_documents --model=FOLDER --workdir=DIR [--seeds=3] [--arms=NAME,NAME] [--quick]

Every run is the main command with configs/smollm2.py: one document a seed, all arms from one base. A run that was
interrupted goes on, and finished ones are not repeated, so the command may be given again at any time, on a CPU or a
GPU. Prints one row per document and arm, and one JSON object as the last line. Recorded numbers: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.tiny_worlds import run_once

ARMS = (
    "opcd", "off_policy", "opcd_warm", "opcd_warm_anchored", "opcd_warm_handover", "opcd_warm_retained",
    "opcd_warm_retention_alone",
)  # fmt: skip
METRICS = ("acc_x", "acc_xc", "harm", "obedience", "acc_unrelated", "lowest_acc_xc", "dlen", "view_kl", "distill")
QUICK = ("train.steps=2", "train.batch_size=4", "handbook.test_questions=8", "handbook.dev_questions=4", "eval.every=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or Hub id, for example of SmolLM2-135M-Instruct")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--quick", action="store_true", help="two steps, to check that it works")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    extra = [f"--config.{setting}" for setting in QUICK] if options.quick else []
    found = {}
    print("| document | arm | " + " | ".join(METRICS) + " | harm, 95 % |")
    print("|---" * (3 + len(METRICS)) + "|", flush=True)
    for seed in range(1 if options.quick else options.seeds):
        arms = tuple(options.arms.split(","))
        flags = [f"--config.seed={seed}", f"--config.model.path={options.model}", f"--config.run_arms={arms}", *extra]
        found[seed] = run_once("configs/smollm2.py", options.workdir / f"document{seed}", flags)
        for arm, row in found[seed].items():
            shown = ["-" if row.get(key) is None else f"{row[key]:.3f}" for key in METRICS]
            interval = row.get("harm_ci")
            shown.append("-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}")
            print(f"| {seed} | {arm} | {' | '.join(shown)} |", flush=True)
    print(json.dumps({seed: {arm: {key: row.get(key) for key in METRICS} for arm, row in rows.items()}
                      for seed, rows in found.items()}))  # fmt: skip


if __name__ == "__main__":
    main()
