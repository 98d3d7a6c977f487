"""SIGTERM, which announces that the machine is about to be taken away: a run ends where it can go on from.

While steps are trained, the step that is running is finished and saved. Everywhere else, where nothing would be lost
but what is done again in the same way, the run ends at once; so it does where the main thread hangs in one long call,
a compilation for instance. The exit code is EXIT_CODE in all cases, and the same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: no error, try again
PATIENCE = 2.0  # seconds that the main thread has to end by itself, where it has nothing to save

_requested = _held = _interruptible = False


class Preempted(BaseException):
    """The run ends now, and the same command goes on with it. No Exception, so that no library takes it for its own."""


class Interrupted(BaseException):
    """A block that may be given up, see ``interruptible``, was; what surrounds it goes on, and saves."""


def listen() -> None:
    """From now on SIGTERM is heard. Call it from the main thread, once in a process that does not train together with
    others: where there are others, jax listens, and lets all of them know."""
    heard, signals = os.pipe()
    os.set_blocking(signals, False)
    signal.signal(signal.SIGTERM, _on_sigterm)
    # Python runs handlers between two instructions of the main thread only; this pipe is written to at once.
    signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard,), daemon=True, name="preemption").start()


def reached(step: int) -> bool:
    """Whether to save and to end after ``step``, which is the same step in all processes. Call it at every step."""
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else _requested


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A block that looks at ``reached`` itself, and saves: SIGTERM does not end it. Raises Preempted at its begin where
    the signal has come already."""
    global _held
    if _requested:
        raise Preempted
    _held = True
    try:
        yield
    finally:
        _held = False


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block in a held one that may be given up, since it changes nothing: SIGTERM raises Interrupted in it."""
    global _interruptible
    if _requested:
        raise Interrupted
    _interruptible = True
    try:
        yield
    finally:
        _interruptible = False


def _on_sigterm(number, frame) -> None:
    global _requested
    _requested = True
    if not _held:
        raise Preempted
    if _interruptible:
        raise Interrupted


def _watch(heard: int) -> None:
    """Ends a process whose main thread does not come to run the handler above, once nothing is held."""
    while signal.SIGTERM not in os.read(heard, 64):
        pass
    time.sleep(PATIENCE)
    while _held:
        time.sleep(PATIENCE)
    print("\nSIGTERM: the run ends; the same command goes on", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
