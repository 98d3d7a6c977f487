"""The examples, run as their users run them, and short."""

import ast
import itertools
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_uses_only_what_is_public(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 40
    nodes = list(ast.walk(ast.parse(text)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules - sys.stdlib_module_names <= {"ctxjax", "ctxjax.configs", "jax", "numpy"}


def run(name: str, *arguments, home: Path) -> str:
    """Run an example; ``home``: the folder of caches. Return what it prints."""
    line = [sys.executable, "-m", f"examples.{name}", *map(str, arguments)]
    environment = os.environ | {"HOME": str(home)}
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_model_internalizes_a_prompt_with_the_users_questions(debug_run, tmp_path):
    _, model = debug_run
    (tmp_path / "prompt.txt").write_text("f>b;a>e;c>d;b>a;e>f;d>c;")
    words = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    rows = [{"question": f"#1:{word}", "answer": word[::-1]} for word in words]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--prompt={tmp_path}/prompt.txt", f"--questions={tmp_path}/questions.jsonl", f"--out={tmp_path}/run"]
    printed = run("internalize", f"--model={model}", *files, "--steps=2", "--batch_size=8", home=tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["base", "opcd", "opcd_anchored", "opcd_retained"]
    for arm, metrics in results.items():
        assert f"{arm}: right without the prompt {metrics['acc_x']:.1%}, with it {metrics['acc_xc']:.1%}\n" in printed


def test_the_arms_of_a_run_are_compared(tmp_path):
    metrics = {"harm": 0.25, "harm_ci": [0.125, 0.5], "obedience": 1.0, "obedience_ci": [0.9, 1.0]}
    results = {"base": {"acc_x": 0.0, "harm": None, "harm_ci": None}, "opcd": metrics}
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = [line.split("  ") for line in run("compare_arms", tmp_path, home=tmp_path).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[1:] == [["base", "-", "-"], ["opcd", "25.0 % [12.5, 50.0]", "100.0 % [90.0, 100.0]"]]


@pytest.mark.slow
def test_the_tokens_that_depend_on_the_context_are_shown(debug_run, tmp_path):
    _, model = debug_run
    printed = run("view_kl", model, "#1:abc", "f>b;a>e;c>d;b>a;e>f;d>c;", home=tmp_path).splitlines()
    assert [line.split(":")[0] for line in printed[:2]] == ["without the context", "with the context"]
    rows = [line.split() for line in printed[3:]]
    assert len(rows) >= 1 and all(float(row[0]) >= 0 for row in rows)
    assert any(float(row[0]) > 0 for row in rows), "the two views differ"
