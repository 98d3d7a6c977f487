"""Rebuild the page of a finished run: ``python -m ctxjax.report --workdir=DIR``."""

from __future__ import annotations

import argparse
import pathlib
import sys

from ctxjax.host import command, preemption, progress
from ctxjax.report import results_table, write_report
from ctxjax.report.run_files import read_results


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the path of the page; ``arguments`` are the command line's by default.

    Returns 0, or 2 after one line on stderr if the run's files are missing or cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="ctxjax report",
        description="Rebuild the page of a finished run.",
        epilog="example: ctxjax report --workdir=runs/tiny",
    )
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, metavar="DIR", help="folder that holds results.json"
    )
    workdir = parser.parse_args(arguments).workdir

    def run() -> None:
        results = read_results(workdir)
        with progress.Bar("drawing the report"):
            path = write_report(workdir)
        print(results_table(results))
        print(path)

    return command.end_readably(run)


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
