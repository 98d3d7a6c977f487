"""The plan compiles for the batches of the run: shapes, types, placement on the mesh, and the line that both print."""

import json
from pathlib import Path
import string
import subprocess
import sys
from types import SimpleNamespace

import forked
import jax
import pytest

from ctxjax import config as config_lib, sharding
from ctxjax.configs import base, llama3, tiny, tiny_grid
from ctxjax.data import prompts
from ctxjax.data.pipeline import training_batches
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.data.worlds.tiny_grid import TinyGrid
from ctxjax.inputs import run_inputs
from ctxjax.inputs.batch_shapes import make_batch_shapes
from ctxjax.models import params as params_lib
from ctxjax.models.hf import save as hf_save
from ctxjax.models.transformer import ModelConfig, param_specs
from ctxjax.plan import run, step as plan_step
from ctxjax.training.game_episodes import GameEpisodes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_devices")]
TASK = {
    "rules": "rules", "file": "qa_jsonl", "limits": "qa_jsonl", "prefix": "qa_jsonl", "hints": "hints",
    "recipe": "medical",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, two_devices) -> dict[str, Path]:
    """Random models by task: one of the rules' tokens, one of letters."""
    letters = word_tokenizer.build([*string.printable[:95], "\n"], r"[\s\S]")
    tokenizers = {"rules": word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN), "letters": letters}
    found, mesh = {}, sharding.make_mesh(fsdp=2)
    for name, tokenizer in tokenizers.items():
        model = ModelConfig(len(tokenizer), width=8, layers=1, query_heads=1, kv_heads=1, head_dim=8, mlp_width=8)
        with jax.set_mesh(mesh):
            params = params_lib.init(param_specs(model), jax.random.key(0), mesh)
        found[name] = tmp_path_factory.mktemp("models") / name
        hf_save.save(found[name], params, model, tokenizer, (tokenizer.eos_token_id,), "llama")
    return found


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    rows = [
        {"question": f"{n} + 1?" + "?" * (n % 5), "answer": f"{n + 1}", "hint": "one more " * (n % 9 + 1)}
        for n in range(40)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"opa": "one", "opb": "two", "opc": "three", "opd": "all of them", "cop": 1}
    (path / "medmcqa.jsonl").write_text("".join(json.dumps(row | options) + "\n" for row in rows))
    (path / "context.txt").write_text("You are a careful teacher of arithmetic, and kind. Ok!")
    return path


def make_config(case: str, folders: dict[str, Path], questions: Path):
    makers = {"rules": tiny.get_config, "recipe": lambda: llama3.get_config("medical,8b")}
    config = makers.get(case, base.get_config)()
    config.mesh.tensor = 1
    config.model.path, config.task = str(folders["rules" if case == "rules" else "letters"]), TASK[case]
    config.train.batch_size, config.train.retention_rows, config.train.micro_batches = 8, 4, 2
    config.rollout.max_tokens, config.compile_cache, config.run_arms = 6, "", ("opcd", "opcd_retained")
    config.qa_jsonl.path = config.hints.path = str(questions / "rows.jsonl")
    config.qa_jsonl.context_file = str(questions / "context.txt")
    config.qa_jsonl.dev_questions = config.qa_jsonl.test_questions = 4
    config.medical.path = str(questions / "medmcqa.jsonl")
    config.medical.context_file = config.qa_jsonl.context_file
    config.hints.hint, config.hints.dev_questions, config.hints.test_questions = "hint", 4, 4
    if case == "limits":
        config.prompt.max_bare_tokens, config.prompt.max_context_tokens, config.prompt.overlong = 1024, 1500, "drop"
    if case == "prefix":
        config.prompt.placement = "prefix"
    return config


