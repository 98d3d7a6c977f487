"""SIGTERM, which announces that the machine will be taken away, SIGHUP, after which the terminal is gone, and Ctrl-C:
the command ends without a traceback.

While an arm trains (``training``), it finishes the step or the evaluation batch under way, saves, and ends; a second
Ctrl-C ends it at once. At other times there is nothing to save, and the handler ends the process. It runs between two
bytecodes of the main thread; jax also lets it run during a compilation, but not while it waits for a device, at most a
step or an evaluation batch.

Among several processes JAX takes SIGTERM over, and tells all of them at the same call of ``is_due`` or
``raise_if_requested``: they make the same calls, since they compute the same steps and batches.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import shutil
import signal
import stat

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # after SIGTERM and SIGHUP: sysexits.h's EX_TEMPFAIL: no error, try again
INTERRUPTED = 130  # after Ctrl-C, as shells have it
RUN_ENDS = "the run ends; the same command goes on"
COMMAND_ENDS = "the command ends; nothing half-written is left"
SAVES = "\nCtrl-C: the run saves after this step, and ends; Ctrl-C again ends it at once\n"

_is_requested = _is_training = False
_received = signal.SIGTERM  # why the command ends; SIGINT stays
_calls = 0  # of JAX, in all processes the same; it stops them at a number that none has reached
_then = COMMAND_ENDS
_unfinished: set[Path] = set()


class Preempted(BaseException):
    """End the run, with exit code ``code``. Not an Exception, so that no library catches it."""

    def __init__(self):
        super().__init__(_describe(_received))
        self.code = _choose_code(_received)


def listen(then: str = COMMAND_ENDS) -> None:
    """Handle SIGTERM, Ctrl-C and SIGHUP from now on; ``then``: what the message says of the end.

    A SIGHUP that is ignored, as after nohup, stays ignored.

    Call it from the main thread, before jax.distributed is initialized.
    """
    global _then
    _then = then
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _on_signal)


def is_due() -> bool:
    """Return whether to save and end, in all processes at the same call. Call it after every step."""
    global _is_requested, _calls
    if not _is_requested:
        _calls += 1
        if multihost_utils.reached_preemption_sync_point(_calls):
            _is_requested = True
    return _is_requested


def raise_if_requested() -> None:
    """Raise Preempted if a signal has come: for work that can be given up, as an evaluation."""
    if is_due():
        raise Preempted


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Leave it to the block to end: it calls ``is_due`` after every step, saves, and raises Preempted.

    Raises Preempted at the block's end if a signal came after the last step.
    """
    global _is_training
    _is_training = True
    try:
        yield
    finally:
        _is_training = False
    raise_if_requested()


@contextlib.contextmanager
def discarding(folder: Path) -> Iterator[None]:
    """Remove the folder if the handler ends the process during the block."""
    _unfinished.add(folder)
    try:
        yield
    finally:
        _unfinished.discard(folder)


def _on_signal(number: int, frame) -> None:
    global _is_requested, _received
    is_second = number == _received == signal.SIGINT
    if _received != signal.SIGINT:
        _received = signal.Signals(number)
    if number == signal.SIGHUP:
        _leave_terminal()
    if not _is_training or is_second:
        for folder in _unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        os.write(2, f"{_describe(number)}\n".encode())  # print() may be under way in the interrupted code
        os._exit(_choose_code(number))
    if number == signal.SIGINT:
        os.write(2, SAVES.encode())
    if number != signal.SIGTERM and jax.distributed.is_initialized():
        os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on to all processes
    else:
        _is_requested = True


def _leave_terminal() -> None:
    """Discard what is printed to a terminal from now on: it is gone, and writing to it would raise OSError."""
    with open(os.devnull, "wb") as nowhere:
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere.fileno(), output)


def _choose_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else EXIT_CODE


def _describe(number: int) -> str:
    return f"\n{'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}: {_then}"
