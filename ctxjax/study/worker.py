"""Take cells of a study and run them, one after the other, until none is left that this process could take.

A cell's folder has its config.json, log.txt, the run's folder ``run``, the claim of the process that works on it, and
record.json if its run is finished or failed.json if it has failed. What a cell is follows from these files alone, so
any process can end at any time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
import subprocess
import sys
import time
from typing import NamedTuple

from ctxjax.evaluation.select import parse_select
from ctxjax.host import claim as claim_lib, preemption, workdir as workdir_lib
from ctxjax.host.claim import Claim
from ctxjax.study import grid
from ctxjax.study.grid import Cell, Study
from ctxjax.study.record import RECORD, Record, read_record, write_record

COMMAND = (sys.executable, "-m", "ctxjax.main")  # what runs a cell
POLL, BEAT = 1.0, 30.0  # seconds between looks at a run, and between beats of its claim
DONE, FAILED, RUNNING, WAITING, BLOCKED = "done", "failed", "running", "waiting", "blocked"  # states of a cell
STOP = "stop"  # the file in a study's folder that stops all of its processes


class Stopped(Exception):
    """The stop file has appeared."""


class Folder:
    """The folder of a study: where its cells are, and what became of them."""

    def __init__(self, root: Path, study: Study, costs: dict[Cell, float]):
        self.root, self.study, self.costs = root, study, costs

    def of(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.name

    def run_of(self, cell: Cell) -> Path:
        return self.of(cell) / "run"

    def state(self, cell: Cell) -> str:
        """Return DONE, FAILED, RUNNING, WAITING, or BLOCKED: rates are not chosen yet, or cannot be."""
        folder = self.of(cell)
        if _is_finished(folder):
            return DONE
        if (folder / "failed.json").exists():
            return FAILED
        if claim_lib.find_holder(folder) is not None or _is_in_use(self.run_of(cell)):
            return RUNNING
        return WAITING if cell.phase == grid.RATE or self.is_rated(cell.configuration) else BLOCKED

    def record(self, cell: Cell) -> Record:
        """Return what is kept of a finished run."""
        return read_record(self.of(cell))

    def is_rated(self, configuration: str) -> bool:
        """Whether the first phase that chooses a configuration's rates is done."""
        return all(self.state(cell) == DONE for cell in grid.first_cells(self.study, configuration))

    def rates(self, configuration: str) -> dict[str, float]:
        """Return the rate of every arm. Call it when the configuration is rated."""
        runs = {cell: self.record(cell).models for cell in grid.first_cells(self.study, configuration)}

        def score(cell: Cell, name: str) -> tuple[float, ...]:
            last = runs[cell][name].dev
            chosen = map(parse_select, self.study.select)
            return tuple(sign * last.get(f"dev/{key}", math.nan) for key, sign in chosen)

        return grid.choose_rates(self.study, configuration, score)

    def write_config(self, cell: Cell) -> Path:
        """Write the configuration of a cell's run; return its path.

        Raises ValueError if the cell was begun with another one.
        """
        rates = self.rates(cell.configuration) if cell.phase == grid.FINAL else None
        path, config = self.of(cell) / "config.json", json.loads(grid.make_config(self.study, cell, rates).to_json())
        if path.exists():
            workdir_lib.check_workdir(path.parent, config)
        workdir_lib.write_json(path, config)
        return path

    def check(self) -> None:
        """Raise ValueError if a cell that has begun was begun with another configuration."""
        for cell in self.costs:
            if (self.of(cell) / "config.json").exists() and self.state(cell) != BLOCKED:
                self.write_config(cell)


class Outcome(NamedTuple):
    """How the work on a cell ended: its state, and what a person is to read."""

    state: str
    message: str


def work(folder: Folder, show=print) -> None:
    """Run cells, the cheapest first, until all are done, failed or blocked, or other processes work on the last ones.

    Raises Stopped if the stop file appears, and Preempted if a signal asks for the end; the run under way then saves.
    """
    with preemption.training():
        while True:
            _record_finished(folder)
            states = {cell: folder.state(cell) for cell in folder.costs}
            waiting = sorted((c for c, state in states.items() if state == WAITING), key=folder.costs.get)
            taken = next(filter(None, (_take(folder, cell) for cell in waiting)), None)
            if taken is None:
                if RUNNING not in states.values() and not waiting:
                    return
                _pause(folder, BEAT)
                continue
            cell, claim = taken
            show(f"{cell.name} begins")
            clock = time.monotonic()
            try:
                outcome = _run(folder, cell, claim)
            finally:
                claim.release()
            show(f"{cell.name} {outcome.state} after {(time.monotonic() - clock) / 60:.1f} min. {outcome.message}")
            show(format_progress(folder))


