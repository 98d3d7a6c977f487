"""A run's folder: one run in it, one process at it, the same configuration and inputs, and a record of them."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from ctxjax import api
from ctxjax.configs import tiny
from ctxjax.host import command, workdir
from ctxjax.host.workdir import Lock
from ctxjax.inputs import run_inputs
from ctxjax.training import run


@pytest.fixture
def facts():
    return workdir.collect_facts(tiny.get_config())


def test_a_folder_holds_one_process_at_a_time_and_says_which(tmp_path):
    folder = tmp_path / "run"
    with Lock(folder) as lock:
        lock.take()
        lock.take()
        with (
            Lock(folder) as other,
            pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on"),
        ):
            other.take()
    with Lock(folder) as lock:
        lock.take()


@pytest.mark.parametrize(
    ("there", "resume", "message"),
    [
        (False, "auto", None),
        (False, "never", None),
        (False, "must", "holds no run to go on with"),
        (True, "auto", None),
        (True, "never", "holds a run already"),
        (True, "must", None),
    ],
)
def test_a_run_goes_on_may_not_or_must(there, resume, message, tmp_path, facts):
    if there:
        workdir.claim(tmp_path, facts, {})
    if message is None:
        workdir.check_workdir(tmp_path, facts["config"], resume)
    else:
        with pytest.raises(ValueError, match=message):
            workdir.check_workdir(tmp_path, facts["config"], resume)


def test_a_run_may_move_to_another_mesh_and_may_not_become_another(tmp_path, facts):
    workdir.claim(tmp_path, facts, {})
    config = json.loads(json.dumps(facts["config"]))
    config["mesh"]["tensor"], config["train"]["keep"], config["cpu_devices"] = 2, 5, 1
    config["train"]["micro_batches"], config["model"]["remat"], config["rollout"]["weights"] = 2, "full", "stored"
    config["model"]["attention"] = "cudnn"
    workdir.check_workdir(tmp_path, config)
    config["train"]["batch_size"] = 64
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*  train.batch_size: 32 -> 64$"):
        workdir.check_workdir(tmp_path, config)


def test_no_other_field_may_change(tmp_path, facts):
    workdir.claim(tmp_path, facts, {})

    def may_change(section: dict, field: str) -> bool:
        before, section[field] = section[field], "another"
        try:
            workdir.check_workdir(tmp_path, facts["config"])
        except ValueError:
            return False
        finally:
            section[field] = before
        return True

    def list_changeable(section: dict, prefix: str = "") -> set[str]:
        found = set()
        for name, value in section.items():
            if isinstance(value, dict) and value:
                found |= list_changeable(value, f"{prefix}{name}.")
            elif f"{prefix}{name}" != "train.steps" and may_change(section, name):
                found.add(f"{prefix}{name}")
        return found

    assert list_changeable(facts["config"]) == {
        "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices", "cpu_devices", "compile_cache", "model.remat",
        "model.attention", "rollout.weights", "train.micro_batches", "train.save_every", "train.keep", "logging.wandb",
        "logging.trackio", "run_arms", *(f"alarms.{name}" for name in facts["config"]["alarms"]),
    }  # fmt: skip


def test_a_field_that_newer_code_has_added_has_its_default_in_an_older_run(tmp_path, facts):
    """What is set to anything else, or was stored and is no more, is a difference."""
    old = json.loads(json.dumps(facts["config"]))
    old["seed"], facts["config"]["seed"] = 7, 7
    facts["config"]["handbook"]["seed"] = 7  # its default is the run's
    del old["loss"]["off_policy_divergence"], old["arms"]["opcd_handover"], old["handbook"], old["eval"]["meters"]
    workdir.claim(tmp_path, facts | {"config": old}, {})
    config = json.loads(json.dumps(facts["config"]))
    workdir.check_workdir(tmp_path, config)
    config["arms"]["of_a_newer_file"] = {"beta": 0.3}  # and not trained
    workdir.check_workdir(tmp_path, config)
    config["loss"]["off_policy_divergence"], config["handbook"]["style"] = "forward_kl", "rules"
    config["run_arms"] = [*config["run_arms"], "of_a_newer_file"]
    config["arms"]["opcd_anchored"]["chunk"] = 16
    with pytest.raises(ValueError, match="another configuration") as refusal:
        workdir.check_workdir(tmp_path, config)
    assert str(refusal.value).split("\n  ")[1:] == [
        "arms.of_a_newer_file: None -> {'beta': 0.3}",
        "arms.opcd_anchored.chunk: None -> 16",
        "handbook.style: 'list' -> 'rules'",
        "loss.off_policy_divergence: '' -> 'forward_kl'",
    ]
    workdir.write_json(tmp_path / "config.json", old | {"sieve": {"mesh": 2}})
    with pytest.raises(ValueError, match=r"Stored, and now:\n  sieve: {'mesh': 2} -> None$"):
        workdir.check_workdir(tmp_path, facts["config"])


@pytest.mark.parametrize("damaged", [[], {"optim": 3}, {"arms": None}])
def test_a_stored_configuration_that_is_none_is_refused(damaged, tmp_path, facts):
    workdir.claim(tmp_path, facts, {})
    workdir.write_json(tmp_path / "config.json", damaged)
    with pytest.raises(ValueError, match=r"config.json is no configuration|another configuration"):
        workdir.check_workdir(tmp_path, facts["config"])


def test_a_place_may_change_where_the_contents_are_compared(tmp_path, facts):
    """And may not be set or emptied, which changes what a run does."""

    def place(text: str) -> dict:
        config = json.loads(json.dumps(facts["config"]))
        for name in run_inputs.MOVABLE:
            section, field = name.split(".")
            assert isinstance(config[section][field], (str, list)), name
            is_list = isinstance(config[section][field], list)
            config[section][field] = ([text] if text else []) if is_list else text
        return config

    workdir.claim(tmp_path, facts | {"config": place("/old/file")}, {})
    workdir.check_workdir(tmp_path, place("/new/file"), movable=run_inputs.MOVABLE)
    for config, movable in ((place("/new/file"), ()), (place(""), run_inputs.MOVABLE)):
        with pytest.raises(ValueError, match="another configuration") as refusal:
            workdir.check_workdir(tmp_path, config, movable=movable)
        lines = str(refusal.value).split("\n  ")[1:]
        assert {line.split(":")[0] for line in lines} == run_inputs.MOVABLE


def test_training_goes_on_where_its_files_have_moved(tmp_path, monkeypatch):
    config, done = tiny.get_config(), []
    workdir.claim(tmp_path, workdir.collect_facts(config), {})
    monkeypatch.setattr(run, "run", lambda *given: done.append(given))
    config.base.cache = "/elsewhere"
    api.start_run(config, tmp_path, "must")
    assert done


def test_a_digest_that_newer_code_computes_is_not_compared(tmp_path, facts):
    workdir.claim(tmp_path, facts, {"model": "aa"})
    assert workdir.claim(tmp_path, facts, {"model": "aa", "tokenizer": "bb"})["inputs"] == {"model": "aa"}
    with pytest.raises(ValueError, match=r"  inputs.model: 'aa' -> None$"):
        workdir.claim(tmp_path, facts, {"tokenizer": "bb"})


@pytest.mark.parametrize(
    ("schedule", "steps", "reason"),
    [
        ("constant", 250, None),
        ("constant", 150, r"train.steps: 200 -> 150 \(a run can be made longer, not shorter\)$"),
        (
            "cosine",
            250,
            r"200 -> 250 \(the rate of optim.schedule = 'cosine' depends on it; only .*constant",
        ),
    ],
)
def test_a_run_may_become_longer_if_its_first_steps_stay_the_same(schedule, steps, reason, tmp_path, facts):
    facts["config"]["optim"]["schedule"] = schedule
    workdir.claim(tmp_path, facts, {})
    config = json.loads(json.dumps(facts["config"]))
    config["train"]["steps"] = steps
    if reason is None:
        workdir.check_workdir(tmp_path, config)
        config["seed"] = 7
        reason = r"another configuration[^\n]*\n  seed: 0 -> 7$"
    with pytest.raises(ValueError, match=reason):
        workdir.check_workdir(tmp_path, config)


def test_other_inputs_under_the_same_names_are_refused_and_nothing_changes(tmp_path, facts):
    workdir.claim(tmp_path, facts, {"model": "aa", "rows": {"train": "bb", "dev": "cc"}})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"other inputs(.|\n)*  inputs.rows.train: 'bb' -> 'dd'$"):
        workdir.claim(tmp_path, facts, {"model": "aa", "rows": {"train": "dd", "dev": "cc"}})
    assert (tmp_path / "run.json").read_bytes() == before


def test_the_manifest_says_what_ran_and_keeps_the_earlier_starts(tmp_path, facts):
    starts = [facts | {"started": f"{number}", "record": {"data.jsonl": f"{number}"}} for number in range(4)]
    for start in starts:
        workdir.claim(tmp_path, start, {"model": "aa"})
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert {"config", "seed", "command", "versions", "commit", "device", "host", "inputs"} <= manifest.keys()
    assert (manifest["started"], manifest["record"]) == ("3", {"data.jsonl": "3"})
    assert workdir.find_first_start(manifest) == "0"
    kept = ("started", "command", "device", "commit", "versions", "record")
    assert [{name: start[name] for name in kept} for start in manifest["earlier_starts"]] == [
        {name: start[name] for name in kept} for start in starts[:3]
    ]


def test_a_run_that_goes_on_with_other_code_warns(tmp_path, facts, capsys):
    for commit in ("aa", "aa", "bb"):
        assert not capsys.readouterr().out
        workdir.claim(tmp_path, facts | {"commit": commit}, {})
    said = f"warning: the run in {tmp_path} goes on with other code: commit aa then, bb now\n"
    assert capsys.readouterr().out == said


def test_a_run_that_was_killed_at_its_very_begin_can_be_started_again(tmp_path, facts):
    with Lock(tmp_path) as lock:
        lock.take()
        (tmp_path / "config.json.partial-1a2b3c4d").write_text("{")
        workdir.check_workdir(tmp_path, facts["config"])
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a run's folder"):
        workdir.check_workdir(tmp_path, facts["config"])


def test_two_processes_that_write_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, replace = tmp_path / "file", os.replace

    def replace_after_the_other(*paths):
        monkeypatch.setattr(os, "replace", replace)
        workdir.write_text(path, "of the other")
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_after_the_other)
    workdir.write_text(path, "of the last")
    assert path.read_text() == "of the last" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_completed_leaves_nothing(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        workdir.write_text(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of_and_other_errors_are_raised(number, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(tmp_path / "run") as lock:
        lock.take()
        lock.take()
    assert capsys.readouterr().err.count("warning: ") == 1
    number = errno.EIO
    with Lock(tmp_path / "run") as lock, pytest.raises(OSError, match="Input/output"):
        lock.take()


@pytest.mark.parametrize("address", ["gs://bucket/runs/one", "s3://bucket/one", "file:///tmp/one"])
def test_an_address_is_no_workdir_and_the_remedy_is_named(address):
    with pytest.raises(ValueError, match=f"--workdir={address} is an address.*gcsfuse.*--workdir=/mnt/bucket/one$"):
        command.parse_folder("--workdir", address)
    assert command.parse_folder("--workdir", "runs/one") == Path("runs/one")
