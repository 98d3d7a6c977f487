"""The folder of a run: made, or recognised as the same run's, before anything is computed."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import shlex
import sys

import jax
from ml_collections import ConfigDict

from ctxjax import processes, secrets

PACKAGES = ("ctxjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def check(workdir: Path, config: dict) -> None:
    """Raises ValueError where the folder holds a run with another configuration, with the fields that differ, or
    anything that is not a run. A run with the same configuration is taken up again."""
    stored = workdir / "config.json"
    if not stored.exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise ValueError(f"{workdir} exists and is not a run's folder; choose another --workdir")
        return
    try:
        before = json.loads(stored.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{stored} is not valid JSON ({error}); choose another --workdir") from None
    different = _differences(before, config)
    if different:
        raise ValueError(
            f"{workdir} holds a run with another configuration; choose another --workdir. Stored, and now:\n  "
            + "\n  ".join(different)
        )


def read_config(workdir: Path) -> dict:
    """The configuration of the run in a folder. Raises ValueError where the folder holds no run."""
    stored = workdir / "config.json"
    try:
        return json.loads(stored.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{workdir} is not a run's folder: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{stored} is not valid JSON ({error})") from None


def claim(workdir: Path, config: dict) -> None:
    """Makes the folder and puts the run's name plate, config.json, on it. Call it when all input has been read:
    a run that could not start leaves nothing behind."""
    workdir.mkdir(parents=True, exist_ok=True)
    processes.wait("workdir checked")
    write_json(workdir / "config.json", config)
    processes.wait("workdir claimed")
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is not the same folder for all processes of this run; name one that they share")


def write_json(path: Path, value) -> None:
    """Writes a file that appears under its name only when it is complete."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Likewise, for text. Of several processes the first writes."""
    if not processes.is_first():
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _differences(before, now, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for k in keys for line in _differences(before.get(k), now.get(k), f"{name}.{k}".lstrip("."))]
    return [] if before == now else [f"{name}: {before!r} -> {now!r}"]


def facts(config: ConfigDict) -> dict:
    """What run.json says of a run: configuration, command line, versions, device, time of the start; no secrets."""
    device = jax.devices()[0]
    found = {
        "config": json.loads(config.to_json()),
        "command": shlex.join(["python", "-m", "ctxjax.main", *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return secrets.hidden(found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
