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
from ctxjax.host import preemption  # noqa: E402


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
    try:
        checks = audit.check_folder(options.run, options.exports)
    except (OSError, ValueError) as error:
        print(f"ctxjax.audit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    count = 0
    for check in checks:
        print(check.text, flush=True)
        count += len(check.wrong)
    print(f"{count} contradictions" if count else "no contradiction found")
    return 1 if count else 0


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
