"""Bad input ends with one message that names the thing, the value and the remedy, and leaves nothing behind."""

import json
from pathlib import Path
import re
import subprocess

import forked
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax import config as config_lib, sharding
from ctxjax.configs import base, tiny, tiny_grid
from ctxjax.data import prompts
from ctxjax.data.pipeline import encode_rows
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.tasks.qa_jsonl import QaConfig, QaJsonl
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.host import command as commands
from ctxjax.inputs import base_model, model_folder as folder_lib, run_inputs
from ctxjax.models import params as params_lib
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.models.transformer import ModelConfig, param_specs
from ctxjax.training import run


def command(*arguments: str) -> subprocess.CompletedProcess:
    return forked.run("ctxjax.main", [*arguments])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/tiny.py", "--config.train.stepps=3"], "no field 'stepps'"),
        (["--config=configs/none.py"], "configs/none.py does not exist, and in "),
        (["--config=configs/tiny.py", "--config.model.path=missing"], "model folder missing does not exist"),
        (["--config=configs/tiny.py", "--config.train.steps=many"], "invalid literal"),
    ],
)
def test_the_command_ends_with_one_message_and_leaves_nothing(arguments, message, tmp_path):
    result = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_is_not_a_runs_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = command("--config=configs/tiny.py", f"--workdir={tmp_path}")
    assert result.returncode == 2 and "is not a run's folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "task",
            "chess",
            "task = 'chess' is not known; choose from .*math, medical, policy, qa_jsonl, rules, safety",
        ),
        ("train.batch_size", 12, r"train.batch_size = 12 is not divisible by mesh data\*fsdp = 8; use 8 or 16"),
        ("train.batch_size", -3, "train.batch_size = -3 must be above 0"),
        ("loss.anchor_every", 10**6, "loss.anchor_every = 1000000 must be at most train.steps = 200"),
        ("train.retention_rows", 64, "train.retention_rows = 64 is more than train.batch_size = 32"),
        ("rollout.temperature", 0.0, "rollout.temperature = 0.0 must be above 0"),
        ("rollout.top_p", 1.5, "rollout.top_p = 1.5 must be at most 1"),
        ("optim.lr", float("nan"), "optim.lr = nan must be finite"),
        ("optim.schedule", "linear", "optim.schedule = 'linear' is not known; choose from constant, cosine"),
        ("loss.divergence", "js", "loss.divergence = 'js' is not known"),
        ("loss.averaging", "mean", "loss.averaging = 'mean' is not known"),
        ("prompt.placement", "suffix", "prompt.placement = 'suffix' is not known; choose from prefix, system, user"),
        ("prompt.date", "", "prompt.date = '' is not a date such as '26 Jul 2024'"),
        ("prompt.date", "today", "prompt.date = 'today' is not a date"),
        ("model.param_dtype", "bfloat16", "model.param_dtype = 'bfloat16' .* lora.rank = 0.*model.dtype=bfloat16"),
        (
            "model.param_dtype",
            "bfloat16",
            r"A teacher with a folder of its own \(teacher.path\) may have bfloat16 weights",
        ),
        ("teacher.param_dtype", "int8", "teacher.param_dtype = 'int8' is not known"),
        ("mesh", {"tensor": 3}, "needs 6 devices, and there are 8; use mesh.tensor = 2 or 4$"),
        ("mesh", {"tensor": 16}, "needs 16 devices, and there are 8; use mesh.tensor = 8$"),
        ("mesh", {"data": 3, "tensor": 2}, "needs 6 devices, and there are 8; use mesh.data = 4$"),
        ("mesh", {"data": 1}, "needs 1 devices, and there are 8; use mesh.fsdp = 8$"),
        ("mesh", {"data": 3, "fsdp": 3}, "there are 8; mesh.data=1, mesh.fsdp=-1, mesh.tensor=1 fits any number"),
        ("mesh", {"slices": 3}, "mesh.data = 8 is not divisible by mesh.slices = 3; use 6 or 9"),
        ("mesh", {"slices": -1}, "mesh.slices = -1 must be 0 or more"),
        ("model.remat", "all", "model.remat = 'all' is not known; choose from dots, full, none, offload"),
        ("rollout.weights", "whole", "rollout.weights = 'whole' is not known; choose from gathered, stored"),
        ("run_arms", ("nca",), "run_arms = 'nca' is not known"),
        ("lora.rank", -1, "lora.rank = -1 must be 0 or more"),
        ("lora.alpha", 0.0, "lora.alpha = 0.0 must be above 0"),
        ("lora.targets", ("q", "head"), "lora.targets = 'head' is not known; choose from down, gate, k, o, q, up, v"),
        ("lora.targets", ("q", "q"), "lora.targets = .* must be at least one matrix, each named once"),
        ("lora.targets", (), "lora.targets = .* must be at least one matrix, each named once"),
        ("model.dtype", "float16", "model.dtype = 'float16' is not known"),
        (
            "model.attention",
            "flash",
            "model.attention = 'flash' is not known; choose from auto, cudnn, reference, splash",
        ),
        ("base.steps", 0, "model.path is empty"),
        ("base.kv_heads", 3, "base.query_heads = 4 is not a multiple of base.kv_heads = 3"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(field, value, message):
    config = tiny.get_config()
    values = {f"{field}.{name}": size for name, size in value.items()} if isinstance(value, dict) else {field: value}
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        config_lib.experiment(config, device_count=8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run_arms", ("off_policy",), "arm 'off_policy' learns from the teacher's samples .*leave the arm out"),
        ("eval.meters", ("drift",), "eval.meters = .*'drift'.*: they read single responses, not games"),
    ],
)
def test_what_a_game_cannot_have_is_refused_before_its_base_is_trained(field, value, message):
    config = tiny_grid.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        config_lib.experiment(config, device_count=8)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    assert commands.parse_new("--out", str(tmp_path / "reports" / "dose.json")) == tmp_path / "reports" / "dose.json"
    assert (tmp_path / "reports").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file, of --out, cannot be written: .*; choose another folder"):
        commands.parse_new("--out", str(tmp_path / "file" / "dose.json"))


