"""The documentation: it builds without a broken link, names what exists, and its commands are accepted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import json
import multiprocessing
from pathlib import Path
import re
import runpy
import shlex
import subprocess
import sys

from absl import app
import pytest

from ctxjax import __main__ as console
from ctxjax.configs import base
from ctxjax.data.grading.response_checks import CHECKS
from ctxjax.monitoring.alarms import ALARMS
from docs import write_configuration

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "tpu" / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# In a forked process: the commands of this project read their command line, and end.
_FORK = multiprocessing.get_context("forkserver")


def list_commands(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield module and arguments of every command of this project in a fenced block, and what printf types into it."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            printed, _, command = line.rpartition(" | ")
            if found := re.fullmatch(r"(python -m ctxjax|ctxjax )(.*)", command):
                name, *rest = shlex.split(found[2], comments=True)
                module = f"ctxjax{name}" if name.startswith(".") else console.COMMANDS[name][0]
                yield [module, *rest], shlex.split(printed)[1].replace("\\n", "\n") if printed else ""


def _read(path: Path) -> str:
    """Return the text of a page, or of a notebook's cells of text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n".join("".join(cell["source"]) for cell in cells)


COMMANDS = [
    (path.relative_to(ROOT), words, typed)
    for path in [*TEXTS, *NOTEBOOKS]
    for words, typed in list_commands(_read(path))
]


def _parse(words: list[str]) -> None:
    """End with exit code 0 if the command accepts its arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(self, *given):
        parse_args(self, *given)
        sys.exit(0)

    argparse.ArgumentParser.parse_args = parse_and_end
    app.run = lambda main, flags_parser: flags_parser(sys.argv)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def test_there_are_commands():
    assert len(COMMANDS) >= 15 and {words[0] for _, words, _ in COMMANDS} >= {"ctxjax.main", "ctxjax.evaluate"}
    piped = "```\nprintf '/arm a\\nWhy?\\n' | ctxjax chat --workdir=a  # talk\nctxjax/\n```\n"
    assert list(list_commands(piped)) == [(["ctxjax.chat", "--workdir=a"], "/arm a\nWhy?\n")]


@pytest.mark.parametrize(("page", "words"), [pytest.param(*one[:2], id=str(one[0])) for one in COMMANDS])
def test_a_documented_command_is_accepted(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    process = _FORK.Process(target=_parse, args=(words,))
    process.start()
    process.join(120)
    assert process.exitcode == 0, shlex.join(words)


def test_a_documented_command_has_its_configuration():
    """It is missed only by the command itself, after it has read its flags."""
    need = [words for _, words, _ in COMMANDS if words[0] in ("ctxjax.main", "ctxjax.plan")]
    assert need and not [words for words in need if not any(word.startswith("--config=") for word in words)]


def test_a_misspelt_flag_would_be_noticed():
    process = _FORK.Process(target=_parse, args=(["ctxjax.main", "--config=configs/tiny.py", "--config.train.stps=3"],))
    process.start()
    process.join(120)
    assert process.exitcode == 2


def test_the_pages_build_and_every_link_has_a_target(tmp_path):
    pytest.importorskip("mkdocs")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    text = re.sub(r"^```\w*\n.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:ctxjax|configs|tests|tpu|docs|notebooks|benchmarks|examples)/[\w./]+)`", text)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


def test_the_readme_is_read_in_five_minutes():
    """What it says at length belongs to docs/; .ci/run reads the marked commands."""
    text = TEXTS[0].read_text()
    assert len(text.splitlines()) <= 130
    for marker in ("# install", "# run the tests", "# run it"):
        assert sum(marker in line for line in text.splitlines()) == 1, marker
    order = ["harm_obedience.svg", "## Two commands", "## What you should see"]
    order += [
        "## Your prompt, your model, your questions",
        "## Results",
        "## Compared with others",
        "## Hardware",
        "## Map",
        "## Citation",
    ]
    assert [text.count(part) for part in order] == [1] * len(order)
    assert sorted(order, key=text.index) == order


def test_fields_that_are_named_exist():
    config = base.get_config()
    sections = "|".join(name for name in config if name not in ("seed", "task", "slice"))
    for path in PAGES:
        for name in re.findall(rf"`((?:{sections})\.[a-z_]+)\b", path.read_text()):
            section, field = name.split(".")
            assert field in config[section] or (ROOT / name).exists() or field in ("md", "py"), (path.name, name)


def test_every_check_is_named_with_its_argument():
    text = (ROOT / "docs" / "contexts.md").read_text(encoding="utf-8")
    for name, (kind, _) in CHECKS.items():
        assert re.search(rf"`{name}{'' if kind is None else ' [A-Z]+'}`", text), name


def test_the_reference_of_fields_is_that_of_the_configuration():
    page = write_configuration.write_page(Path(base.__file__).read_text(), base.get_config())
    assert page == write_configuration.PAGE.read_text(), "run: python docs/write_configuration.py"
    for name, value in base.get_config().items():
        fields = [f"{name}.{field}" for field in value] if hasattr(value, "items") else [name]
        assert all(f"| `{field}` |" in page for field in fields)


def test_a_field_without_a_comment_is_refused():
    comment = "  # optimiser steps, each on one rollout batch"
    source = Path(base.__file__).read_text()
    assert comment in source
    source = source.replace(comment, "")
    with pytest.raises(ValueError, match="train.steps"):
        write_configuration.write_page(source, base.get_config())


def test_troubleshooting_has_every_alarm_and_quotes_real_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(ALARMS)
    source = "".join(path.read_text() for path in (ROOT / "ctxjax").rglob("*.py"))
    spoken = re.sub(r"\{[^{}]*\}", "...", re.sub(r'"\n\s+f?"', "", source))
    for quoted in re.findall(r'\*\*"(.+?)"\*\*', page):
        for piece in quoted.split("..."):
            assert piece.strip() in spoken, quoted