def _record_finished(folder: Folder) -> None:
    """Write the record of runs that have ended after the process that had started them."""
    for cell in folder.costs:
        own = folder.of(cell)
        if _is_finished(own) and not (own / RECORD).exists() and (claim := Claim.take(own)):
            try:
                write_record(own)
            finally:
                claim.release()


def _take(folder: Folder, cell: Cell) -> tuple[Cell, Claim] | None:
    """Claim a cell; None if another process was faster."""
    claim = Claim.take(folder.of(cell))
    if claim is None:
        return None
    own = folder.of(cell)
    if _is_finished(own) or (own / "failed.json").exists() or _is_in_use(folder.run_of(cell)):
        claim.release()
        return None
    return cell, claim


def _run(folder: Folder, cell: Cell, claim: Claim) -> Outcome:
    """Run a cell, or go on with it, and wait for its end."""
    config, log = folder.write_config(cell), folder.of(cell) / "log.txt"
    line = [*COMMAND, f"--config={config}", f"--workdir={folder.run_of(cell)}"]
    with log.open("a", encoding="utf-8") as output:
        run = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT)
        try:
            claim.lend(run.pid)  # if this process is killed, the run goes on, at first without a lock
            beaten = time.monotonic()
            while run.poll() is None:
                _pause(folder, POLL)
                if time.monotonic() - beaten > BEAT:
                    beaten = time.monotonic()
                    if not claim.beat():
                        return Outcome(RUNNING, "Another process has taken it over, since this one was silent.")
        finally:
            if run.poll() is None:
                run.terminate()  # it saves, and ends
                run.wait()
    if run.returncode in (preemption.EXIT_CODE, preemption.INTERRUPTED):
        return Outcome(WAITING, "Its run was asked to end, and goes on later.")
    if run.returncode == 0:
        write_record(folder.of(cell))
        return Outcome(DONE, "")
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    workdir_lib.write_json(folder.of(cell) / "failed.json", {"exit_code": run.returncode, "last_line": last})
    return Outcome(FAILED, f"Exit code {run.returncode}; see {log}. To try again, remove failed.json next to it.")


def _pause(folder: Folder, seconds: float) -> None:
    """Wait, but not after a signal or the stop file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        preemption.raise_if_requested()
        if (folder.root / STOP).exists():
            raise Stopped(f"{folder.root / STOP} exists")
        time.sleep(min(POLL, seconds))


def _is_finished(cell: Path) -> bool:
    return (cell / RECORD).exists() or (cell / "run" / "results.json").exists()


def _is_in_use(run: Path) -> bool:
    """Whether a run goes on there, for example one whose study was killed."""
    if not (run / "lock").exists():
        return False
    try:
        with workdir_lib.Lock(run) as lock:
            lock.take()
    except ValueError:
        return True
    return False


def format_progress(folder: Folder) -> str:
    """Return the table of all cells: a row for each configuration, the states of its cells by phase."""
    phases = list(dict.fromkeys(cell.phase for cell in folder.costs))
    lines = ["| configuration | " + " | ".join(phases) + " |", "|---" * (1 + len(phases)) + "|"]
    counts = dict.fromkeys((DONE, FAILED, RUNNING, WAITING, BLOCKED), 0)
    for configuration in folder.study.configurations:
        own = {cell: folder.state(cell) for cell in folder.costs if cell.configuration == configuration}
        for state in own.values():
            counts[state] += 1
        parts = {
            phase: ", ".join(f"{cell.seed} {state}" for cell, state in own.items() if cell.phase == phase)
            for phase in phases
        }
        if configuration in folder.study.rates_of and grid.RATE in phases:
            parts[grid.RATE] = f"as {folder.study.rates_of[configuration]}"
        lines.append(f"| {configuration} | " + " | ".join(parts.values()) + " |")
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items() if count)])
