"""Trains and evaluates: ``python -m ctxjax.main --config=configs/tiny.py --workdir=DIR [--config.field=value ...]``.

With ``--dump_batch`` it shows the first training batch, token by token, and ends.
"""

from __future__ import annotations

import os
from pathlib import Path
import shutil
import sys

from absl import flags, logging
import jax
from ml_collections import config_flags

from ctxjax import command, preemption, secrets
from ctxjax.alarms import StopRun

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration, for example configs/tiny.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results, report, metrics and checkpoints.")
_RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "never", "must"], "Whether a run that lies in the workdir goes on, may not, or must."
)
_DUMP_BATCH = flags.DEFINE_bool("dump_batch", False, "Print the first training batch and end; needs no workdir.")


def main(_) -> None:
    if _WORKDIR.value is None and not _DUMP_BATCH.value:
        raise ValueError("--workdir is missing; name a folder for results, report, metrics and checkpoints")
    if _CONFIG.value is None:
        raise ValueError("--config is missing; for example --config=configs/tiny.py")
    # Imported here, so that a mistyped flag is answered at once.
    from ctxjax import config, preview, trainer, workdir

    _quiet()
    _split_cpu(_CONFIG.value.get("cpu_devices", 0))
    experiment = config.experiment(_CONFIG.value, jax.device_count())
    if _CONFIG.value.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(_CONFIG.value.compile_cache).expanduser()))
    if _DUMP_BATCH.value:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(preview.first_batch(experiment, shutil.get_terminal_size((100, 0)).columns, colour))
        return
    folder = Path(_WORKDIR.value).expanduser()
    facts = workdir.facts(_CONFIG.value)
    workdir.check(folder, facts["config"], _RESUME.value)
    trainer.run(experiment, folder, facts)


def _quiet() -> None:
    """Leaves warnings, and drops the libraries' accounts of what they are doing, which would bury the bar, and of
    errors in their threads, which end the run with a message of their own."""
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)


def _split_cpu(count: int) -> None:
    """Makes the CPU ``count`` devices, before the first use of jax's backends; 0: the largest power of two of cores, up
    to 8. A small model is many small operations, which gain more from a core each than from threads in each one: a
    step of configs/tiny.py takes 1.5 times as long on one device of two cores. Accelerators are not affected."""
    if count < 0:
        raise ValueError(f"cpu_devices = {count} must be a number of devices, or 0 for one per core")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", count or 1 << (min(cores, 8).bit_length() - 1))


def command_line() -> None:
    """Runs the command. Bad input, a full disk or one that cannot be written to end with one readable message and exit
    code 2, without a traceback; an alarm that ends the run (config.alarms.stop) likewise, with exit code 3; SIGTERM
    with preemption.EXIT_CODE, after which the same command goes on."""
    preemption.listen()
    try:
        command.run(main, _CONFIG)
    except preemption.Preempted:
        print("\nSIGTERM: the run ends; the same command goes on", file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except StopRun as stop:
        print(f"\nstopped: {secrets.hidden(str(stop))}", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    command_line()
