"""What a study keeps of a finished run, in record.json of its cell: all that rates, report and table of runs need.

The run's folder, with its weights and texts, may then be removed; and a study goes on elsewhere with its cells'
config.json and record.json alone.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctxjax.evaluation.evaluator import collect_outcomes
from ctxjax.evaluation.outcomes import Outcomes
from ctxjax.host import workdir as workdir_lib
from ctxjax.report.formatting import mean_over_layers
from ctxjax.report.run_files import read_run

RECORD = "record.json"
FACTS = ("commit", "device", "started")  # of run.json
LARGE = ("obedience_by_context",)  # what is not kept of a row of results.json: the outcomes have it
# Means over layers, one value of a run, and what it may be: its questions are not kept.
VALUES = {
    "cosine_by_layer": (-1.0, 1.0), "cosine_control_by_layer": (-1.0, 1.0),
    "cka_by_layer": (0.0, 1.0), "cka_control_by_layer": (0.0, 1.0),
}  # fmt: skip
_BITS = ("correct", "parsed", "truncated")


class ModelRecord(NamedTuple):
    """One model of a run. ``row``: its row of results.json, without LARGE. ``dev``: the last row of its metrics.jsonl,
    {} for none. ``views``: its outcomes on test; other contexts and groups have numbers in place of their texts."""

    row: dict
    dev: dict[str, float]
    views: Mapping[str, Outcomes]

    @property
    def values(self) -> dict[str, float]:
        """The VALUES that it has."""
        means = {key: mean_over_layers(self.row.get(key)) for key in VALUES}
        return {key: value for key, value in means.items() if value is not None}


class Record(NamedTuple):
    """``facts``: FACTS and ``seconds`` of the run, None for what it does not say. ``models``: by name."""

    facts: dict
    models: dict[str, ModelRecord]


def read_facts(run: Path) -> dict:
    """Return FACTS and ``seconds`` of a run's run.json, None for what it does not say or if there is none."""
    path = run / "run.json"
    return _select_facts(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})


def _select_facts(facts: dict) -> dict:
    return {key: facts.get(key) for key in FACTS} | {"seconds": facts.get("seconds", {}).get("total")}


def write_record(cell: Path) -> None:
    """Write the record of the finished run in a cell's folder. Only the process that holds the cell may."""
    workdir_lib.write_text(cell / RECORD, json.dumps(_describe(cell / "run")) + "\n")


def read_record(cell: Path) -> Record:
    """Return the record in a cell's folder; if there is none, that of the finished run next to it.

    Raises FileNotFoundError if there is neither, and ValueError, with the file, if one cannot be read.
    """
    path = cell / RECORD
    if not path.exists():
        return _read(_describe(cell / "run"))
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); remove it, and it is made of the run again") from error


def _describe(run: Path) -> dict:
    files, models = read_run(run), {}
    for name, row in files.results.items():
        models[name] = {
            "row": {key: value for key, value in row.items() if key not in LARGE},
            "dev": (files.metrics[name] or [{}])[-1],
            "views": {view: _pack(outcomes) for view, outcomes in collect_outcomes(files.items[name]).items()},
        }
    return {"facts": _select_facts(files.run), "models": models}


def _pack(view: Outcomes) -> dict:
    packed = {name: "".join("01"[int(bit)] for bit in getattr(view, name)) for name in _BITS}
    shared = {"contexts": view.contexts, "groups": view.groups}
    numbers = {name: own and np.unique(own, return_inverse=True)[1].tolist() for name, own in shared.items()}
    return packed | {"length": view.length.tolist(), "samples": view.samples} | numbers


def _read(record: dict) -> Record:
    # Older records have the means over layers in place of the row.
    rows = {
        name: model["row"] if "row" in model else {key: [value] for key, value in model["values"].items()}
        for name, model in record["models"].items()
    }
    models = {
        name: ModelRecord(rows[name], model["dev"], {view: _unpack(own) for view, own in model["views"].items()})
        for name, model in record["models"].items()
    }
    return Record(record["facts"], models)


def _unpack(packed: dict) -> Outcomes:
    bits = {name: np.array([bit == "1" for bit in packed[name]], bool) for name in _BITS}
    numbers = {name: packed.get(name) for name in ("contexts", "groups")}  # older records have no groups
    shared = {name: own and [f"{number:06}" for number in own] for name, own in numbers.items()}
    return Outcomes(**bits, length=np.array(packed["length"]), samples=packed["samples"], **shared)
