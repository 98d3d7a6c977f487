"""A study: its cells, the choice of rates, and processes that share the work."""

import json
import math
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

from ml_collections import ConfigDict
import pytest

from ctxjax.configs import study as study_config
from ctxjax.host import claim, preemption
from ctxjax.study import grid, report, results, worker
from ctxjax.study.grid import FINAL, RATE, Cell, Study

ROOT = Path(__file__).parents[1]

# A run in place of ctxjax.main: arm "b" is best at the highest rate, "a" at the lowest. It waits for the file "go".
FAKE = """
import json, os, pathlib, signal, sys, time
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
config, run = json.loads(pathlib.Path(flags["config"]).read_text()), pathlib.Path(flags["workdir"])
run.mkdir(exist_ok=True)
with (run / "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
while not (run.parents[2] / "go").exists():
    time.sleep(0.02)
if config["seed"] in (8,):
    print("the log", flush=True)
    sys.exit("it broke")
for name, changes in config["arms"].items():
    (run / name).mkdir(exist_ok=True)
    value = changes["lr"] if name.startswith("b") else -changes["lr"]
    rows = [{"step": 0, "dev/both_correct": 9}, {"step": 4, "dev/both_correct": value, "dev/distill": 1.0}]
    (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(run / "results.json").write_text(json.dumps({"base": {}} | {name: {} for name in config["arms"]}))
"""


def make_study(**changes) -> Study:
    fields = {
        "configurations": {"small": "configs/debug.py", "large": "configs/tiny.py"}, "own_changes": {},
        "arms": {"a": {}, "b": {"beta": 0.5}, "c": {"mu": 1.0}},
        "run_arms": ("a", "b"), "more_arms": {"large": ("c",)}, "left_out": {}, "first_arm": "a",
        "rates": (1e-4, 1e-3), "rates_of": {}, "rate_seeds": (7,), "seeds": (0, 1),
        "select": ("both_correct", "-distill"),
        "changes": {"train": {"keep": 3}}, "rate_changes": {"eval": {"views": ()}},
    }  # fmt: skip
    return Study.of(ConfigDict(fields | changes))


def test_a_cell_is_one_run_of_all_arms():
    study = make_study()
    cells = grid.list_cells(study)
    assert [cell.name for cell in cells[3:]] == ["small-rate7", "small-final0", "small-final1"] and len(cells) == 6
    first = grid.make_config(study, cells[3])
    assert first.run_arms == ("a-0", "a-1", "b-0", "b-1") and first.seed == first.rules.seed == first.base.seed == 7
    assert first.arms["b-1"].to_dict() == {"beta": 0.5, "lr": 1e-3} and first.eval.every == first.train.steps
    assert first.eval.views == () and first.train.keep == 3
    last = grid.make_config(study, Cell("large", FINAL, 1), {"a": 1e-3, "b": 1e-4, "c": 5e-4})
    assert last.run_arms == ("a", "b", "c") and last.arms.c.to_dict() == {"mu": 1.0, "lr": 5e-4}
    assert last.seed == 1 and last.eval.views and last.train.keep == 3
    assert list(grid.check_study(study)) == cells


