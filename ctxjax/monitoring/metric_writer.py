"""Where numbers go while a run lasts: metrics.jsonl, TensorBoard event files, the progress bar."""

from __future__ import annotations

import json
import os
from pathlib import Path
import shutil
import sys
import time

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from ctxjax.host import processes
from ctxjax.host.workdir import write_text
from ctxjax.monitoring.alarms import Alarms


class Writer:
    """Writes the metrics of one arm, those of step n-1 while step n runs, so that the device never waits.

    ``from_step``: rows of later steps, left by a run that went on after its last checkpoint, are dropped, and so is a
    line that was not finished; the event file is made anew from what remains, ``kept``. Every row, those that are kept
    too, is shown to ``alarms``, which may end the run: then, and only then, StopRun is raised.
    """

    def __init__(self, folder: Path, name: str, steps: int, from_step: int, log_every: int, alarms: Alarms):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self.kept = [row for row in _rows(path) if row["step"] <= from_step] if from_step else []
        write_text(path, "".join(_line(row) for row in self.kept))
        is_first = processes.is_first()  # the others only watch for alarms
        self._file = path.open("a", encoding="utf-8") if is_first else None
        self._events = _Events(folder / "events") if is_first else None
        for row in self.kept:
            if is_first:
                self._events.add(row)
            alarms.observe(row["step"], row, quiet=True)
        self._alarms = alarms
        self._bar = tqdm(total=steps, initial=from_step, desc=name, unit="step", disable=not is_first)
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
        self._alarms.stop_if_due(step, numbers)

    def _put(self, step: int, numbers: dict) -> None:
        if self._file is None:
            return
        row = {"step": step, "time": round(time.time(), 3)} | numbers
        self._file.write(_line(row))
        self._file.flush()
        self._events.add(row)

    def sync(self) -> None:
        """Writes everything up to the last step through to the disk: a checkpoint of that step may follow."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._events.flush()

    def pause(self) -> None:
        """Starts the clock of tokens per second anew, after something that was not training."""
        self._since = time.monotonic()

    def end_bar(self) -> None:
        """What is printed next begins on a line of its own."""
        self._bar.close()

    def close(self) -> None:
        self.flush()
        self.end_bar()
        if self._file is not None:
            self._file.close()
            self._events.close()


class _Events:
    """A TensorBoard event file in a folder of its own, without the thread of tensorboardX's writer: it would write some
    seconds later, and what goes wrong in it would go unseen."""

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, row: dict[str, float]) -> None:
        numbers = {name: value for name, value in row.items() if name not in ("step", "time") and np.isfinite(value)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.write_event(Event(step=row["step"], wall_time=row["time"], summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. A line that is no row, as a machine that stops leaves behind, is left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"warning: {path}, line {number} was not finished, and is left out", file=sys.stderr)
    return rows


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"
