"""A JSONL file of a run with rows of steps, which a resumed run goes on with from its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
import sys

from ctxjax.host import processes
from ctxjax.host.workdir import write_text


class StepRows:
    """Append rows, dicts with a "step", to a file. Only the first process writes.

    ``from_step``: the step of the checkpoint from which the run resumes, 0 for a new run. Rows of later steps and
    unfinished lines are dropped; the other rows are ``kept``.
    """

    def __init__(self, path: Path, from_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [row for row in _read_rows(path) if row["step"] <= from_step] if from_step else []
        write_text(path, "".join(_format(row) for row in self.kept))
        self._file = path.open("a", encoding="utf-8") if processes.is_first() else None

    def append(self, row: dict) -> None:
        if self._file is not None:
            self._file.write(_format(row))
            self._file.flush()

    def sync(self) -> None:
        """Write all rows to the disk, since a checkpoint of their step may follow."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _read_rows(path: Path) -> list[dict]:
    """Read the rows of a file. A line that a killed run did not finish is left out, with a warning."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"warning: {path}, line {number} was not finished and is left out", file=sys.stderr)
    return rows


def _format(row: dict) -> str:
    return json.dumps(row) + "\n"
