"""Start commands in processes that are forked from a server which has imported everything and used no device.

Importing takes longer than most of these tests run. Tests that begin with ``python -m`` start a Python instead.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from pathlib import Path
import runpy
import signal
import subprocess
import sys
import tempfile

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "ctxjax.training.preview",
        "ctxjax.training.run",
        "ctxjax.report.plots",
        "transformers.models.llama.configuration_llama",
    ]
)


def _run(module: str, arguments: list[str], out: Path, err: Path, folder: Path, typed: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.stdin = io.StringIO(typed)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Command:
    """A running ``python -m MODULE ARGUMENTS`` in ``folder``; it ends with the tests at the latest.

    ``err``: the file of its standard error; None: ``out``, with its standard output. ``typed``: its standard input.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        out: Path,
        err: Path | None = None,
        folder: Path = ROOT,
        typed: str = "",
    ):
        for path in {out, err or out}:
            path.write_text("")
        given = (module, arguments, out, err or out, folder, typed)
        self._process = _CONTEXT.Process(target=_run, args=given, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, minus the number of the signal that ended it, or None while the command runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """Wait for the end and return the exit code. Raises TimeoutError."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"the command has not ended within {seconds} seconds")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(
    module: str, arguments: list[str], seconds: float = 300, folder: Path = ROOT, typed: str = ""
) -> subprocess.CompletedProcess:
    """Run the command to its end; return its exit code and everything that it printed."""
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs, "out"), Path(logs, "err")
        command = Command(module, arguments, out, err, folder, typed)
        try:
            code = command.wait(seconds)
        finally:
            command.kill()
        return subprocess.CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())
