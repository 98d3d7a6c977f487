"""Where numbers go while a run lasts: metrics.jsonl, TensorBoard event files, the progress bar."""

from __future__ import annotations

import json
from pathlib import Path
import time

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ctxjax.alarms import Alarms


class Writer:
    """Writes the metrics of one arm, those of step n-1 while step n runs, so that the device never waits.

    ``from_step``: rows of later steps, left by a run that went on after its last checkpoint, are dropped. Every row,
    those that are kept too, is shown to ``alarms``, which may end the run: then, and only then, StopRun is raised.
    """

    def __init__(self, folder: Path, name: str, steps: int, from_step: int, log_every: int, alarms: Alarms):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= from_step] if from_step else []
        path.write_text("".join(f"{line}\n" for line in kept))
        for row in map(json.loads, kept):
            alarms.observe(row["step"], row, quiet=True)
        self._alarms = alarms
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "events"), purge_step=from_step + 1 if from_step else None)
        self._bar = tqdm(total=steps, initial=from_step, desc=name, unit="step")
        self._log_every, self._pending, self._tokens, self._since = log_every, None, 0.0, time.monotonic()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Hands over the metrics of a step that may still be running; writes those handed over before."""
        pending, self._pending = self._pending, (step, metrics)
        if pending is not None:
            self._write_step(*pending)

    def flush(self) -> None:
        """Writes the last step's metrics; waits for it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write_step(*pending)

    def _write_step(self, step: int, device_metrics: dict[str, jax.Array]) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        now = time.monotonic()
        metrics["tokens_per_second"] = metrics["response_tokens"] / max(now - self._since, 1e-9)
        self._since = now
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
        self.write(step, metrics, is_due=step % self._log_every == 0)

    def write(self, step: int, metrics: dict, is_due: bool = True) -> None:
        """One row, now, if it is due or an alarm holds in it. Values that are not numbers are left out."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        numbers |= self._alarms.observe(step, numbers)
        if is_due or any(name.startswith("alarm/") for name in numbers):
            self._put(step, numbers)
        self._alarms.check(step, numbers)

    def _put(self, step: int, numbers: dict) -> None:
        self._file.write(json.dumps({"step": step} | numbers) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            if np.isfinite(value):
                self._events.add_scalar(name, value, step)

    def pause(self) -> None:
        """Starts the clock of tokens per second anew, after something that was not training."""
        self._since = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._bar.close()
        self._file.close()
        self._events.close()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
