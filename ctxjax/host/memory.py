"""Tune the memory of a command: glibc's allocator and Python's garbage collector. Results are the same without. And
recognise errors that say that memory does not suffice.

benchmarks/README.md says what it saves ("Memory of commands").
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
from pathlib import Path
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
KEPT_BYTES = 2**27  # larger arrays still come and go: kept, they would leave gaps that larger ones do not fit into
CONTAINER_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
MOST_CORES = 8  # with more, threads would wait for each other at the one arena


def tune_memory() -> None:
    """Call once, before imports that start threads, since a thread that runs already has its own arena."""
    keep_freed_memory()
    # Imports and traces make millions of objects that stay; Python need not look through them again and again.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)  # nor once more when the process ends


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, and take all threads' memory from one arena, since others hold at most 64 MiB.

    Otherwise large arrays return to the system after every step, and the next step takes them again page by page. Does
    nothing with another C library or on more than ``MOST_CORES`` cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and count_cores() <= MOST_CORES:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_ARENA_MAX, 1)


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device, or of the host, does not suffice."""
    is_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return is_device or isinstance(error, MemoryError)


def describe_exhaustion(error: BaseException) -> str:
    """Return the message of an error for which ``is_exhausted`` holds; the allocator's tables are left out."""
    first = str(error).strip().split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    return f"memory does not suffice ({first})"


def warn_if_too_large(size: int, what: str) -> None:
    """Warn if ``what``, ``size`` bytes on all devices together, is more than this machine's memory. Accelerators have
    memory of their own: nothing is said there."""
    limit = count_bytes()
    if jax.default_backend() == "cpu" and limit is not None and size > limit:
        print(
            f"warning: {what} need {size / 2**30:.1f} GiB, and this machine has {limit / 2**30:.1f} GiB; less need a "
            "smaller train.batch_size, more train.micro_batches, model.remat=full, an adapter (lora.rank=16)",
            file=sys.stderr,
            flush=True,
        )


def count_bytes() -> int | None:
    """Return the bytes of memory that this process may use: the machine's, or its container's if that is less. None if
    the system does not say."""
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # no container, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits, default=None)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
