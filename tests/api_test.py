"""The Python API: the same core as the commands, from a folder's name."""

import json
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import ctxjax
from ctxjax import config as config_lib, rng
from ctxjax.configs import debug
from ctxjax.data import prompts
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row
from ctxjax.host import command, workdir
from ctxjax.inputs import decoding

pytestmark = pytest.mark.usefixtures("two_devices")
CONTEXT = "f>b;a>e;c>d;b>a;e>f;d>c;"
QUESTIONS = ["#2:fac", "#1:abcde", "#3:fed"]


@pytest.fixture(scope="module")
def model(tables_folder, two_devices):
    return ctxjax.load_model(tables_folder)


def greedy(model, question: str, context: str | None, tokens: int) -> str:
    """A response by the definition: the logits' argmax, one whole pass for every token."""
    chat = [{"role": "system", "content": context}] if context is not None else []
    chat.append({"role": "user", "content": question})
    ids = list(model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    start = len(ids)
    for _ in range(tokens):
        row = np.zeros((2, 48), np.int32)  # of one length, so that one program serves; two devices want two rows
        row[:, -len(ids) :] = ids
        mask = np.broadcast_to(np.arange(48) >= 48 - len(ids), row.shape)
        ids.append(int(ctxjax.logits(model.params, model.config, row, mask)[0, -1].argmax()))
        if ids[-1] in model.stop_ids:
            break
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_generation_is_the_argmax_of_the_logits(model, context):
    answers = ctxjax.generate(model, QUESTIONS, context, max_tokens=4)
    assert answers == [greedy(model, question, context, 4) for question in QUESTIONS]


class Recorded(Exception):
    """Ends a call of generate once what it decodes is known."""


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("placement", ["system", "user", "prefix"])
def test_prompts_and_sampling_are_those_of_the_arguments(model, placement, thinking, monkeypatch):
    encoded, decoded, encode = [], [], prompts.encode

    def record(tokenizer, rows, config):
        encoded.append((tokenizer, rows, config))
        return encode(tokenizer, rows, config)

    def decode(*given):
        decoded.append(given)
        raise Recorded

    template = model.tokenizer.chat_template + "{% if enable_thinking %}\n{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    monkeypatch.setattr(prompts, "encode", record)
    monkeypatch.setattr(decoding, "decode", decode)
    sampling = {"max_tokens": 9, "temperature": 0.7, "top_k": 5, "top_p": 0.8}
    with pytest.raises(Recorded):
        ctxjax.generate(
            model, QUESTIONS, CONTEXT, **sampling, seed=3, placement=placement, thinking=thinking, batch_size=2
        )
    ((tokenizer, rows, config),) = encoded
    assert tokenizer is model.tokenizer and config == PromptConfig(placement=placement, thinking=thinking)
    assert rows == [Row(str(number), question, CONTEXT, "") for number, question in enumerate(QUESTIONS)]
    ((params, own, used, given, key, batch_size, mesh),) = decoded
    assert params is model.params and own is model.config and batch_size == 2 and mesh == ctxjax.api.get_mesh(params)
    assert {name: getattr(used, name) for name in sampling} == sampling
    assert (used.eos_ids, used.pad_id) == (model.stop_ids, model.pad_id)
    assert prompts.unpad(given) == encode(model.tokenizer, rows, config)
    assert (
        jax.random.key_data(key).tolist()
        == jax.random.key_data(rng.key_for(jax.random.key(3), 0, "evaluation")).tolist()
    )


def test_a_thinking_switch_that_the_model_lacks_is_an_error(model):
    with pytest.raises(ValueError, match="does not read enable_thinking, .* leave it unset"):
        ctxjax.generate(model, QUESTIONS, thinking=False)


@pytest.mark.slow
def test_samples_depend_on_the_seed_and_the_row_not_on_the_batch(model):
    def sample(**settings):
        return ctxjax.generate(model, QUESTIONS * 6, CONTEXT, max_tokens=8, temperature=1.0, **settings)

    assert sample(batch_size=8) == sample(batch_size=64)
    assert sample(seed=1) != sample(seed=0)


def test_other_parameters_answer_through_the_same_folder(model):
    zeros = jax.tree.map(lambda w: 0 * w, model.params)
    assert ctxjax.generate(model, QUESTIONS, params=zeros, max_tokens=4) != ctxjax.generate(
        model, QUESTIONS, max_tokens=4
    )


def test_a_response_beyond_the_models_positions_is_refused(model):
    message = r"max_tokens = 2040 are together more than the model's 2048 positions .*; lower max_tokens"
    with pytest.raises(ValueError, match=message):
        ctxjax.generate(model, QUESTIONS, CONTEXT, max_tokens=2040)


def test_no_questions_no_answers(model):
    assert ctxjax.generate(model, []) == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="it exports generate, load_model, logits, train"):
        ctxjax.fit  # noqa: B018


@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """(configuration, folder) of a run that ends before it begins: its arguments are what it returns."""
    monkeypatch.setattr("ctxjax.training.run.run", lambda *given: given)
    monkeypatch.setattr(command, "prepare", lambda config: None)  # it would change this process
    return debug.get_config(), tmp_path / "run"


def test_a_run_from_python_is_that_of_the_command(small_run):
    config, folder = small_run
    experiment, place, facts = ctxjax.train(config, str(folder))
    assert experiment == config_lib.experiment(config, jax.device_count()) and place == folder
    own = {"command": "ctxjax.train(config, workdir)", "started": facts["started"]}
    assert facts == workdir.collect_facts(config) | own


def test_training_refuses_with_the_remedy(small_run):
    config, folder = small_run
    for given, match in [
        (("configs/tiny.py", folder), "is not a ConfigDict; get one from configs"),
        ((config, "gs://bucket/run"), "workdir=gs://bucket/run is an address"),
        ((config, folder, "yes"), "resume = 'yes' is not known; choose from auto, never, must"),
        ((config, folder, "must"), "holds no run to go on with"),
    ]:
        with pytest.raises(ValueError, match=match):
            ctxjax.train(*given)
    config.train.steps = 0
    with pytest.raises(ValueError, match=r"train\.steps"):
        ctxjax.train(config, folder)
    assert not folder.exists()


TRAIN = """
import json, sys
from ctxjax.configs import debug
import ctxjax
config = debug.get_config()
config.base.cache, config.compile_cache = sys.argv[2], sys.argv[2] + "/xla"
results = ctxjax.train(config, sys.argv[1], resume="must")
print(json.dumps(results))
"""


@pytest.mark.slow
def test_training_returns_the_results_of_the_command(debug_run, tmp_path):
    """The command's finished run is resumed, from its checkpoints and evaluations."""
    run, _ = debug_run
    copy = shutil.copytree(run, tmp_path / "run")
    stored = json.loads((copy / "results.json").read_text())
    (copy / "results.json").unlink()
    line = [sys.executable, "-c", TRAIN, copy, run.parent / "cache"]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == json.loads((copy / "results.json").read_text()) == stored
    assert stored["off_policy"].keys() >= {"acc_x", "acc_x_ci", "acc_xc", "harm", "harm_ci"}


def test_the_package_is_imported_without_what_it_offers():
    code = "import sys, ctxjax; sys.exit(bool({'jax', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
