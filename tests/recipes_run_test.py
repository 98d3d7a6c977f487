"""The recipes of configs/qwen3.py that learn from experience, small, on a random Qwen3 of two layers."""

from __future__ import annotations

import json
from pathlib import Path
import re
import string

from conftest import write_random_model
import forked
from prompts_test import TEMPLATES
import pytest

from ctxjax.data.tasks.text_game import ASKED, INVALID
from ctxjax.data.worlds import word_tokenizer
from ctxjax.games.game import MOVES

pytestmark = pytest.mark.slow

# One device and one episode at a time: few programs to compile. The second step plays with the trained model.
SMALL = {
    "cpu_devices": 1, "compile_cache": "xla", "mesh.tensor": 1, "model.remat": "none", "train.steps": 2,
    "train.batch_size": 2, "train.micro_batches": 1, "train.save_every": 2, "rollout.max_tokens": 6,
    "eval.every": 0, "eval.batch_size": 1, "eval.bootstrap": 20, "eval.temperature": 1.0, "eval.views": ("other",),
}  # fmt: skip
FEW = {"train_questions": 6, "dev_questions": 3, "test_questions": 4}
LAKE = {"size": 3, "pieces": 2, "turns": 5}
RECIPES = {
    "frozenlake": {f"text_game.{field}": value for field, value in LAKE.items()},
    "sokoban": {f"text_game.{field}": value for field, value in FEW.items()},
    "math": {f"math.{field}": value for field, value in FEW.items()} | {"math.path": "rows.jsonl"},
}
LESSONS = "- EXPERIENCE ITEM: Go down first.\n- EXPERIENCE ITEM: Never step onto an H.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the model, lessons and problems. Most of the model's tokens are moves, or end a response."""
    folder = tmp_path_factory.mktemp("recipes")
    moves = [f"[{' ' * n}{move}]" for n in range(25) for move in MOVES]
    ends = [f"\0{n}" for n in range(200)]
    words = dict.fromkeys(re.findall(r" ?[a-zA-Z]+", f"{ASKED} {INVALID} {LESSONS}"))
    words = dict.fromkeys([*string.printable[:95], "\n", *words, *moves, *ends])
    tokenizer = word_tokenizer.build(list(words), r"\[ *\w+\]|\x00\d+| ?[a-zA-Z]+|[\s\S]")
    tokenizer.chat_template = TEMPLATES["qwen3"]
    sizes = {"width": 16, "layers": 2, "query_heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 16}
    model = write_random_model(folder / "qwen3", tokenizer, "qwen3", max_positions=8192, **sizes)
    fields = json.loads((model / "generation_config.json").read_text())
    fields["eos_token_id"] += tokenizer.convert_tokens_to_ids(ends)
    (model / "generation_config.json").write_text(json.dumps(fields))
    (folder / "experience.txt").write_text(LESSONS)
    rows = [{"question": f"{n} plus {n}?", "answer": f"#### {2 * n}"} for n in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place: Path, recipe: str, arms: tuple[str, ...]) -> tuple[dict, dict, str]:
    """Return results.json, run.json and what was printed."""
    section = "math" if recipe == "math" else "text_game"
    given = {"model.path": "qwen3", f"{section}.context_file": "experience.txt", "run_arms": arms}
    settings = [f"--config.{field}={value}" for field, value in (SMALL | RECIPES[recipe] | given).items()]
    flags = [f"--config=configs/qwen3.py:{recipe}", f"--workdir={recipe}", *settings]
    ended = forked.run("ctxjax.main", flags, seconds=580, folder=place)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results, facts = (json.loads((place / recipe / name).read_text()) for name in ("results.json", "run.json"))
    return results, facts, ended.stdout


@pytest.mark.parametrize(("recipe", "arms"), [("frozenlake", ("opcd_retained",)), ("sokoban", ("opcd_anchored",))])
def test_a_game_runs_and_its_scores_are_printed_next_to_those_of_players_without_skill(recipe, arms, place):
    results, facts, printed = run(place, recipe, arms)
    boards = facts["task"]["boards"]["test"]
    assert list(results) == ["base", *arms]
    for name, metrics in results.items():
        assert metrics["n"] == boards["boards"] == facts["task"]["rows"]["test"]
        assert (metrics["random_moves"], metrics["fixed_path"]) == (boards["random"], boards["fixed"])
        assert metrics["perfect_play"] == 1.0 and 1 <= metrics["turns_x"] <= 5 and 1 <= metrics["turns_xc"] <= 5
        assert 0 <= metrics["obedience"] <= 1
        lines = (place / recipe / name / "items.jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        assert len(items) == 3 * metrics["n"]
        assert {item["view"] for item in items} == {"bare", "context", "other"}
        assert {item["context"] for item in items if item["view"] == "context"} == {LESSONS.strip()}
    random, fixed = (f"{100 * boards[name]:.1f} %" for name in ("random", "fixed"))
    assert f"boards: random moves win {random}, the best fixed path {fixed}, perfect play 100.0 %" in printed
    assert "best fixed path" in (place / recipe / "report.html").read_text()
    rows = [json.loads(line) for line in (place / recipe / arms[-1] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]


def test_the_recipe_of_mathematics_runs(place):
    results, _, printed = run(place, "math", ("opcd",))
    assert list(results) == ["base", "opcd"] and results["opcd"]["n"] == FEW["test_questions"]
    assert "perfect_play" not in results["base"] and "boards:" not in printed
