"""The record of an extraction, one JSON object a line: what is in it is not computed again."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path


class Journal:
    """A file of lines ``{"step": NAME, ...}``, each the result of one step; it only grows.

    A resumed run takes the same steps in the same order, so the file ends up the same, bit for bit. A line that was cut
    off when the run was killed is removed. Raises ValueError if another line cannot be read, or if the steps differ.
    """

    def __init__(self, path: Path):
        self._path, self._stored = path, []
        if not path.exists():
            return
        *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            os.truncate(path, sum(len(line) + 1 for line in lines))
        for number, line in enumerate(lines, 1):
            try:
                self._stored.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON ({error}); choose another folder") from None
        self._stored.reverse()  # the next one is the last

    def do(self, step: str, compute: Callable[[], dict]) -> dict:
        """Return the result of a step: the stored one, or else that of ``compute``, which is then stored."""
        if not self._stored:
            line = json.dumps({"step": step} | compute(), ensure_ascii=False)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            return json.loads(line)
        found = self._stored.pop()
        if found.get("step") != step:
            raise ValueError(
                f"{self._path} has step {found.get('step')!r} where {step!r} is due; choose another folder"
            )
        return found
