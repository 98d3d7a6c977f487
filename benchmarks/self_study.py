"""Measure what a real model learns of a document from questions that it has written itself, against given questions.

    python -m benchmarks.self_study --model=FOLDER --workdir=DIR [--seed=0] [--quick]

Two runs of the main command with configs/smollm2.py, of the same document, model, arm and number of steps. ``given``
trains on the 216 questions of task handbook, ``written`` on those of task self_study, which the model writes about the
document. Both students answer the 192 test questions of handbook, whose wordings neither has seen; the written one is
exported and evaluated for it. What was interrupted goes on, and what is finished is not repeated, so the command may be
given again at any time. Prints one row per arm, and one JSON object as the last line. Recorded numbers:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import subprocess
import sys

from benchmarks.tiny_worlds import run_once
from ctxjax.data.tasks.handbook import Handbook, HandbookConfig

CONFIG, ARM = "configs/smollm2.py:handbook", "opcd_warm"
METRICS = ("acc_x", "acc_xc", "harm")
WRITTEN = 300  # SmolLM2 leaves 212, of which 143 are for training
QUICK = ("train.steps=2", "train.batch_size=4", "handbook.test_questions=8", "handbook.dev_questions=4")


def run_step(module: str, log: Path, *flags: str) -> None:
    """Run a command of ctxjax with its output in ``log``; end the benchmark if it fails."""
    command = [sys.executable, "-m", module, *flags]
    with log.open("a") as output:
        code = subprocess.run(command, stdout=output, stderr=output).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}; see {log}")


def measure_given(options: argparse.Namespace, flags: list[str]) -> dict[str, dict]:
    """Return the results of the base and of the student that was trained on the given questions."""
    results = run_once(CONFIG, options.workdir / "given", flags)
    return {"base": results["base"], "given": results[ARM]}


def measure_written(options: argparse.Namespace, flags: list[str]) -> dict:
    """Return the results on the given test questions of the student that was trained on its own."""
    workdir, names = options.workdir, ("train_questions", "dev_questions", "test_questions", "style", "subject")
    document, run, model, evaluation = (workdir / name for name in ("document.txt", "written", "model", "evaluation"))
    known = dict.fromkeys(names[:3], 0) | {"style": "list", "subject": "place"}
    document.write_text(Handbook(HandbookConfig(seed=options.seed, tokens=0, **known)).context, encoding="utf-8")
    own = {
        "task": "self_study", "self_study.context_file": document, "self_study.cache": workdir,
        "self_study.questions": 60 if options.quick else WRITTEN, "self_study.longest_reference": 64,
        "self_study.dev_questions": 4, "self_study.test_questions": 16,
    }  # fmt: skip
    results = run_once(CONFIG, run, [*flags, *(f"--config.{name}={value}" for name, value in own.items())])
    log = workdir / "written.log"
    if not model.exists():
        run_step("ctxjax.export", log, f"--workdir={run}", f"--arm={ARM}", f"--out={model}")
    if not evaluation.exists():
        flags = [flag for flag in flags if not flag.startswith("--config.model.path")]
        run_step("ctxjax.evaluate", log, f"--config={CONFIG}", f"--model={model}", f"--out={evaluation}", *flags)
    (path,) = json.loads((run / "run.json").read_text())["task"]["data"]
    rows = [json.loads(line) for line in Path(path).open(encoding="utf-8")]
    parts = {row["about"] for row in rows if row["about"] in document.read_text(encoding="utf-8")}
    counts = {"questions": len(rows), "parts": len(parts), "agreement": results[ARM]["acc_x"]}
    return json.loads((evaluation / "results.json").read_text())["model"] | counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or Hub id, for example of SmolLM2-135M-Instruct")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the document and of the run")
    parser.add_argument("--quick", action="store_true", help="two steps, to check that it works")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    settings = [f"seed={options.seed}", f"model.path={options.model}", f"run_arms=('{ARM}',)", "eval.every=0"]
    settings += ["eval.views=()", *(QUICK if options.quick else ())]
    flags = [f"--config.{setting}" for setting in settings]
    found = measure_given(options, flags)
    found["written"] = measure_written(options, flags)
    print("| trained on | " + " | ".join(METRICS) + " | Acc_x, 95 % |")
    print("|---" * (2 + len(METRICS)) + "|")
    for name, row in found.items():
        shown = ["-" if row.get(key) is None else f"{row[key]:.3f}" for key in METRICS]
        interval = " to ".join(f"{bound:.3f}" for bound in row["acc_x_ci"])
        print(f"| {name} | {' | '.join(shown)} | {interval} |")
    kept = (*METRICS, "acc_x_ci", "questions", "parts", "agreement")
    print(json.dumps({name: {key: row[key] for key in kept if key in row} for name, row in found.items()}))


if __name__ == "__main__":
    main()
