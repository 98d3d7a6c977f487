"""Audit a run or an evaluation: ``python -m ctxjax.audit RUN [EXPORT ...]``.

Print one line for each check: OK, or WRONG with the file, the row, what was found and what was expected. The exit code
is 0 if nothing is wrong, else 1; 2 if RUN is no folder of a run. Nothing is changed, and nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import sys

from absl import logging

# Set before the Hub's client is imported: it then takes only what its cache has.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ctxjax.audit import audit  # noqa: E402
from ctxjax.host import command, preemption  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Print the checks; ``arguments`` are the command line's by default. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="ctxjax audit",
        description="Check a run against what it wrote down; change nothing.",
        epilog="example: ctxjax audit runs/tiny my-model",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of python -m ctxjax.evaluate")
    parser.add_argument("exports", type=Path, nargs="*", metavar="EXPORT", help="folders that were exported from RUN")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    wrong = []

    def run() -> None:
        for check in audit.check_folder(options.run, options.exports):
            print(check.text, flush=True)
            wrong.extend(check.wrong)
        print(f"{len(wrong)} contradictions" if wrong else "no contradiction found")

    return command.end_readably(run) or int(bool(wrong))


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
