"""Write the metrics of a run: metrics.jsonl, TensorBoard event files, the progress bar."""

from __future__ import annotations

from pathlib import Path
import shutil
import time

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from ctxjax.host import processes, progress
from ctxjax.monitoring.alarms import Alarms
from ctxjax.monitoring.step_rows import StepRows
from ctxjax.monitoring.trackers import Trackers


class Writer:
    """Write the metrics of one arm: those of step n-1 while step n runs, so that the device never waits.

    ``from_step``: the step of the checkpoint from which the run resumes, 0 for a new run. Rows of later steps and
    unfinished lines are dropped; the other rows are ``kept``, and the event file is rewritten from them. ``alarms``
    observe every new row and replay the kept ones. ``trackers`` get every new row. Methods that write raise StopRun if
    an alarm ends the run.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        from_step: int,
        log_every: int,
        alarms: Alarms,
        trackers: Trackers,
    ):
        self._rows = StepRows(folder / "metrics.jsonl", from_step)
        self.kept = self._rows.kept
        is_first = processes.is_first()  # the other processes only watch for alarms
        self._events = _Events(folder / "events") if is_first else None
        for row in self.kept:
            if is_first:
                self._events.add(row)
            alarms.replay(row["step"], row)
        self._alarms, self._trackers = alarms, trackers
        self._name, self._steps, self._from_step, self._bar = name, steps, from_step, None
        self._log_every, self._pending, self._since = log_every, None, time.monotonic()

    def begin(self) -> None:
        """Open the progress bar: the first step begins."""
        self._bar = progress.Bar(self._name, self._steps, initial=self._from_step)
        self.pause()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step that may still be running, and write those of the step before."""
        pending, self._pending = self._pending, (step, metrics)
        if pending is not None:
            self._write_step(*pending)

    def flush(self) -> None:
        """Wait for the last step and write its metrics."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write_step(*pending)

    def _write_step(self, step: int, device_metrics: dict[str, jax.Array]) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        now = time.monotonic()
        metrics["tokens_per_second"] = metrics["response_tokens"] / max(now - self._since, 1e-9)
        self._since = now
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
            self._bar.update()
        self.write(step, metrics, is_due=step % self._log_every == 0)

    def write(self, step: int, metrics: dict, is_due: bool = True) -> None:
        """Write one row now if it is due or an alarm holds in it. Values that are not numbers are left out."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        numbers |= self._alarms.observe(step, numbers)
        if is_due or any(name.startswith("alarm/") for name in numbers):
            self._append(step, numbers)
        self._alarms.stop_if_due(step, numbers)

    def _append(self, step: int, numbers: dict) -> None:
        if self._events is None:
            return
        row = {"step": step, "time": round(time.time(), 3)} | numbers
        self._rows.append(row)
        self._events.add(row)
        self._trackers.log(row)

    def sync(self) -> None:
        """Write everything up to the last step to the disk, since a checkpoint of that step may follow."""
        self.flush()
        self._rows.sync()
        if self._events is not None:
            self._events.flush()

    def pause(self) -> None:
        """Restart the clock of tokens per second, after something that was not training."""
        self._since = time.monotonic()

    def end_bar(self) -> None:
        """Close the progress bar, so that the next print starts on its own line."""
        if self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        self.flush()
        self.end_bar()
        self._rows.close()
        if self._events is not None:
            self._events.close()


class _Events:
    """A new TensorBoard event file in its own folder.

    tensorboardX's SummaryWriter writes in a thread, which a full disk ends, and the run then waits for it for ever
    (benchmarks/README.md); this is the writer inside it.
    """

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)  # a network file system keeps files that are still open
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, row: dict[str, float]) -> None:
        numbers = {name: value for name, value in row.items() if name not in ("step", "time") and np.isfinite(value)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.write_event(Event(step=row["step"], wall_time=row["time"], summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