def test_frozen_weights_may_be_bfloat16():
    config = tiny.get_config()
    config.teacher.param_dtype = "bfloat16"
    config_lib.experiment(config, device_count=8)
    config.model.param_dtype = "bfloat16"
    config_lib.experiment(config, device_count=8, trains=False)
    config.lora.rank = 4
    config_lib.experiment(config, device_count=8)


@pytest.mark.parametrize("name", ["base", "teacher"])
def test_an_arm_may_not_take_the_name_of_an_untrained_model(name):
    config = tiny.get_config()
    config.arms[name], config.run_arms = {"beta": 0.1}, (name,)
    with pytest.raises(ValueError, match=f'"{name}" is the name of an untrained model in the results; rename the arm'):
        config_lib.experiment(config, device_count=8)


def model_folder(path: Path, words: list[str], template: str | None = None) -> Path:
    """A random model of one layer, with a tokenizer of these words."""
    tokenizer = word_tokenizer.build(words, rules.TOKEN_PATTERN)
    tokenizer.chat_template = template or tokenizer.chat_template
    model = ModelConfig(len(tokenizer), width=8, layers=1, query_heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    params = params_lib.init(param_specs(model), jax.random.key(0), sharding.make_mesh(fsdp=8))
    hf_save.save(path, params, model, tokenizer, (tokenizer.eos_token_id,), "llama")
    return path


NO_SYSTEM_ROLE = "{% if messages[0].role == 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}?"


@pytest.mark.parametrize(
    ("template", "teacher", "message"),
    [
        (None, "nowhere", "model folder nowhere does not exist"),
        (None, "{other}", "other is not the student's in {folder}; choose a teacher of the student's"),
        (NO_SYSTEM_ROLE, "", "refuses a system message and a user message: roles must alternate; set prompt.placement"),
    ],
)
def test_models_that_cannot_take_part_are_refused_before_the_run_leaves_anything(tmp_path, template, teacher, message):
    folder = model_folder(tmp_path / "model", rules.vocabulary(), template)
    other = model_folder(tmp_path / "other", rules.vocabulary()[::-1])
    (other / "model.safetensors").unlink()  # a tokenizer is compared before gigabytes are read
    config = tiny.get_config()
    config.model.path, config.teacher.path = str(folder), teacher.format(other=other)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message.format(folder=folder))):
        run.run(config_lib.experiment(config, jax.device_count()), tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.max_tokens": 4096}, "a prompt of .* tokens and rollout.max_tokens = 4096 are together more than"),
        ({"prompt.thinking": True}, "does not read enable_thinking"),
        ({"prompt.max_bare_tokens": 1}, "more than prompt.max_bare_tokens = 1"),
        ({"teacher.path": "others"}, "the tokenizer in teacher.path = .* is not the student's"),
        ({"teacher.path": "missing"}, "model folder missing does not exist"),
    ],
)
def test_what_files_and_sizes_tell_is_refused_before_a_base_is_trained(tmp_path, monkeypatch, changes, message):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    if changes.get("teacher.path") == "others":
        config.teacher.path = str(model_folder(tmp_path / "teacher", ["apple", "pear"]))
    monkeypatch.setattr(base_model, "ensure_base", None)
    monkeypatch.setattr(hf_load, "load", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_inputs.open_inputs(config_lib.experiment(config, device_count=8), sharding.make_mesh(fsdp=8), {})


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (-np.inf, "bfloat16")])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    folder = model_folder(tmp_path / "model", rules.vocabulary())
    tensors = load_file(folder / "model.safetensors")
    folder_lib.open_folder(folder, sharding.make_mesh(fsdp=8), param_dtype=dtype)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        tensors[name].flat[-1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="weights that are not finite numbers") as error:
        folder_lib.open_folder(folder, sharding.make_mesh(fsdp=8), param_dtype=dtype)
    named = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(named) == ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize("ends", ["999", "[3, 999]", "-1"])
