"""Tune the memory of a command: glibc's allocator and Python's garbage collector. Results are the same without. And
recognise errors that say that memory does not suffice.

benchmarks/README.md says what it saves ("Memory of commands").
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os

import jax

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
KEPT_BYTES = 2**27  # larger arrays still come and go: kept, they would leave gaps that larger ones do not fit into
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


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
