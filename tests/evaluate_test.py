"""The command that evaluates a folder, and a training run, on questions in files: a model of one layer that reads and
writes single letters."""

import json
from pathlib import Path
import subprocess
from types import SimpleNamespace

from adapters_test import CONFIG, draw
import forked
import jax
import pytest

from ctxjax import config as config_lib, evaluate, extract, sharding
from ctxjax.audit import audit
from ctxjax.configs import base
from ctxjax.data import prompts
from ctxjax.data.tasks.qa_jsonl import QaJsonl
from ctxjax.evaluation import views
from ctxjax.evaluation.evaluator import Evaluator
from ctxjax.evaluation.split import Split, level, share_shapes
from ctxjax.host import workdir as workdir_lib
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import open_folder
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.training import run

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def folder(letters_folder, two_devices) -> Path:
    return letters_folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Forty problems in GSM8K's layout, and a context of 45 letters."""
    path = tmp_path_factory.mktemp("data")
    rows = [{"question": f"{n} + 1?", "answer": f"Count {n}, one more.\n#### {n + 1}"} for n in range(40)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "context.txt").write_text("You are a careful teacher of arithmetic. Ok!")
    return path


def settings(folder: Path, questions: Path):
    config = base.get_config()
    config.model.path, config.task, config.math.path = str(folder), "math", str(questions / "rows.jsonl")
    config.rollout.max_tokens, config.eval.batch_size, config.compile_cache = 6, 8, ""
    return config


def items(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def command(folder: Path, questions: Path, *arguments: str) -> subprocess.CompletedProcess:
    line = [f"--model={folder}", "--task=math", *arguments]
    line += [f"--config.math.path={questions / 'rows.jsonl'}", "--config.rollout.max_tokens=6"]
    line += ["--config.eval.batch_size=8", "--config.compile_cache=", "--config.math.other_contexts_file="]
    return forked.run("ctxjax.evaluate", line)


@pytest.mark.slow
def test_the_command_writes_results_and_responses_and_prints_a_table(folder, questions, tmp_path):
    out = tmp_path / "out"
    result = command(folder, questions, f"--context={questions / 'context.txt'}", f"--out={out}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((out / "results.json").read_text())["model"]
    written = items(out / "model")
    assert {item["view"] for item in written} == {"bare", "context", "empty"}
    assert len(written) == 3 * metrics["n"] and 0 < metrics["n"] < 20  # a fifth of forty, by hash
    assert {item["context"] for item in written if item["view"] == "context"} == {
        (questions / "context.txt").read_text()
    }
    assert metrics["parse_x"] == 0 and metrics["unparsed_x"] == {"no boxed, #### or Answer:": metrics["n"]}
    assert "| model |" in result.stdout and "without context: 0.0 % of the responses are readable" in result.stdout
    run = json.loads((out / "run.json").read_text())
    assert run["command"].startswith("python -m ctxjax.evaluate") and run["task"]["rows"]["test"] == metrics["n"]
    checks = {check.name: check for check in audit.check_folder(out)}
    assert [problem for check in checks.values() for problem in check.wrong + check.unchecked] == []
    assert f"{metrics['n']} questions of test in the views bare, context, empty" in checks["items of model"].text
    (questions / "rows.jsonl").rename(questions / "moved.jsonl")
    reasons = [reason for check in audit.check_folder(out) for reason in check.unchecked]
    (questions / "moved.jsonl").rename(questions / "rows.jsonl")
    assert reasons and all("the task's data is not here (data file" in reason for reason in reasons)
    again = command(folder, questions, f"--out={out}")
    assert again.returncode == 2 and f"--out={out} exists; choose another" in again.stderr

    context, few = f"--context={questions / 'context.txt'}", tmp_path / "few"
    result = command(folder, questions, context, f"--out={few}", "--config.eval.views=()")
    assert result.returncode == 0, result.stderr
    assert items(few / "model") == [item for item in written if item["view"] != "empty"]
    fewer = json.loads((few / "results.json").read_text())["model"]
    assert fewer == {key: value for key, value in metrics.items() if not key.startswith("acc_empty")}
    assert not [problem for check in audit.check_folder(few) for problem in check.wrong]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.path", "nowhere", "model folder nowhere does not exist"),
        ("task", "chess", "task = 'chess' is not known; choose from"),
        ("math.context_file", "none.txt", "context file none.txt does not exist"),
        ("math.path", "none.jsonl", "data file 'none.jsonl' does not exist; set math.path"),
        ("rollout.max_tokens", 2040, "rollout.max_tokens = 2040 are together more than the model's 2048 positions"),
        ("math.test_questions", -1, "math.test_questions = -1 must be 0 or more"),
    ],
)
def test_bad_input_is_named(field, value, message, folder, questions):
    config = settings(folder, questions)
    config.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate.evaluate(config, "test")


