"""Run a study: a grid of runs, resumable, by any number of processes and machines on a shared folder::

    ctxjax study --config=configs/study.py --workdir=runs/study

The same command goes on with what is left, also at the same time in other processes. It ends, with one report in the
folder ``report``, when no cell is left; docs/study.md has the rest. Ctrl-C, or a file ``stop`` in the folder, stops it.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from ctxjax.host import command, preemption, progress


def main(config, workdir: str | None, only: str | None) -> int:
    """Run the command with the values of its flags (see ``command_line``). Return its exit code: 1 if a cell failed."""
    if workdir is None:
        raise ValueError("--workdir is missing; give a folder for the cells and the report, shared by all processes")
    command.quieten()
    with progress.Bar("importing the libraries"):
        from ctxjax.study import grid, worker
    root = command.parse_folder("--workdir", workdir)
    study = grid.Study.of(config)
    with progress.Bar("checking the configurations"):
        folder = worker.Folder(root, study, grid.check_study(study))
        folder.check()
    print(worker.format_progress(folder), flush=True)
    if only is None:
        if (root / worker.STOP).exists():
            raise ValueError(f"{root / worker.STOP} exists, which stops the study; remove it to go on")
        try:
            worker.work(folder, lambda text: print(text, flush=True))
        except worker.Stopped as stop:
            print(f"{stop}: the study stops; remove the file, and the same command goes on")
            return 0
    if only != "progress":
        from ctxjax.study import report

        print(f"report: {report.write_report(folder)}")
    return int(any(folder.state(cell) == worker.FAILED for cell in folder.costs))


def command_line() -> None:
    """Read the flags and run the command. SIGTERM ends it with preemption.EXIT_CODE, Ctrl-C with INTERRUPTED."""
    preemption.listen(preemption.RUN_ENDS)
    config = config_flags.DEFINE_config_file("config", command.find_config("configs/study.py"), "The study's tables.")
    options = (
        flags.DEFINE_string("workdir", None, "Folder of the cells and the report, shared by all processes."),
        flags.DEFINE_enum("only", None, ["progress", "report"], "Run nothing: show the progress, or write the report."),
    )
    try:
        command.run(lambda _: main(config.value, *(option.value for option in options)), config)
    except preemption.Preempted as ended:
        print(ended, file=sys.stderr)
        sys.exit(ended.code)


if __name__ == "__main__":
    command_line()
