"""Weights & Biases and Trackio get what metrics.jsonl gets, and a run does not depend on them."""

from __future__ import annotations

import json
from pathlib import Path
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ctxjax.monitoring import trackers
from ctxjax.monitoring.alarms import Alarms, AlarmsConfig
from ctxjax.monitoring.metric_writer import Writer
from ctxjax.monitoring.trackers import LoggingConfig, Trackers

FACTS = {"optim": {"lr": 1e-3}}


@pytest.fixture
def package(monkeypatch):
    """package(name): a module of that name with ``init``; it notes what it is given."""

    def make(name: str, fails: str = "") -> SimpleNamespace:
        seen = SimpleNamespace(options=None, rows=[], finished=0)

        class Run:
            def log(self, numbers, step):
                if fails == "log":
                    raise ConnectionError("no network")
                seen.rows.append({"step": step} | numbers)

            def finish(self):
                seen.finished += 1

        def init(**options):
            if fails == "init":
                raise RuntimeError("log in first")
            seen.options = options
            return Run()

        module = ModuleType(name)
        module.init, module.__spec__ = init, SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
        return seen

    return make


def write(folder, config: LoggingConfig, started: str = "2026-12-01") -> list[dict]:
    """Write two steps and an evaluation; return the rows of metrics.jsonl without their time."""
    folder.mkdir(parents=True, exist_ok=True)
    watching = Trackers(config, folder, FACTS, started)
    writer = Writer(folder, "arm", 2, 0, 1, Alarms(AlarmsConfig(), "arm"), watching)
    for step in (1, 2):
        writer.step(step, {"loss": np.float32(step / 8), "response_tokens": np.float32(3)})
    writer.flush()
    writer.write(2, {"dev/acc_x": 0.5})
    writer.close()
    watching.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_project_gets_what_metrics_jsonl_gets(name, package, tmp_path):
    seen = package(name)
    rows = write(tmp_path / "mine" / "opcd", LoggingConfig(**{"wandb": "", "trackio": ""} | {name: "project"}))
    assert len(rows) == 3 and seen.rows == rows and seen.finished == 1
    options = {"project": "project", "name": "mine/opcd", "group": "mine", "config": FACTS, "resume": "allow"}
    assert (seen.options.pop("id", "none").endswith("-opcd"), seen.options) == (name == "wandb", options)


def test_only_a_resumed_run_goes_on_under_its_id(package, tmp_path, monkeypatch):
    seen = package("wandb")

    def find_id(folder, started: str) -> str:
        write(folder, LoggingConfig("project", ""), started)
        return seen.options["id"]

    first = find_id(tmp_path / "a" / "run" / "opcd", "10:00")
    monkeypatch.chdir(tmp_path)
    assert find_id(Path("a/run/opcd"), "10:00") == first
    others = [("b/run/opcd", "10:00"), ("a/run/sft", "10:00"), ("a/run/opcd", "11:00")]
    assert len({first, *(find_id(tmp_path / folder, started) for folder, started in others)}) == 4


def test_nothing_is_imported_if_no_project_is_named(package, tmp_path):
    seen = package("wandb", "init")
    write(tmp_path / "mine" / "opcd", LoggingConfig("", ""))
    assert seen.options is None


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_tracker_that_fails_does_not_end_the_run(fails, package, tmp_path, capsys):
    seen, other = package("wandb", fails), package("trackio")
    rows = write(tmp_path / "mine" / "opcd", LoggingConfig("project", "project"))
    assert len(rows) == 3 and other.rows == rows and not seen.rows
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "wandb gets no metrics from now on" in warnings[0]


def test_an_absent_package_is_refused_with_the_command_that_installs_it(package, monkeypatch):
    package("trackio")
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers.check_installed(LoggingConfig("", "project"))
    with pytest.raises(ValueError, match=r"logging.wandb = 'project' needs the package wandb: pip install"):
        trackers.check_installed(LoggingConfig("project", ""))