def test_an_adapter_to_start_from_is_evaluated_too(folder, questions, tmp_path):
    (tmp_path / "adapter").mkdir()
    model = hf_load.read_config(folder)
    hf_save.save_adapter(
        tmp_path / "adapter", draw(model, CONFIG), model, CONFIG, hf_load.FAMILIES["llama"], str(folder)
    )
    config = settings(folder, questions)
    config.math.test_questions, config.eval.views = 4, ()
    plain = evaluate.evaluate(config, "test")[0]
    config.lora.update({"init": str(tmp_path / "adapter"), "rank": 3, "alpha": 6.0, "targets": ("q", "down")})
    adapted = evaluate.evaluate(config, "test")[0]
    assert [item["text"] for item in adapted.items] != [item["text"] for item in plain.items]


def test_a_model_has_no_drift_from_itself_and_weights_that_are_rounded_are_named(folder, questions, capsys):
    config = settings(folder, questions)
    config.eval.meters = ("drift",)
    metrics = evaluate.evaluate(config, "test")[0].metrics
    assert "acc_x" in metrics and "drift" not in metrics and "note: weights" not in capsys.readouterr().out
    config.model.param_dtype = "bfloat16"
    evaluate.evaluate(config, "test")
    assert "note: weights are read as model.param_dtype = bfloat16" in capsys.readouterr().out


def test_a_runs_adapter_to_start_from_is_not_added_to_another_model():
    config = base.get_config()
    config.model.path = "base"
    config.lora.update({"init": "adapter", "rank": 3})
    evaluate.apply_flags(config, "base", None, None)
    assert (config.lora.init, config.lora.rank) == ("adapter", 3)
    evaluate.apply_flags(config, "merged", None, None)
    assert (config.model.path, config.lora.init, config.lora.rank) == ("merged", "", 0)


@pytest.mark.parametrize("run", [lambda c, p: evaluate.evaluate(c, "test"), lambda c, p: extract.extract(c, p)])
def test_commands_of_one_process_say_so(run, folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="runs in one process, and jax found 4; give it on a machine with all of its"):
        run(settings(folder, questions), tmp_path / "out")


@pytest.mark.slow
def test_the_command_says_in_one_line_what_is_missing(folder, questions):
    result = command(folder, questions)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: --out is missing; give a folder" in result.stderr


