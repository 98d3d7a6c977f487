"""Train and evaluate (also ``python -m ctxjax.main``)::

    ctxjax train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=50

``--config.FIELD=VALUE`` sets any field of configs/base.py. A configuration is a file, or one of the package's.

With ``--dump_batch`` it prints the first training batch, token by token, and ends. Several processes train together if
all get the same command. On TPU pods and under Slurm they find each other; elsewhere add
``--coordinator=HOST:PORT --processes=N --process_id=I``.
"""

from __future__ import annotations

import os
import shutil
import sys

from absl import flags
import jax
from ml_collections import config_flags

from ctxjax.host import command, preemption, processes, progress, workdir
from ctxjax.monitoring import run_end

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration, for example configs/tiny.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results, report, metrics and checkpoints.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: the address of the first, host:port.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes that train together; 1: only this one.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
_RESUME = flags.DEFINE_enum(
    "resume",
    "auto",
    workdir.RESUME,
    "auto: resume the run in the workdir, if there is one; never: refuse it; must: refuse a workdir without a run.",
)
_DUMP_BATCH = flags.DEFINE_bool("dump_batch", False, "Print the first training batch and end; needs no workdir.")


def main(_) -> None:
    preemption.listen(preemption.RUN_ENDS)
    if _WORKDIR.value is None and not _DUMP_BATCH.value:
        raise ValueError("--workdir is missing; give a folder for results, report, metrics and checkpoints")
    if _CONFIG.value is None:
        raise ValueError("--config is missing; for example --config=configs/tiny.py")
    with progress.Bar("importing the libraries"):  # here, so that a mistyped flag is refused at once
        from ctxjax import api, config
        from ctxjax.training import preview

    place = command.parse_folder("--workdir", _WORKDIR.value or "")
    command.prepare(_CONFIG.value)
    processes.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
    if _DUMP_BATCH.value:
        processes.silence_others()
        experiment = config.experiment(_CONFIG.value, jax.device_count())
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(preview.format_first_batch(experiment, shutil.get_terminal_size((100, 0)).columns, colour))
        return
    api.start_run(_CONFIG.value, place, _RESUME.value)


def _suggest_less_memory() -> str:
    from ctxjax import config
    from ctxjax.plan import remedies

    mesh = config.experiment(_CONFIG.value, jax.device_count()).mesh
    return remedies.suggest_less_memory(_CONFIG.value, mesh.data * mesh.fsdp)


def command_line() -> None:
    """Run the command.

    Bad input, a disk that is full or read-only, and memory that does not suffice end it with one message and exit code
    2, without a traceback. An alarm that stops the run (config.alarms.stop) ends it with one message and exit code 3.
    SIGTERM ends it with preemption.EXIT_CODE, Ctrl-C with INTERRUPTED; the same command then resumes the run.
    """
    with run_end.exit_readably():
        command.run(main, _CONFIG, _suggest_less_memory)


if __name__ == "__main__":
    command_line()
