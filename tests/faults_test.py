"""A run whose disk becomes full or read-only: the command ends with one message, and the same command resumes it."""

import json
from pathlib import Path
import subprocess
import time

from forked import Command
import pytest

from ctxjax.training.checkpoint import saved_steps

pytestmark = pytest.mark.slow

STEPS = 20
SETTINGS = {
    "cpu_devices": 1, "base.steps": 1, "base.warmup_steps": 1, "base.width": 16, "base.layers": 1,
    "base.query_heads": 2, "base.kv_heads": 1, "base.head_dim": 8, "base.mlp_width": 16, "base.batch_size": 8,
    "train.steps": STEPS, "train.batch_size": 8, "train.save_every": 1, "train.log_every": 1, "eval.every": 0,
    "eval.batch_size": 8, "eval.bootstrap": 10, "optim.warmup_steps": 1, "rules.train_questions": 64,
    "rules.dev_questions": 8, "rules.test_questions": 8, "run_arms": "('opcd',)",
}  # fmt: skip


@pytest.fixture
def disk(mounted):
    return mounted(megabytes=8)


class Run:
    """A run in ``workdir``, in a process of its own."""

    def __init__(self, workdir: Path, cache: Path, log: Path):
        settings = SETTINGS | {"base.cache": cache, "compile_cache": cache / "xla"}
        line = ["--config=configs/tiny.py", f"--workdir={workdir}"]
        line += [f"--config.{name}={value}" for name, value in settings.items()]
        self._log = log
        self.process = Command("ctxjax.main", line, log)

    def wait(self, seconds: float = 300) -> tuple[int, str]:
        """Wait for the end. Return (exit code, everything that it printed)."""
        try:
            return self.process.wait(seconds), self._log.read_text()
        finally:
            self.process.kill()


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(bytes(4096)):
            pass


def get_error(code: int, output: str) -> str:
    """Return the one message of a command that ended because of its disk."""
    assert code == 2 and "Traceback" not in output, output
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return message


def test_a_run_resumes_after_a_full_and_after_a_read_only_disk(disk, tmp_path):
    workdir, cache, checkpoints = disk / "run", tmp_path / "cache", disk / "run" / "opcd" / "checkpoints"
    run = Run(workdir, cache, tmp_path / "full.log")
    end = time.monotonic() + 300
    while not saved_steps(checkpoints):
        assert time.monotonic() < end and run.process.poll() is None, run.wait(1)
        time.sleep(0.02)
    fill(disk / "filler")
    message = get_error(*run.wait(60))
    assert "No space left on device" in message or "could not be written" in message, message
    assert "ake room" in message and "same command" in message, message
    last = saved_steps(checkpoints)[-1]

    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    message = get_error(*Run(workdir, cache, tmp_path / "read_only.log").wait())
    assert "Read-only file system" in message and str(workdir) in message, message

    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    (disk / "filler").unlink()
    code, output = Run(workdir, cache, tmp_path / "again.log").wait()
    assert code == 0 and f"opcd: continues from the checkpoint of step {last}" in output, output
    steps = [json.loads(line)["step"] for line in (workdir / "opcd" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS + 1)) and saved_steps(checkpoints)[-1] == STEPS