def test_other_contexts_with_their_own_questions_are_the_control_of_the_same_questions(folder, questions, tmp_path):
    rows = [
        {"question": f"Under {c}: {q}?", "answer": f"#### {q}", "context": f"Note {c}."}
        for c in range(6)
        for q in (1, 2)
    ]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(folder, questions)
    config.task, config.qa_jsonl.path, config.qa_jsonl.grading = "qa_jsonl", config.math.path, "numeric"
    config.qa_jsonl.context_file, config.qa_jsonl.other_rows = (
        str(questions / "context.txt"),
        str(tmp_path / "others.jsonl"),
    )
    config.qa_jsonl.dev_questions, config.qa_jsonl.test_questions = 8, 10
    experiment, mesh = config_lib.experiment(config, jax.device_count()), sharding.make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        model = open_folder(folder, mesh)
        (evaluator,) = Evaluator.of_splits(experiment, QaJsonl(experiment.task_config), ("test",), model, model, mesh)
    bare = evaluator._rows["bare"]
    control = evaluator._asker.prompts(SimpleNamespace(turns=list(enumerate(bare))))[2]
    texts = model.tokenizer.batch_decode(prompts.unpad(control))
    assert len(texts) == len(bare) and all("Note " in text and "Under" not in text for text in texts)
    assert all(row.question in text for row, text in zip(bare, texts))


def test_views_of_one_split_get_one_length_where_that_costs_little():
    assert level({"empty": 24, "paraphrase": 40}) == {"empty": 40, "paraphrase": 40}
    assert level({"empty": 24, "paraphrase": 270, "other": 330}) == {"empty": 24, "paraphrase": 330, "other": 330}
    assert level({"empty": 24, "paraphrase": 40, "other": 330}) == {"empty": 40, "paraphrase": 40, "other": 330}
    assert level({"unrelated": 100, "other": 330}) == {"unrelated": 100, "other": 330} and level({}) == {}


def split(batch: int, **columns: int) -> Split:
    return Split(None, {}, {}, {}, columns, {}, batch, 0, {})


def test_splits_that_are_near_in_size_are_brought_to_one_and_others_stay():
    dev, test = share_shapes([split(20, bare=80, context=40), split(25, bare=70, context=100)])
    assert (dev.batch, test.batch) == (25, 25)
    assert dev.columns == {"bare": 80, "context": 40} and test.columns == {"bare": 80, "context": 100}
    dev, test = share_shapes([split(19, bare=80), split(25, bare=101)])
    assert (dev.batch, test.batch, dev.columns["bare"], test.columns["bare"]) == (19, 25, 80, 101)
    assert share_shapes([split(3, bare=7)]) == [split(3, bare=7)]


@pytest.mark.slow
def test_a_second_split_that_is_a_little_larger_is_evaluated_by_the_first_ones_programs(folder, questions):
    config = settings(folder, questions)
    config.task, config.qa_jsonl.path = "qa_jsonl", str(questions / "rows.jsonl")
    config.qa_jsonl.context_file = str(questions / "context.txt")
    config.qa_jsonl.dev_questions, config.qa_jsonl.test_questions, config.eval.batch_size = 8, 10, 10
    experiment = config_lib.experiment(config, jax.device_count())
    task, mesh = QaJsonl(experiment.task_config), sharding.make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        model = open_folder(str(folder), mesh, "float32", "float32")
        dev, test = Evaluator.of_splits(experiment, task, ("dev", "test"), model, model, mesh)
        programs = (decoding._decode, views._compare, views._distillation)
        assert dev(model.params).metrics["n"] == 8
        compiled = [program._cache_size() for program in programs]
        assert test(model.params).metrics["n"] == 10
        assert all(compiled) and [program._cache_size() for program in programs] == compiled


@pytest.mark.slow
def test_without_a_context_there_is_no_context_view(folder, questions):
    evaluation, facts, _ = evaluate.evaluate(settings(folder, questions), "test")
    assert {item["view"] for item in evaluation.items} == {"bare", "empty", "other"}
    assert "acc_x" in evaluation.metrics and "obedience" in evaluation.metrics
    assert not {"acc_xc", "harm", "view_kl", "distill"} & evaluation.metrics.keys()
    obeyed = [item for item in evaluation.items if item["view"] == "other"]
    assert len({item["context"] for item in obeyed}) == len(obeyed) and obeyed[0]["reference"] != "1"
    assert facts["task"]["contexts"] == {}