def test_the_cheap_cells_are_those_with_little_to_train():
    costs = grid.check_study(make_study(rates=(1e-3,), rate_seeds=()))
    assert all(cell.phase == FINAL for cell in costs)
    assert costs[Cell("small", FINAL, 0)] < costs[Cell("large", FINAL, 0)]
    with_more = grid.check_study(make_study(more_arms={"large": ("c",), "small": ("c",)}))
    assert with_more[Cell("small", FINAL, 0)] > costs[Cell("small", FINAL, 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_arms": ("a", "d")}, "run_arms = 'd' is not known; choose from a, b, c"),
        ({"run_arms": ()}, "run_arms = .* must be at least one"),
        ({"more_arms": {"huge": ("c",)}}, "more_arms = 'huge' is not known"),
        ({"left_out": {"huge": ("a",)}}, "left_out = 'huge' is not known"),
        ({"own_changes": {"huge": {}}}, "own_changes = 'huge' is not known; choose from large, small"),
        ({"own_changes": {"large": {"train": {"stepps": 1}}}}, "large-rate7: .*stepps"),
        ({"left_out": {}, "first_arm": "c"}, "first_arm = 'c' is not known"),
        ({"rates_of": {"huge": "large"}}, "rates_of = 'huge' is not known"),
        ({"rates_of": {"small": "small"}}, "rates_of.small = 'small' is not known; choose from large"),
        ({"rates_of": {"large": "small"}}, "rates_of.large = small must be a configuration with the arms c"),
        ({"rate_seeds": (1,)}, r"rate_seeds = \(1,\) must be others than seeds, and both have \[1\]"),
        ({"rate_seeds": ()}, "rate_seeds = .* must be at least one for two rates"),
        ({"first_arm": "a", "left_out": {"large": ("a",)}}, "first_arm = 'a' is not known; choose from b, c"),
        ({"select": ("acc_x", "obedience")}, r"large-rate7: .*'obedience' needs 'other' in eval.views, which is \(\)"),
        ({"select": ("luck",)}, "eval.select = 'luck' is not a metric"),
        ({"sedes": (1,)}, "the study's field = 'sedes' is not known; choose from arms"),
        ({"configurations": {"small": "configs/none.py"}, "more_arms": {}}, "small-rate7: .*none.py does not exist"),
        ({"arms": {"a": {"betta": 1}, "b": {}, "c": {}}}, "large-rate7: arms.a-0.betta is no field"),
        ({"changes": {"train": {"stepps": 1}}}, "large-rate7: .*stepps"),
        ({"rates": (1e-3, 2.0)}, "large-rate7: arms.a-1.lr = 2.0 must be at most 1"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        grid.check_study(make_study(**changes))


def test_every_arm_gets_the_rate_that_is_best_for_it_on_dev():
    study = make_study(rates=(1e-4, 1e-3, 1e-2), rate_seeds=(7, 8))
    values = {  # arm and place -> by seed, (both_correct, -distill)
        "a-0": {7: (0.9, -2.0), 8: (0.7, -2.0)},
        "a-1": {7: (0.8, -1.0), 8: (0.8, -1.0)},  # as good on the first metric, better on the second
        "a-2": {7: (1.0, 0.0), 8: (0.5, 0.0)},
        "b-0": {7: (0.5, -1.0), 8: (0.5, -1.0)},  # equal: the lowest rate
        "b-1": {7: (0.5, -1.0), 8: (0.5, -1.0)},
        "b-2": {7: (math.nan, -1.0), 8: (1.0, -1.0)},  # it diverged once
    }
    chosen = grid.choose_rates(study, "small", lambda cell, name: values[name][cell.seed])
    assert chosen == {"a": 1e-3, "b": 1e-4}
    alone = make_study(rates=(5e-4,), rate_seeds=())
    assert grid.choose_rates(alone, "large", None) == {"a": 5e-4, "b": 5e-4, "c": 5e-4}


def test_a_configuration_may_do_without_an_arm():
    study = make_study(left_out={"large": ("a",)}, first_arm="b")
    assert study.arms_of("large") == ("b", "c") and study.arms_of("small") == ("a", "b")
    assert grid.make_config(study, Cell("large", RATE, 7)).run_arms == ("b-0", "b-1", "c-0", "c-1")
    game = make_study(
        configurations={"game": "configs/tiny_grid.py"}, more_arms={}, arms={"a": {}, "b": {"off_policy_steps": 1}}
    )
    with pytest.raises(ValueError, match=r"game-rate7: arm 'b-0' learns from the teacher's samples"):
        grid.check_study(game)


def test_a_configuration_may_take_the_rates_of_another_one():
    study = make_study(rates_of={"small": "large"})
    assert [cell.name for cell in grid.list_cells(study)] == [
        "large-rate7", "large-final0", "large-final1", "small-final0", "small-final1",
    ]  # fmt: skip
    asked = []
    chosen = grid.choose_rates(study, "small", lambda cell, name: asked.append(cell) or (0.0, float(name[-1])))
    assert chosen == {"a": 1e-3, "b": 1e-3} and set(asked) == {Cell("large", RATE, 7)}


@pytest.fixture
def make_folder(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(worker, "POLL", 0.02)
    monkeypatch.setattr(worker, "BEAT", 0.1)
    monkeypatch.setattr(preemption, "_is_requested", False)

    def make(**changes) -> worker.Folder:
        study = make_study(**changes)
        return worker.Folder(tmp_path, study, grid.check_study(study))

    return make


def test_all_cells_are_run_the_cheap_ones_first_each_phase_after_the_one_before(make_folder, tmp_path):
    folder, said = make_folder(), []
    (tmp_path / "go").touch()
    assert folder.state(Cell("small", RATE, 7)) == "waiting" and folder.state(Cell("small", FINAL, 0)) == "blocked"
    worker.work(folder, said.append)
    begun = [text.split()[0] for text in said if text.endswith("begins")]
    assert begun == [f"{size}-{cell}" for size in ("small", "large") for cell in ("rate7", "final0", "final1")]
    assert {folder.state(cell) for cell in folder.costs} == {"done"} and "6 done" in said[-1]
    made = json.loads((tmp_path / "cells" / "small-final1" / "config.json").read_text())
    assert made["arms"] == {"a": {"lr": 1e-4}, "b": {"beta": 0.5, "lr": 1e-3}} and made["seed"] == 1
    rows = [row for row in results.list_rates(folder) if row["configuration"] == "small"]
    assert {(row["arm"], row["rate"]) for row in rows if row["chosen"]} == {("a", 1e-4), ("b", 1e-3)} and len(rows) == 4
    assert {row["distill"] for row in rows} == {1.0} and {row["seed"] for row in rows} == {7}
    header, lines = report.arms_table(folder)
    assert header == ("arm", "config.loss", "rate: large", "rate: small")
    assert lines[1] == ("b", "beta = 0.5", "0.001", "0.001") and lines[2] == ("c", "mu = 1.0", "0.0001", "-")
    worker.work(folder, said.append)
    assert (tmp_path / "cells" / "small-rate7" / "run" / "starts").read_text().count("\n") == 1  # nothing is repeated
    assert not list(tmp_path.glob("cells/*/claim.*"))


def test_a_study_goes_on_elsewhere_with_the_records_of_its_cells(make_folder, tmp_path):
    folder = make_folder()
    (tmp_path / "go").touch()
    worker.work(folder, lambda text: None)
    for cell in folder.costs:
        own = folder.of(cell)
        assert (own / "record.json").exists()
        for path in own.iterdir():
            if (cell.phase, cell.configuration) == (FINAL, "large"):
                shutil.rmtree(own)
                break
            if path.name not in ("config.json", "record.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    states = {cell.name: folder.state(cell) for cell in folder.costs}
    assert states == dict.fromkeys(states, "done") | {"large-final0": "waiting", "large-final1": "waiting"}
    folder.check()
    worker.work(folder, lambda text: None)
    assert {path.parents[1].name for path in tmp_path.glob("cells/*/run/starts")} == {"large-final0", "large-final1"}
    made = json.loads((tmp_path / "cells" / "large-final1" / "config.json").read_text())
    assert made["arms"]["a"] == {"lr": 1e-4} and made["arms"]["b"] == {"beta": 0.5, "lr": 1e-3}  # the rates as before


def test_a_failed_cell_is_recorded_with_its_log_and_the_others_go_on(make_folder, tmp_path):
    folder, said = make_folder(seeds=(8, 1)), []
    (tmp_path / "go").touch()
    worker.work(folder, said.append)
    states = {cell.name: folder.state(cell) for cell in folder.costs}
    assert states == dict.fromkeys(states, "done") | {"small-final8": "failed", "large-final8": "failed"}
    cell = tmp_path / "cells" / "small-final8"
    assert json.loads((cell / "failed.json").read_text()) == {"exit_code": 1, "last_line": ["it broke"]}
    assert (cell / "log.txt").read_text() == "the log\nit broke\n"
    assert any("Exit code 1" in text and str(cell / "log.txt") in text for text in said)
    assert "2 failed" in worker.format_progress(folder) and "8 failed, 1 done" in worker.format_progress(folder)


def test_a_failed_first_phase_blocks_its_own_configuration_only(make_folder, tmp_path):
    folder = make_folder(rate_seeds=(8,), seeds=(0,), rates=(1e-4, 1e-3))
    (tmp_path / "go").touch()
    worker.work(folder, lambda text: None)
    assert {folder.state(cell) for cell in folder.costs if cell.phase == FINAL} == {"blocked"}


def test_the_second_phase_waits_for_the_configuration_that_chooses_its_rates(make_folder, tmp_path):
    folder, said = make_folder(rates_of={"small": "large"}), []
    assert folder.state(Cell("small", FINAL, 0)) == "blocked"
    assert "| small | as large | 0 blocked, 1 blocked |" in worker.format_progress(folder)
    (tmp_path / "go").touch()
    worker.work(folder, said.append)
    assert {folder.state(cell) for cell in folder.costs} == {"done"} and "5 done" in said[-1]
    assert next(text for text in said if text.endswith("begins")) == "large-rate7 begins"
    made = json.loads((tmp_path / "cells" / "small-final1" / "config.json").read_text())
    assert made["arms"] == {"a": {"lr": 1e-4}, "b": {"beta": 0.5, "lr": 1e-3}}


@pytest.mark.parametrize("how", ["file", "signal"])
def test_a_stop_ends_the_run_under_way_and_the_same_command_goes_on(make_folder, tmp_path, monkeypatch, how):
    folder, starts = make_folder(), tmp_path / "cells" / "small-rate7" / "run" / "starts"

    def pause(*given):
        if starts.exists() and starts.read_text().endswith("\n"):
            time.sleep(0.3)  # until the run listens
            if how == "file":
                (tmp_path / "stop").touch()
            else:
                monkeypatch.setattr(preemption, "_is_requested", True)
        return original(*given)

    original = worker._pause
    monkeypatch.setattr(worker, "_pause", pause)
    with pytest.raises(worker.Stopped if how == "file" else preemption.Preempted):
        worker.work(folder, lambda text: None)
    process = int(starts.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert folder.state(Cell("small", RATE, 7)) == "waiting"
    monkeypatch.setattr(worker, "_pause", original)
    monkeypatch.setattr(preemption, "_is_requested", False)
    (tmp_path / "stop").unlink(missing_ok=True)
    (tmp_path / "go").touch()
    worker.work(folder, lambda text: None)
    assert starts.read_text().count("\n") == 2 and {folder.state(cell) for cell in folder.costs} == {"done"}


def test_a_run_whose_study_was_killed_is_left_to_end_and_one_that_was_killed_goes_on(make_folder, tmp_path):
    folder, cell = make_folder(), Cell("small", RATE, 7)
    run = folder.run_of(cell)
    run.mkdir(parents=True)
    (folder.of(cell) / "claim.1").write_text(
        f"999999999 {claim._describe_place()}\n{os.getpid()} {claim._read_start(os.getpid())}\n"
    )
    assert folder.state(cell) == "running"  # before the run has its lock
    held = worker.workdir_lib.Lock(run)
    held.take()
    (folder.of(cell) / "claim.1").write_text(f"999999999 {claim._describe_place()}\n")
    assert folder.state(cell) == "running" and worker._take(folder, cell) is None
    held.__exit__()
    assert folder.state(cell) == "waiting"
    taken, mine = worker._take(folder, cell)
    assert taken == cell and mine.beat() and folder.state(cell) == "running"


def test_a_run_that_outlived_its_study_is_recorded_by_the_next_one(make_folder, tmp_path):
    folder, cell = make_folder(), Cell("small", RATE, 7)
    (tmp_path / "go").touch()
    worker.work(folder, lambda text: None)
    path = folder.of(cell) / "record.json"
    before = path.read_bytes()
    path.unlink()
    held = claim.Claim.take(folder.of(cell))
    worker._record_finished(folder)
    assert not path.exists()  # its holder will
    held.release()
    worker.work(folder, lambda text: None)
    assert path.read_bytes() == before and not list(folder.of(cell).glob("claim.*"))


def test_a_holder_that_was_asleep_gives_its_run_up(make_folder, tmp_path, monkeypatch):
    folder, cell = make_folder(), Cell("small", RATE, 7)
    _, mine = worker._take(folder, cell)
    (folder.of(cell) / "claim.2").write_text("1 elsewhere\n")
    outcome = worker._run(folder, cell, mine)
    assert outcome.state == "running" and "Another process has taken it over" in outcome.message


def test_a_cell_that_was_begun_with_other_settings_is_refused(make_folder, tmp_path):
    (tmp_path / "go").touch()
    worker.work(make_folder(), lambda text: None)
    make_folder().check()
    make_folder(seeds=(0, 1, 2)).check()  # more seeds are more cells
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*arms.b-0.beta: 0.5 -> 0.7"):
        make_folder(arms={"a": {}, "b": {"beta": 0.7}, "c": {"mu": 1.0}}).check()


def test_two_processes_share_the_cells(tmp_path):
    """Two commands at the same time, one of which is killed on the way; a third one ends the work."""
    (tmp_path / "fake.py").write_text(FAKE)
    script = (
        "import sys; from tests import study_test as t; from ctxjax.study import grid, worker\n"
        "worker.COMMAND, worker.POLL, worker.BEAT = (sys.executable, sys.argv[1] + '/fake.py'), 0.02, 0.2\n"
        "study = t.make_study()\n"
        "folder = worker.Folder(t.Path(sys.argv[1]), study, grid.check_study(study))\n"
        "worker.work(folder, lambda text: print(text, flush=True))\n"
    )

    def start():
        line = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def wait_for(count):
        limit = time.monotonic() + 60
        while len(found := list(tmp_path.glob("cells/*/run/starts"))) < count and time.monotonic() < limit:
            time.sleep(0.05)
        return found

    one, other = start(), start()
    begun = wait_for(2)
    assert len(begun) == 2  # both first phases, by different processes
    for path in begun:  # each run holds its cell, too, from its start on
        (held,) = path.parents[1].glob("claim.*")
        assert path.read_text().split()[0] == held.read_text().splitlines()[1].split()[0]
    one.send_signal(signal.SIGKILL)
    (tmp_path / "go").touch()
    printed = other.communicate(timeout=120)[0]
    assert other.returncode == 0 and "6 done" in printed
    starts = {path.parents[1].name: path.read_text().count("\n") for path in tmp_path.glob("cells/*/run/starts")}
    assert len(starts) == 6 == sum(starts.values())  # the run of the killed one has gone on
    one.wait()


def test_the_documented_study_has_thirteen_configurations_whose_cells_can_run():
    study = Study.of(study_config.get_config())
    assert len(study.configurations) == 13 and len(study.rates) == 3 and len(study.seeds) >= 3
    cells = grid.check_study(study)
    assert len(cells) == 5 * len(study.rate_seeds) + 13 * len(study.seeds)
    rated = {study.rated_in(name) for name in study.configurations}
    assert {name.split("_")[0] for name in rated} == {"rules", "policy", "scratch", "grid"} and len(rated) == 5
    early, llama = (
        grid.make_config(study, Cell(name, FINAL, 0), dict.fromkeys(study.arms, 1e-3))
        for name in ("rules_early", "rules_llama")
    )
    assert (early.train.steps, llama.train.steps) == (40, 200) and early.base == llama.base
