"""Race on a real model: a whole on-policy step, its parts and the memory, next to transformers and TRL.

    python -m benchmarks.race --model=FOLDER [--contexts=0,1024] [--batch=16] [--new=24] [--steps=3] [--quick]

The rows are those of configs/smollm2.py: questions about a document of ``--contexts`` tokens (0: the facts alone, some
190), sampled at temperature 1 to at most ``--new`` tokens, all weights trained in float32 with AdamW.

ctxjax        the program of a training step, plain and anchored, and its two halves alone
transformers  the same in PyTorch, written out: ``generate`` without the document, the teacher's pass with it, the
              student's pass, reverse KL over the whole vocabulary on the response's tokens, backward, AdamW
trl           experimental.sdft.SDFTTrainer with the whole vocabulary, alpha 1 (reverse KL) and a frozen teacher

Each runs alone in a process of its own; peak memory is the process's. The first step is not counted (``first``:
seconds to its end from the start of the process, imports and compiling included, without a compilation cache). The
others' median counts. Responses end where they end, so ``tokens`` says what was sampled per step. A contestant that is
not installed is left out. Prints a table, and one JSON object as the last line. Recorded numbers: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
import subprocess
import sys
import tempfile

CONTESTANTS = {"ctxjax": "jax", "transformers": "torch", "trl": "trl"}  # name -> the package that it needs
COLUMNS = ("rollout", "update", "step", "anchored", "tokens", "first", "peak_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, for example of SmolLM2-135M-Instruct")
    parser.add_argument("--contexts", default="0,1024", help="tokens of the document, several with commas")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3, help="counted steps")
    parser.add_argument("--only", default=",".join(CONTESTANTS))
    parser.add_argument("--quick", action="store_true", help="one counted step of two rows, to check that it works")
    options = parser.parse_args()
    if options.quick:
        options.contexts, options.batch, options.steps = "0", 2, 1
    found = [name for name in options.only.split(",") if importlib.util.find_spec(CONTESTANTS[name])]
    results = {}
    print(
        "| document | " + " | ".join(("contestant", *COLUMNS)) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|", flush=True
    )
    for context in options.contexts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            task = vars(options) | {"context": int(context), "rows": str(Path(folder) / "rows.json")}
            for name in ["rows", *found]:  # first the rows, which all contestants read
                module = "benchmarks.race_ctxjax" if name == "rows" else f"benchmarks.race_{name}"
                command = [sys.executable, "-m", module, json.dumps(task | {"writes_rows": name == "rows"})]
                ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if ended.returncode:
                    raise SystemExit(f"{' '.join(command)} failed with exit code {ended.returncode}")
                if name == "rows":
                    continue
                row = results.setdefault(context, {})[name] = json.loads(ended.stdout.strip().split("\n")[-1])
                cells = ["-" if row.get(column) is None else f"{row[column]:.3g}" for column in COLUMNS]
                print(f"| {row['document_tokens']} | {name} | {' | '.join(cells)} |", flush=True)
    print(json.dumps({"benchmark": "race", "batch": options.batch, "new": options.new, "documents": results}))


if __name__ == "__main__":
    main()
