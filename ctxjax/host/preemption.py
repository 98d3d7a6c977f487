"""SIGTERM, which announces that the machine will be taken away: the run ends with EXIT_CODE; the same command goes on.

While an arm trains (``training``), it finishes the step or the evaluation batch under way, saves, and ends. At other
times there is nothing to save, and the handler ends the process. It runs between two bytecodes of the main thread; jax
also lets it run during a compilation, but not while it waits for a device, at most a step or an evaluation batch.

Among several processes JAX takes the signal over, and ``reached`` stops all of them at the same step.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import signal

from jax.experimental import multihost_utils

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: no error, try again
MESSAGE = "\nSIGTERM: the run ends; the same command goes on"

_is_requested = _is_training = False


class Preempted(BaseException):
    """End the run; the same command goes on. Not an Exception, so that no library catches it."""


def listen() -> None:
    """Handle SIGTERM from now on. Call it once, from the main thread, before jax.distributed is initialized."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def reached(step: int) -> bool:
    """Return whether to save and end after ``step``, the same step in all processes. Call it after every step."""
    return _is_requested or multihost_utils.reached_preemption_sync_point(step)


def raise_if_requested() -> None:
    """Raise Preempted if SIGTERM has come: for work inside ``training`` that can be given up, such as an evaluation."""
    if _is_requested:
        raise Preempted


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Leave it to the block to end: it calls ``reached`` after every step, saves, and raises Preempted.

    Raises Preempted at the block's end if SIGTERM came after the last step.
    """
    global _is_training
    _is_training = True
    try:
        yield
    finally:
        _is_training = False
    raise_if_requested()


def _on_sigterm(number, frame) -> None:
    global _is_requested
    _is_requested = True
    if not _is_training:
        os.write(2, f"{MESSAGE}\n".encode())  # print() may be under way in the code that the signal interrupted
        os._exit(EXIT_CODE)