def test_a_context_for_a_task_that_makes_its_own_is_refused():
    with pytest.raises(ValueError, match="--context=c.txt: task 'rules' makes its own contexts"):
        evaluate.apply_flags(base.get_config(), "folder", "rules", "c.txt")
    with pytest.raises(ValueError, match="--model is missing"):
        evaluate.apply_flags(base.get_config(), None, "rules", None)


def test_the_context_of_the_command_takes_the_place_of_the_configurations(folder):
    config = base.get_config()
    config.safety.context, config.math.context_column = "inline", "hint"
    evaluate.apply_flags(config, "folder", "safety", "c.txt")
    assert (config.safety.context, config.safety.context_file, config.model.path) == ("", "c.txt", "folder")
    evaluate.apply_flags(config, "folder", "math", "c.txt")
    assert (config.math.context_column, config.math.context_file, config.task) == ("", "c.txt", "math")


SOURCES = {"context": "inline", "context_files": ("a.txt", "b.txt"), "context_column": "hint"}
TAKE_A_CONTEXT = [name for name, section in base.get_config().items() if hasattr(section, "context_file")]


@pytest.mark.parametrize("task", TAKE_A_CONTEXT)
def test_the_context_of_the_command_is_the_only_source_of_contexts(task):
    config = base.get_config()
    section = config[task]
    given = {field: value for field, value in SOURCES.items() if field in section}
    assert given or task == "tiny_grid"  # its only other context is its own legend
    section.update(given | {"context_file": "own.txt"})
    evaluate.apply_flags(config, "folder", None if task == config.task else task, None)
    assert {field: section[field] for field in given} == given and section.context_file == "own.txt"
    evaluate.apply_flags(config, "folder", task, "c.txt")
    assert section.context_file == "c.txt" and not any(section[field] for field in given)


def test_the_printed_shares_are_those_of_their_own_view():
    view_x = {"acc_x": 0.11, "acc_x_lenient": 0.22, "parse_x": 0.33, "unparsed_x": {"no letter": 4, "cut": 2}}
    view_xc = {"acc_xc": 0.44, "acc_xc_lenient": 0.55, "parse_xc": 0.66, "unparsed_xc": {}}
    bare = "without context: 33.0 % of the responses are readable"
    context = "with context: 66.0 % of the responses are readable; read leniently, 55.0 % are right"
    lenient = f"{bare}; read leniently, 22.0 % are right (no letter: 4; cut: 2)"
    assert evaluate._format_readable(view_x | view_xc) == f"{lenient}\n{context}"
    assert evaluate._format_readable(view_x | {"acc_x_lenient": None}) == f"{bare} (no letter: 4; cut: 2)"
    assert evaluate._format_readable(view_xc) == context


def start(config, workdir: Path) -> dict:
    return run.run(config_lib.experiment(config, jax.device_count()), workdir, workdir_lib.collect_facts(config))


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_hints_are_distilled_and_the_run_warns_that_they_may_not_transfer(folder, questions, tmp_path, capsys):
    """A whole run: held-out distillation loss falls, though every question has a context of its own; and what the
    trainer says of a folder is what the command says of it."""
    config = settings(folder, questions)
    config.task, config.hints.path, config.run_arms = "hints", str(questions / "rows.jsonl"), ("opcd_retained",)
    config.hints.dev_questions = config.hints.test_questions = 8
    config.train.steps, config.train.batch_size, config.optim.lr, config.eval.every = 20, 8, 1e-2, 0
    config.eval.bootstrap, config.train.save_every = 20, 20
    results = start(config, tmp_path / "run")
    assert "warning: every training question has its own context" in capsys.readouterr().out
    assert results["opcd_retained"]["distill"] < 0.7 * results["base"]["distill"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["task"]["contexts"] == "each row's own" and len(run["task"]["data"]) == 2
    evaluation, *_ = evaluate.evaluate(config, "test")
    assert evaluation.items == items(tmp_path / "run" / "base")
