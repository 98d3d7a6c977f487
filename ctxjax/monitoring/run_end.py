"""How a command that trains ends before its end: by a signal, or by an alarm."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import sys

from ctxjax.host import preemption, processes, redact
from ctxjax.monitoring.alarms import StopRun

STOPPED = 3  # exit code if an alarm stops the run (config.alarms.stop)


@contextlib.contextmanager
def exit_readably() -> Iterator[None]:
    """End the process with one message: after SIGTERM or Ctrl-C with their exit code, after StopRun with STOPPED."""
    try:
        yield
    except preemption.Preempted as ended:
        print(ended, file=sys.stderr)
        sys.exit(ended.code)
    except StopRun as stop:
        print(f"\nstopped: {redact.hide_secrets(str(stop))}", file=sys.stderr)
        processes.exit_process(STOPPED)