def test_end_tokens_beyond_the_head_are_named(tmp_path, ends):
    folder = model_folder(tmp_path / "model", rules.vocabulary())
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(ValueError, match="are not all ids of the head, which has .* rows; fix eos_token_id"):
        folder_lib.open_folder(folder, sharding.make_mesh(fsdp=8))


@pytest.mark.parametrize("field", ["thinking", "teacher_thinking"])
def test_a_thinking_switch_that_the_template_lacks_ends_the_run_before_the_weights_are_read(
    tmp_path, monkeypatch, field
):
    config = tiny.get_config()
    config.model.path, config.prompt[field] = str(model_folder(tmp_path / "model", rules.vocabulary())), True
    monkeypatch.setattr(folder_lib, "open_folder", None)
    with pytest.raises(ValueError, match=r"does not read enable_thinking, so .* would change nothing; leave it unset"):
        run_inputs.open_inputs(config_lib.experiment(config, device_count=8), sharding.make_mesh(fsdp=8), {})


@pytest.mark.parametrize("ends", ['"</s>"', '[3, "x"]', "{}", "[true]"])
def test_end_tokens_that_are_no_ids_are_named(tmp_path, tokenizer, ends):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id = .* must be an id or a list of ids"):
        folder_lib.read_stop_ids(tmp_path, tokenizer)


def test_a_mesh_takes_all_devices_that_remain():
    config = tiny.get_config()
    config.mesh.tensor = 2
    assert config_lib.experiment(config, device_count=8).mesh == config_lib.MeshConfig(data=4, fsdp=1, tensor=2)


def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
    with pytest.raises(ValueError, match=r"3\*1\*1 = 3, but there are 8 devices"):
        sharding.make_mesh(3, 1, 1)


def test_a_model_that_does_not_fit_the_mesh_is_refused_before_its_weights_are_read(tmp_path):
    folder = model_folder(tmp_path / "model", rules.vocabulary())
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="model: query_heads = 1, kv_heads = 1, .* not divisible by mesh.tensor = 2; use"
    ):
        folder_lib.open_folder(folder, sharding.make_mesh(2, 2, 2))


