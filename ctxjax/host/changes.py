"""What has changed between the configuration that a run began with and the one that it is to go on with."""

from __future__ import annotations

from collections.abc import Collection
import json
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ctxjax.configs import base

# Fields that may change when a run is resumed: where it computes, with which kernels, in how much memory, how often it
# saves, which arms it trains and when it warns or stops, not what an arm computes.
CHANGEABLE = (
    "mesh", "cpu_devices", "compile_cache", "model.remat", "model.attention", "rollout.weights", "train.micro_batches",
    "train.save_every", "train.keep", "logging", "run_arms", "alarms",
)  # fmt: skip


class Difference(NamedTuple):
    """A value that differs. ``name``: its keys, joined by points."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} -> {self.now!r}"


def describe_changes(before: dict, now: dict, movable: Collection[str] = ()) -> list[str]:
    """Return a line for each field that a run may not change, and has.

    ``movable``: further fields that may change, which name a file or a folder; they may not be set or emptied.

    ``before`` is what an older version of the code may have stored: a field that it lacks has its default. A run may
    have more steps than before if the learning rate is constant: nothing else of a step depends on their number.
    """
    before, now = _fill(before), _fill(now)
    found = [change for change in list_differences(before, now) if not _is_free(change, now, movable)]
    lines = (_judge_steps(change, before) if change.name == "train.steps" else str(change) for change in found)
    return list(filter(None, lines))


def list_differences(before, now, name: str = "") -> list[Difference]:
    """Return what differs between two nested dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [one for k in keys for one in list_differences(before.get(k), now.get(k), f"{name}.{k}".lstrip("."))]
    return [] if before == now else [Difference(name, before, now)]


def _fill(config: dict) -> dict:
    """Return the configuration with the fields that it lacks, as configs/base.py has them.

    An arm that is there stays as it is: what it lacks, it takes from ``loss``.
    """
    filled = base.get_config()
    for arm in filled.arms.keys() & config.get("arms", {}).keys():
        del filled.arms[arm]
    with filled.ignore_type():
        filled.update(ConfigDict(config))
    return json.loads(filled.to_json())


def _is_free(change: Difference, now: dict, movable: Collection[str]) -> bool:
    """Whether a run may change this: a field of CHANGEABLE, a place, or an arm that is new and not trained."""
    section, _, field = change.name.partition(".")
    if section == "arms" and "." not in field and change.before is None:
        return field not in now["run_arms"]
    if change.name in movable:
        return bool(change.before) == bool(change.now)
    return section in CHANGEABLE or change.name in CHANGEABLE


def _judge_steps(change: Difference, before: dict) -> str:
    """Return the line of a change of train.steps, with the reason why it is refused; "" if the run may become longer,
    since its first steps do not depend on their number."""
    schedule = before["optim"]["schedule"]
    if change.now < change.before:
        return f"{change} (a run can be made longer, not shorter)"
    if schedule != "constant":
        rule = "only a run with optim.schedule = 'constant' can be made longer"
        return f"{change} (the rate of optim.schedule = {schedule!r} depends on it; {rule})"
    return ""
