"""What the commands with a ``--config`` share: reading the command line, and ending in one readable line."""

from __future__ import annotations

import atexit
from collections.abc import Callable
import ctypes
import errno
import gc
import os
from pathlib import Path
import sys

from absl import app, flags, logging
import jax
from ml_collections import ConfigDict

from ctxjax.host import processes, redact

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h; sizes in bytes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def parse(config) -> Callable[[list[str]], list[str]]:
    """A flags parser that reads ``config``, the flag holder of a configuration file; its errors are ValueErrors."""

    def parser(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            # A config file that could not be loaded says so only when something is asked of it.
            getattr(config.value, "seed", None)
        except AttributeError as error:
            if "get_config" in str(error):
                raise ValueError("the config file has no function get_config(); see configs/tiny.py") from None
            inner = error.args[0]
            name = inner.args[0] if isinstance(inner, KeyError) else inner
            raise ValueError(f"the configuration has no field {name}; configs/base.py lists them all") from None
        except OSError as error:
            raise ValueError(f"the config file cannot be loaded: {error.__cause__ or error}") from None
        except (flags.Error, TypeError, ValueError) as error:
            raise ValueError(f"bad command line: {error}") from None
        except Exception as error:  # of the config file, which is a program
            raise ValueError(f"the config file fails: {type(error).__name__}: {error}") from None
        if not isinstance(config.value, ConfigDict | None):
            raise ValueError(f"get_config() of the config file returns {config.value!r}, which is no ConfigDict")
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}; options are written --config.field=value")
        return rest

    return parser


def run(main: Callable, config) -> None:
    """Runs a command; bad input, or a disk that is full or cannot be written to, ends with one readable message and
    exit code 2, without a traceback, and the loss of another process with exit code 4."""
    _keep_memory()
    # Imports and tracing make objects by the million that live on, and Python looks through them again and again, for
    # a twentieth of the time of a small run whose programs are in the compile cache.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)  # nor when all of them go: 0.35 instead of 1.3 s at the end of such a run
    try:
        app.run(main, flags_parser=parse(config))
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if processes.is_lost_process(error):
            print(f"error: {processes.describe_lost_process(error)}", file=sys.stderr)
            processes.leave(processes.EXIT_CODE)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        no_room = isinstance(error, OSError) and error.errno in NO_ROOM
        remedy = ". Make room or mend the folder; the same command then goes on from the last checkpoint"
        print(f"error: {redact.hide_secrets(str(error))}{remedy if no_room else ''}", file=sys.stderr)
        processes.leave(2)


def folder(flag: str, name: str) -> Path:
    """The folder that a flag names. Raises ValueError for an address such as gs://bucket/run, which the file system
    does not know: as a folder it would be made on this machine, and go with it."""
    if "://" in name:
        raise ValueError(
            f"{flag}={name} is an address, and runs are written to folders; mount the bucket (gcsfuse; tpu/setup.sh "
            f"does so where BUCKET is set), and name the folder, for example {flag}=/mnt/bucket/{name.split('/')[-1]}"
        )
    return Path(name).expanduser()


def prepare(config: ConfigDict) -> None:
    """Before the first use of jax's backends: fewer accounts of the libraries, the CPU's devices, the compile cache."""
    _quiet()
    _split_cpu(config.get("cpu_devices", 0))
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).expanduser()))
        # By default some fifty programs of a run, of less than a second each, are compiled every time.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _keep_memory() -> None:
    """Has glibc keep what is freed, and all threads take from one arena, since the others hold nothing over 64 MiB.

    Else large arrays go back to the system after every step, and the next takes them anew, page by page: 44,000 pages
    and two fifths of the time in a step that trains the base of configs/tiny.py. For before the first import that
    starts threads, which have arenas. Arrays of more than 128 MiB still come and go: kept, they leave gaps that larger
    ones do not fit into. Does nothing with other C libraries, or on more than eight cores, whose threads would wait for
    each other."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and _cores() <= 8:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**27)
        mallopt(M_ARENA_MAX, 1)


def _quiet() -> None:
    """Leaves warnings, and drops the libraries' accounts of what they are doing, which would bury the bar, and of
    errors in their threads, which end the run with a message of their own."""
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    sys.unraisablehook = _unraisable


def _unraisable(event) -> None:
    """Leaves out what tensorstore's threads say, one by one, where a write has failed and nobody waits for them."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _split_cpu(count: int) -> None:
    """Makes the CPU ``count`` devices, before the first use of jax's backends; 0: the largest power of two of cores, up
    to 8. A small model is many small operations, which gain more from a core each than from threads in each one: a
    step of configs/tiny.py takes 1.5 times as long on one device of two cores. Accelerators are not affected. What
    XLA_FLAGS say holds in any case, and what JAX_NUM_CPU_DEVICES says where ``count`` is 0."""
    if count < 0:
        raise ValueError(f"cpu_devices = {count} must be a number of devices, or 0 for one per core")
    told = jax.config.jax_num_cpu_devices >= 0 and not count
    if told or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    jax.config.update("jax_num_cpu_devices", count or 1 << (min(_cores(), 8).bit_length() - 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