def plan_batch(experiment, mesh, lengths=None):
    """The batch that is planned for the arm with retention, and the line of its shapes."""
    views = run.find_views(experiment, lengths)
    shapes = make_batch_shapes(experiment, views.bare, views.context, views.other, views.turns)
    model = ModelConfig(8, width=8, layers=1, query_heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    step = plan_step.make_step_config(experiment, experiment.arms["opcd_retained"], model, model)
    return plan_step.make_abstract_batch(step, shapes, mesh), shapes.describe()


def describe(batch):
    return jax.tree.map(lambda array: (array.shape, array.dtype, str(array.sharding.spec)), batch)


@pytest.mark.parametrize("case", TASK)
def test_the_planned_batch_is_the_runs_and_both_print_one_line(case, folders, questions, capsys):
    config = make_config(case, folders, questions)
    experiment = config_lib.experiment(config, 2)
    mesh = sharding.make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        inputs, train = run_inputs.open_inputs(experiment, mesh, {}), experiment.train
        batches = training_batches(
            inputs.rows, inputs.retention, seed=0, batch_size=8, retention_rows=train.retention_rows, pad_id=0
        )
        real = sharding.put_batch(next(batches), mesh)
        planned, line = plan_batch(experiment, mesh)
    printed = [text for text in capsys.readouterr().out.splitlines() if text.startswith("batch: ")]
    assert printed == [f"batch: {line}"]
    assert describe(planned) == describe(real)
    # The context is read once if all rows share it; hints share their template's first words.
    assert (planned.context.prefix_C is None) == (case == "rules")
    assert planned.other.tokens_BxP.shape[0] == 4


def test_a_games_planned_batch_has_the_turns_of_all_episodes(capsys):
    config = tiny_grid.get_config()
    config.train.batch_size, config.train.retention_rows, config.train.micro_batches = 8, 4, 2
    config.mesh.data, config.mesh.fsdp, config.run_arms = 1, -1, ("opcd", "opcd_retained")
    experiment = config_lib.experiment(config, 2)
    task = TinyGrid(experiment.task_config)
    tokenizer, mesh = task.tokenizer(), sharding.make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        rows, retention = run_inputs._encode(experiment, task, tokenizer)
        student = SimpleNamespace(tokenizer=tokenizer, stop_ids=(tokenizer.eos_token_id,), pad_id=0)
        inputs = run_inputs.Inputs(task, student, student, rows, retention)
        (real,) = GameEpisodes.of_run(experiment, inputs, True, lambda params: params, mesh).examples(0)
        planned, line = plan_batch(experiment, mesh)
    assert f"batch: {line}" in capsys.readouterr().out.splitlines()
    assert describe(planned) == describe(real.batch) and planned.bare.tokens_BxP.shape[0] == 8 * task.max_turns


def test_lengths_take_the_place_of_data(folders, questions):
    config = make_config("file", folders, questions)
    config.qa_jsonl.path, config.model.path = "", "meta-llama/Llama-3.1-8B-Instruct"
    experiment, mesh = config_lib.experiment(config, 2), sharding.make_mesh(fsdp=2)
    batch, line = plan_batch(experiment, mesh, run.Lengths(1500, 90))
    assert batch.bare.tokens_BxP.shape == batch.context.tokens_BxP.shape == (8, 96)
    assert batch.context.prefix_C.shape == (1500,) and batch.other.tokens_BxP.shape == (4, 1664)
    assert "90 without the context (padded to 96), 1590 with it (1500 shared by all rows, padded to 1596), " in line
    config.hints.path, config.task = "", "hints"
    batch, _ = plan_batch(config_lib.experiment(config, 2), mesh, run.Lengths(1500, 90))
    assert batch.context.prefix_C is None and batch.context.tokens_BxP.shape == (8, 1664)
    short, _ = plan_batch(experiment, mesh, run.Lengths(prompts.SHORTEST_PREFIX - 1, 90))
    assert short.context.prefix_C is None
    config.task = "text_game"  # whose turns are rows, also if their lengths are given
    batch, line = plan_batch(config_lib.experiment(config, 2), mesh, run.Lengths(1500, 90))
    assert batch.bare.tokens_BxP.shape == (8 * config.text_game.turns, 96) and f"{8 * 7} rows a step" in line


@pytest.mark.parametrize("field", ["context_template", "teacher_messages", "context_column"])
def test_contexts_that_are_made_of_the_rows_are_planned_in_every_row(field, folders, questions):
    config = make_config("file", folders, questions)
    config.qa_jsonl.context_file, config.qa_jsonl[field] = "", "{hint}" if field == "context_template" else "hint"
    views = run.find_views(config_lib.experiment(config, 2), run.Lengths(1500, 90))
    assert (views.context.prefix, views.context.columns) == (0, 1664)


@pytest.mark.parametrize(
    ("task", "path", "message"),
    [
        (
            "text_game",
            "rows.jsonl",
            "text_game has no context; set text_game.context_file .*Or give .*--prefix=N.*--question=N",
        ),
        ("qa_jsonl", "none.jsonl", "data file .*none.jsonl' does not exist.*--prefix=N.*--question=N"),
        ("qa_jsonl", "rows.jsonl", "model folder none does not exist.*--prefix=N.*--question=N"),
    ],
)
def test_without_data_the_flags_are_named(task, path, message, folders, questions):
    config = make_config("file", folders, questions)
    config.qa_jsonl.path, config.model.path, config.task = str(questions / path), "none", task
    with pytest.raises(ValueError, match=message):
        run.find_views(config_lib.experiment(config, 2), None)


@pytest.mark.slow
def test_the_commands_print_one_line(tmp_path):
    flags = ["--config=configs/debug.py", "--config.compile_cache="]
    cache = f"--config.base.cache={tmp_path}"
    shown = forked.run("ctxjax.main", [*flags, cache, "--dump_batch"]).stdout
    command = [sys.executable, "-m", "ctxjax.plan", *flags, cache, "--devices=1"]
    planned = subprocess.run(command, cwd=forked.ROOT, capture_output=True, text=True, check=True).stdout
    lines = [{line for line in text.splitlines() if line.startswith("batch: ")} for text in (shown, planned)]
    assert lines[0] == lines[1] and len(lines[0]) == 1
