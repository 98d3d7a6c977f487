"""The commands work from any folder: configuration files are found, and installed from a wheel."""

import importlib
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from ctxjax import __main__ as console
from ctxjax.configs import base
from ctxjax.host import command, preemption

ROOT = Path(__file__).parents[1]


def run(
    *arguments: str, folder: Path, package: Path = ROOT, module: str = "ctxjax", typed: str = ""
) -> subprocess.CompletedProcess:
    """Run the console command in ``folder``, with ``package`` as the only folder that Python imports from."""
    environment = {"PYTHONPATH": str(package), "HOME": str(folder), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, input=typed, capture_output=True, text=True, timeout=580)


@pytest.mark.parametrize("name", ["configs/tiny.py", "tiny.py", "tiny", "configs/llama3.py:medical,8b", "llama3:math"])
def test_a_packaged_configuration_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _, arguments = command.find_config(name).partition(":")
    assert Path(path).is_file() and Path(path).resolve().parent == ROOT / "configs"
    assert arguments == name.partition(":")[2]


def test_a_runs_configuration_can_be_given_as_the_file_that_the_run_wrote(tmp_path):
    written = base.get_config().to_json()
    (tmp_path / "config.json").write_text(written)
    config = command.load_config(str(tmp_path / "config.json"))
    assert config.to_json() == written and config.run_arms == base.get_config().run_arms
    config = command.load_config("llama3:medical,8b")
    assert config.task == "medical"


@pytest.mark.parametrize("name", ["configs/tiny.py", "tiny.py", "mine/own.py:a:b"])
def test_the_callers_own_file_comes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name.partition(":")[0])
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert command.find_config(name) == name


@pytest.mark.parametrize(
    "name", ["configs/none.py", "mine/tiny.py", "/somewhere/configs/tiny.py", "none:8b", "configs/recipes.py"]
)
def test_a_missing_configuration_is_refused_with_both_places(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist") as refused:
        command.find_config(name)
    places = str(tmp_path / name.partition(":")[0]), str(ROOT / "ctxjax" / "configs"), "tiny"
    assert all(place in str(refused.value) for place in places)
    assert "recipes" not in str(refused.value).partition("there are only")[2]  # which is no configuration


def test_the_console_lists_its_commands(capsys):
    for arguments in ([], ["--help"]):
        assert console.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(any(line.split()[:1] == [name] for line in lines) for name in console.COMMANDS)
    assert console.main(["trian"]) == 2
    assert "error: 'trian' is not a command; choose from train, extract" in capsys.readouterr().err


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_handles_ctrl_c(name):
    path = ROOT.joinpath(*console.COMMANDS[name][0].split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert "preemption.listen(" in file.read_text()


BAD = {
    "export": ["--workdir=none", "--out=model"], "report": ["--workdir=none"], "audit": ["none"],
    "games": ["frozenlake", "--size=99"], "chat": ["--workdir=none"],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_command_ends_on_bad_input_with_one_line_that_begins_alike(name, tmp_path, monkeypatch, capsys):
    """train, evaluate and plan: tests/bad_input_test.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "prepare", lambda config: None)
    module = importlib.import_module(console.COMMANDS[name][0])
    module = module if hasattr(module, "main") else importlib.import_module(f"{module.__name__}.__main__")
    monkeypatch.setattr(preemption, "listen", lambda *given: None)
    assert module.main(BAD[name]) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_explains_itself_with_an_example(name, tmp_path):
    done = run(name, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    _, *examples = done.stdout.replace(f"usage: ctxjax {name}", "").split(f"ctxjax {name} ")
    assert len(examples) == 1 and "--" in done.stdout


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(tmp_path):
    wheels, package, folder = (tmp_path / name for name in ("wheels", "package", "folder"))
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels]
    source = tmp_path / "source"  # a build leaves files in its folder
    unwanted = shutil.ignore_patterns(".git", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    subprocess.run([*pip, source], check=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(package)
    assert sorted(path.name for path in (package / "ctxjax" / "configs").glob("*.py")) == sorted(
        path.name for path in (ROOT / "configs").glob("*.py")
    )

    (folder / "own.py").write_text("from ctxjax.configs import debug\nget_config = debug.get_config\n")
    small = (
        "--config.base.layers=1",
        "--config.base.width=32",
        "--config.base.mlp_width=32",
        "--config.model.remat=none",
    )
    planned = run("plan", "--config=tiny", "--devices=1", *small, folder=folder, package=package)
    assert planned.returncode == 0 and "FLOPs" in planned.stdout, planned.stdout + planned.stderr
    assert "Unable to initialize" not in planned.stderr, planned.stderr
    assert any((folder / ".cache" / "ctxjax" / "xla").iterdir())  # what a plan compiles is kept, too
    trained = run("train", "--config=own.py", "--workdir=runs/debug", folder=folder, package=package)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (folder / "runs" / "debug" / "report.html").unlink()
    reported = run("--workdir=runs/debug", folder=folder, package=package, module="ctxjax.report")
    assert reported.returncode == 0 and (folder / "runs" / "debug" / "report.html").exists()
    exported = ("--workdir=runs/debug", "--arm=off_policy", "--out=model")
    done = run("export", *exported, folder=folder, package=package)
    assert done.returncode == 0, done.stdout + done.stderr
    for who in ("--workdir=runs/debug", "--model=model"):  # the run's context, and none
        talked = run("chat", who, "--max_tokens=4", folder=folder, package=package, typed="#1:abc\n/quit\n")
        assert talked.returncode == 0 and "without the context" in talked.stdout, talked.stdout + talked.stderr
        assert ("with the context" in talked.stdout) == (who == "--workdir=runs/debug")
    asked = ("--task=rules", "--config.rules.test_questions=4", "--config.rollout.max_tokens=4")
    done = run("evaluate", "--model=model", *asked, "--out=evaluation", folder=folder, package=package)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "rows.jsonl").write_text('{"question": 1')  # a relative path means the caller's folder
    asked = ("--task=math", "--config.math.path=rows.jsonl")
    done = run("evaluate", "--model=model", *asked, "--out=maths", folder=folder, package=package)
    assert done.returncode == 2 and "rows.jsonl, line 1" in done.stderr, done.stderr
    assert run("audit", "runs/debug", "model", folder=folder, package=package).returncode == 0
    assert run("games", "grid_walk", "--boards=3", folder=folder, package=package).returncode == 0
