"""Read the files of a run. Only results.json is required; everything else may be missing."""

from __future__ import annotations

import dataclasses
import json
import pathlib


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files that a run wrote.

    ``results``: metrics by arm, in the file's order. ``run``: configuration, versions, device and times; {} if run.json
    is missing. ``metrics`` and ``items``: by arm, the rows of metrics.jsonl and of items.jsonl, in the files' order;
    [] if the file is missing.
    """

    results: dict[str, dict]
    run: dict
    metrics: dict[str, list[dict]]
    items: dict[str, list[dict]]


def read_results(workdir: pathlib.Path) -> dict[str, dict]:
    """Read ``workdir/results.json``.

    Raises FileNotFoundError, with the path and the remedy, if there is no such file, and ValueError if it is not a JSON
    object with one object for each arm.
    """
    path = pathlib.Path(workdir) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: pass the working directory of a run whose evaluation has finished, "
            "or evaluate the run first"
        )
    results = _expect_object(_read_json(path), str(path))
    if not results:
        raise ValueError(f"{path} holds no arm: evaluate at least one")
    for arm in results:
        if pathlib.PurePath(arm).name != arm or arm == "..":  # an arm's name is that of a folder of the run
            raise ValueError(f"{path}: {arm!r} is no name of an arm")
    return {arm: _expect_object(row, f"{path}, arm {arm!r}") for arm, row in results.items()}


def read_run(workdir: pathlib.Path) -> RunFiles:
    """Read the folder of a run.

    Raises FileNotFoundError if results.json is missing, and ValueError, with the file and the line, if a file cannot be
    read.
    """
    workdir = pathlib.Path(workdir)
    results = read_results(workdir)
    run_path = workdir / "run.json"
    run = _expect_object(_read_json(run_path), str(run_path)) if run_path.is_file() else {}
    return RunFiles(
        results=results,
        run=run,
        metrics={arm: _read_rows(workdir / arm / "metrics.jsonl") for arm in results},
        items={arm: _read_rows(workdir / arm / "items.jsonl") for arm in results},
    )


def _read_json(path: pathlib.Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _expect_object(value: object, where: str) -> dict:
    if isinstance(value, dict):
        return value
    raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")


def _read_rows(path: pathlib.Path) -> list[dict]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            # A job that was stopped while writing leaves half a line, and only at the end.
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
        rows.append(_expect_object(row, f"{path}, line {number}"))
    return rows
