"""Commands in processes of their own, forked off one that has imported everything and used no device.

A command imports for longer than most tests of it run. Tests of the whole way, from ``python -m`` on, start a Python.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile

import jax

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


def _run(module: str, arguments: list[str], out: Path, err: Path, settings: dict) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.chdir(ROOT)
    for name, value in settings.items():
        jax.config.update(name, value)
    sys.argv = [module, *arguments]
    importlib.import_module(module).command_line()


class Command:
    """``python -m MODULE ARGUMENTS`` in the project's folder, which is going on, and is ended with the tests at last.

    ``err``: where its standard error goes if not to ``out``; ``settings``: of jax, by name, as its environment
    variables would set them.
    """

    def __init__(self, module: str, arguments: list[str], out: Path, err: Path | None = None, **settings):
        for path in {out, err or out}:
            path.write_text("")
        self._process = _CONTEXT.Process(target=_run, args=(module, arguments, out, err or out, settings), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it is going on."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """The exit code, once it has ended. Raises TimeoutError."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"the command has not ended within {seconds} seconds")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(module: str, arguments: list[str], seconds: float = 300) -> subprocess.CompletedProcess:
    """The command, when it has ended, with all that it has printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = Command(module, arguments, out, err)
        try:
            code = command.wait(seconds)
        finally:
            command.kill()
        return subprocess.CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())
