"""Checkpoints and exports: the files are what was saved, and what was evaluated is what the checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ctxjax.audit.check import Check, list_numbers
from ctxjax.audit.folder import Folder
from ctxjax.export import MANIFEST
from ctxjax.host.checksum import compute_digest, hash_file
from ctxjax.report.tables import results_table
from ctxjax.training.checkpoint import saved_steps

AT_A_TIME = 1 << 24  # numbers


class _Saved(NamedTuple):
    """``checksums``: of the arrays in a checkpoint, by name. ``scaled``: of an adapter's second matrices times
    alpha / rank, as the joined model has them."""

    checksums: dict[str, int]
    scaled: dict[str, int]


class Weights:
    """The checkpoints of a run. Each is read once."""

    def __init__(self, folder: Folder):
        self._folder, self._saved = folder, {}
        self._lora = folder.config.get("lora", {})

    def check_checkpoints(self, arm: str, check: Check) -> None:
        """Every array has the checksum that was recorded when it was saved."""
        folder, place = self._folder, self._folder.path / arm / "checkpoints"
        steps, last = saved_steps(place), folder.config["train"]["steps"]
        if folder.is_finished and last not in steps:
            check.wrong.append(f"{arm}/checkpoints/{last} is missing")
        for step in steps:
            where = f"{arm}/checkpoints/{step}"
            record = json.loads((place / str(step) / "run" / "metadata").read_text(encoding="utf-8"))
            check.expect(f"{where}: position in the data", record["data_position"], step)
            check.expect(f"{where}: inputs", record["manifest"]["inputs"], folder.run["inputs"])
            try:
                found = self._saved[arm, step] = self._read(place / str(step) / "state")
            except Exception as error:  # orbax and tensorstore raise different types
                check.wrong.append(f"{where} cannot be read: {' '.join(str(error).split())[:200]}")
                continue
            for name in sorted(found.checksums.keys() | record["checksums"].keys()):
                check.expect(f"{where}: checksum of {name}", found.checksums.get(name), record["checksums"].get(name))
        check.seen.append(f"steps {list_numbers(steps) or 'none'}: checksums as saved")

    def _read(self, path: Path) -> _Saved:
        """Read one part of the state after the other (parameters, moments, ...), to hold no more than needed."""
        found = _Saved({}, {})
        with ocp.PyTreeCheckpointer() as reader:
            described = reader.metadata(path.absolute())
            described = described.item_metadata.tree
            for part, tree in described.items():
                wanted = {part: tree}
                how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
                request = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
                arrays = reader.restore(path.absolute(), args=request)
                for key, array in jax.tree_util.tree_leaves_with_path(arrays):
                    name = jax.tree_util.keystr(key, simple=True, separator="/")
                    found.checksums[name] = compute_checksum(array)
                    if name.startswith("params/") and name.endswith("_lora_b"):
                        power = 0.5 if self._lora.get("rslora") else 1
                        scale = np.float32(self._lora["alpha"] / self._lora["rank"] ** power)
                        found.scaled[name] = compute_checksum(array * scale)
        return found

    def check_evaluated(self, check: Check) -> None:
        """What was evaluated: the model's weights as base, and those of the checkpoint of its step as each arm."""
        base: dict[str, int] = {}
        for one in self._folder.evaluations:
            name = f"{one.folder}/evaluation.json"
            weights = self._folder.json(name).get("weights") if self._folder.has(name) else None
            if not weights:
                check.unchecked.append(f"which weights {one.label} has: an older version did not write it down")
                continue
            if one.name in ("base", "teacher"):
                base = weights if one.folder == "base" else base
                inputs = self._folder.run["inputs"]
                check.expect(f"{name}: digest of the weights", compute_digest(weights), inputs[_INPUTS[one.name]])
                check.seen.append(f"{one.label}: {_INPUTS[one.name]} of run.json")
            elif (one.name, one.step) not in self._saved:
                check.unchecked.append(f"the weights of {one.label}: there is no checkpoint of step {one.step}")
            else:
                self._compare(check, name, weights, base, self._saved[one.name, one.step])
                check.seen.append(f"{one.label}: the checkpoint of step {one.step}")

    def _compare(self, check: Check, name: str, weights: dict, base: dict, saved: _Saved) -> None:
        trained = saved.checksums | saved.scaled
        trained = {key.removeprefix("params/"): value for key, value in trained.items() if key.startswith("params/")}
        expected = (base if self._lora.get("rank") else {}) | trained
        for key in sorted(weights.keys() | expected.keys()):
            check.expect(f"{name}: checksum of {key}", weights.get(key), expected.get(key))

    def check_export(self, place: Path, check: Check) -> None:
        """The files are those that were exported, from a checkpoint of this run, and the card has its numbers."""
        if not (place / MANIFEST).is_file():
            check.unchecked.append(f"{place} has no {MANIFEST}: an older version exported it, or it is no export")
            return
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        arm, step = manifest["arm"], manifest["step"]
        for name, digest in manifest["files"].items():
            if not (place / name).is_file():
                check.wrong.append(f"{place / name} is missing")
            else:
                check.expect(f"{place / name}: sha256", hash_file(place / name), digest)
        for path in sorted(place.glob("*.safetensors")):
            if path.name not in manifest["files"]:
                check.wrong.append(f"{path} was not exported")
        if (arm, step) in self._saved:
            found = {f"params/{name}": value for name, value in manifest["weights"].items()}
            saved = self._saved[arm, step].checksums
            for name in sorted(found.keys() | {key for key in saved if key.startswith("params/")}):
                where = f"{place / MANIFEST}: checksum of {name.removeprefix('params/')}"
                check.expect(where, found.get(name), saved.get(name))
            check.seen.append(f"{len(manifest['files'])} files, from the checkpoint of {arm}, step {step}")
        else:
            check.unchecked.append(f"its weights: the run has no checkpoint of {arm}, step {step}, any more")
        self._check_card(place, manifest, check)

    def _check_card(self, place: Path, manifest: dict, check: Check) -> None:
        arm, path = manifest["arm"], self._folder.path / "results.json"
        if not (place / "README.md").is_file():
            return
        if not path.is_file() or manifest["results"] not in (None, hash_file(path)):
            check.unchecked.append("the model card: results.json was written anew since the export")
            return
        results = self._folder.json("results.json")
        text = results_table({name: results[name] for name in ("base", "teacher", arm) if name in results})
        said = (place / "README.md").read_text(encoding="utf-8")
        table, card = ([line for line in one.splitlines() if line.startswith("|")] for one in (text, said))
        if not card:
            check.unchecked.append("the model card has no results: the arm was exported before it was evaluated")
            return
        for number, (found, expected) in enumerate(zip(card, table)):
            check.expect(f"{place / 'README.md'}: line {number + 1} of the table of results", found, expected)
        check.expect(f"{place / 'README.md'}: lines of the table of results", len(card), len(table))
        check.seen.append("the model card has the numbers of results.json")


_INPUTS = {"base": "model", "teacher": "teacher"}


def compute_checksum(array: np.ndarray) -> int:
    """Return the checksum of host/checksum.py, in numpy: the sum, modulo 2^32, of the values' bits mixed with their
    places."""
    flat, total = np.ascontiguousarray(array).reshape(-1), 0
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[flat.dtype.itemsize]
    for start in range(0, flat.size, AT_A_TIME):
        part = flat[start : start + AT_A_TIME]
        bits = part.view(unsigned).astype(np.uint32)
        place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        mixed = (bits ^ place * np.uint32(0x9E3779B1)) * np.uint32(0x85EBCA6B)
        total += int(np.sum(mixed ^ mixed >> np.uint32(15), dtype=np.uint64))
    return total % 2**32