def qa(path, **changes) -> QaJsonl:
    settings = {
        "path": str(path), "question": "question", "reference": "answer", "messages": "",
        "grading": "numeric", "limit": 0,
        "context": "Think.", "context_file": "", "context_files": (), "context_column": "", "context_seed": 0,
        "other_contexts_file": "", "dev_questions": 1, "test_questions": 1,
    }  # fmt: skip
    return QaJsonl(QaConfig(**(settings | changes)))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(9)))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"question": "prompt"},
            r"line 1: no text in column 'prompt'; its columns are \['answer', 'question'\]; set qa_jsonl.question, ",
        ),
        (
            {"grading": "letter"},
            "line .: column 'answer': '#### .' cannot be a reference; .* qa_jsonl.grading to what the file has, ",
        ),
        ({"context": ""}, "qa_jsonl has no context"),
        ({"context": "", "context_file": "missing.txt"}, "context file missing.txt does not exist"),
        ({"context_file": "both.txt"}, "are both set"),
        ({"other_contexts_file": "missing.jsonl"}, "missing.jsonl' does not exist; set qa_jsonl.other_contexts_file"),
        ({"dev_questions": 8}, "has 9 different questions, and .* = 9 hold out all of them"),
    ],
)
def test_questions_that_cannot_be_used_are_refused(questions, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        qa(questions, **changes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "x", "answer": "1"}\n{"question": \n', "line 2: not valid JSON"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b'{"question": "\xff", "answer": "1"}\n', "line 1: not UTF-8 text"),
        ("a.jsonl", b"[1, 2]\n", "line 1: no text in column 'question'; the row is not an object"),
        ("a.jsonl", b'{"question": null, "answer": "1"}\n', "line 1: no text in column 'question'; its columns are"),
        ("a.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_a_broken_data_file_is_refused_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        qa(path)


def test_a_missing_data_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl' does not exist; set qa_jsonl.path"):
        qa(tmp_path / "none.jsonl")


@pytest.mark.parametrize("content", ["", "  \n"])
def test_an_empty_context_file_is_refused(questions, tmp_path, content):
    path = tmp_path / "context.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="is empty; the teacher would see no context"):
        qa(questions, context="", context_file=str(path))


def test_parquet_and_jsonl_give_the_same_rows(questions, tmp_path):
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "questions.parquet")
    assert qa(tmp_path / "questions.parquet").splits == qa(questions).splits


def test_a_prompt_over_the_limit_is_an_error_that_names_the_row(tokenizer, world):
    rows = world.rows("train")
    with pytest.raises(ValueError, match=r"row '#1:\w{5}': its bare prompt has 10 tokens, .*max_bare_tokens = 9"):
        encode_rows(tokenizer, rows, PromptConfig(max_bare_tokens=9))


def test_or_it_is_dropped_and_counted_but_never_cut(tokenizer, world):
    rows = world.rows("train")
    encoded = encode_rows(tokenizer, rows, PromptConfig(max_bare_tokens=9, overlong="drop"))
    assert encoded.dropped == sum(len(row.question) == 8 for row in rows) > 0
    assert all(tokens in prompts.encode(tokenizer, [r._replace(context=None) for r in rows], PromptConfig())
               for tokens in encoded.bare)  # fmt: skip
    with pytest.raises(ValueError, match="none of 64 rows fits"):
        encode_rows(tokenizer, rows, PromptConfig(max_bare_tokens=3, overlong="drop"))


def test_retention_without_other_contexts_is_refused(tokenizer, questions):
    config = base.get_config()
    config.task, config.model.path, config.run_arms = "qa_jsonl", "/no/model", ("opcd_retained",)
    config.qa_jsonl.path, config.qa_jsonl.context, config.qa_jsonl.other_contexts_file = str(questions), "Think.", ""
    message = "needs other contexts .* task qa_jsonl has none; set qa_jsonl.other_contexts_file or qa_jsonl.other_rows"
    with pytest.raises(ValueError, match=message):
        run_inputs.encode_training_rows(config_lib.experiment(config, 1), qa(questions), tokenizer)


def test_a_context_index_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rules.context_index = 8; this world has tables 0 to 7"):
        rules.Rules(rules.RulesConfig(0, 8, 64, 16, 16, 0.0))


def test_more_questions_than_the_world_has_are_refused():
    with pytest.raises(ValueError, match="rules.dev_questions = 99999"):
        rules.Rules(rules.RulesConfig(0, 0, 64, 99999, 16, 0.0)).rows("dev")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        folder_lib.load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, tokenizer):
    bare = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template; put one into.*docs/models.md has one for base models"):
        folder_lib.load_tokenizer(tmp_path)
