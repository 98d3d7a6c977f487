"""The two meters against a forward pass of their own: the teacher's responses without the context, and the base's."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import base
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.tasks import TASKS
from ctxjax.evaluation import meters as meters_lib
from ctxjax.evaluation.evaluator import Evaluator
from ctxjax.inputs.model_folder import open_folder
from ctxjax.models import transformer
from ctxjax.models.transformer import apply_head, head_weights
from ctxjax.sharding import make_mesh
from ctxjax.training import run as run_lib
from ctxjax.types import Rollout


@pytest.fixture(scope="module")
def mesh():
    one = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(one):
        yield one


@pytest.fixture(scope="module")
def make_evaluator(letters_folder, tmp_path_factory, mesh):
    """make_evaluator(**changes): of eight dev questions, and the model's folder."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}"}) + "\n" for n in range(24)))

    def make(**changes):
        config = base.get_config()
        config.model.path, config.qa_jsonl.path, config.qa_jsonl.context = str(letters_folder), str(path), "Say 7."
        config.qa_jsonl.dev_questions = config.qa_jsonl.test_questions = 6
        config.rollout.max_tokens, config.eval.batch_size, config.rollout.temperature = 5, 4, 0.8
        config.qa_jsonl.other_contexts_file = ""
        config.update_from_flattened_dict(changes)
        experiment = config_lib.experiment(config, 1)
        folder = open_folder(letters_folder, mesh)
        task = TASKS["qa_jsonl"][1](experiment.task_config)
        (evaluator,) = Evaluator.of_splits(experiment, task, ("dev",), folder, folder, mesh)
        return evaluator, folder

    return make


@functools.partial(jax.jit, static_argnames="model")
def log_softmax(params, model, tokens, mask, temperature):
    hidden = transformer.forward(params, model, tokens, mask)
    return jax.nn.log_softmax(apply_head(hidden, head_weights(params, model)) / temperature)


def logprobs(params, model, prompts, rollout, temperature):
    """Log-probabilities [n, T, V] of every next token, with the padding at the end of a row."""
    rows = prompts_lib.unpad(prompts)
    count, longest = rollout.tokens_BxT.shape[1], max(map(len, rows))
    tokens = np.zeros((len(rows), longest + count), np.int32)
    for row, prompt, response in zip(tokens, rows, rollout.tokens_BxT):
        row[: len(prompt) + count] = [*prompt, *response]
    found = np.asarray(log_softmax(params, model, tokens, np.ones(tokens.shape, bool), temperature))
    return np.array([row[len(ids) - 1 : len(ids) - 1 + count] for row, ids in zip(found, rows)])


def test_meters_are_off_by_default_and_then_nothing_is_measured(make_evaluator):
    evaluator, _ = make_evaluator()
    assert evaluator._measured == [] and not any("meter" in what or "gap" in what for what in evaluator._whats)


def test_the_drift_of_another_teacher_is_not_measured(monkeypatch, tmp_path):
    """It has not come from the base, and its evaluator would compare it with itself."""
    config = base.get_config()
    config.model.path, config.eval.meters = "/model", ("trace_gap", "drift")
    config, asked = config_lib.experiment(config, 1), []

    def of_splits(config, *given):
        asked.append(config.eval.meters)
        return [None]

    monkeypatch.setattr(run_lib, "Evaluator", SimpleNamespace(of_splits=of_splits))
    found = SimpleNamespace(metrics={"both_correct": 0.5})
    inputs = (None, SimpleNamespace(params={}), SimpleNamespace(params={}), None, None)
    shared = {"config": config, "inputs": inputs, "workdir": tmp_path, "evaluate": lambda *given: found, "seconds": {}}
    run_lib._evaluate_untrained(SimpleNamespace(**shared, mesh=None, test=None, dev=None))
    assert asked == [("trace_gap",)]


@pytest.mark.slow
def test_both_meters_are_those_of_a_pass_without_batches(make_evaluator, monkeypatch):
    monkeypatch.setattr(meters_lib, "EVERY", 48)
    evaluator, folder = make_evaluator(**{"eval.meters": ("trace_gap", "drift")})
    meters, model, params = evaluator._meters, folder.config, folder.params
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)

    prompts, traces = meters._traces
    mask = traces.mask_BxT
    chosen = np.take_along_axis(logprobs(moved, model, prompts, traces, 0.8), traces.tokens_BxT[..., None], -1)[..., 0]
    expected = traces.logprobs_BxT[mask].mean() - chosen[mask].mean()
    assert meters.measure("trace_gap", moved, "") == pytest.approx(expected, rel=1e-4)

    prompts, answers = meters._answers
    mask = answers.mask_BxT
    assert len(mask) == 8
    p, q = (logprobs(tree, model, prompts, answers, 0.8) for tree in (params, moved))
    expected = np.sum(np.exp(p) * (p - q), axis=-1)[mask].mean()
    assert expected > 1e-3 and meters.measure("drift", moved, "") == pytest.approx(expected, rel=1e-3)
    assert meters.measure("drift", params, "") == pytest.approx(0, abs=1e-6)

    again, _ = make_evaluator(**{"eval.meters": ("trace_gap", "drift")})  # a run that resumes samples the same
    jax.tree.map(np.testing.assert_array_equal, again._meters._traces, meters._traces)
    metrics = evaluator(moved).metrics
    assert metrics["drift"] == pytest.approx(expected, rel=1e-3) and isinstance(metrics["trace_gap"], float)
    assert {"drift", "trace_gap"} == metrics.keys() - make_evaluator()[0](moved).metrics.keys()


def test_what_is_cut_of_a_response_moves_its_tokens_to_the_front():
    rollout = Rollout(
        np.array([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]]),
        np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool),
        np.array([[-1.0, -2, -3, -4], [-5, -6, -7, 0], [-8, -9, 0, 0]]),
    )
    kept = meters_lib._drop_first(rollout, np.array([2, 0, 2]))
    assert [tokens[mask].tolist() for tokens, mask in zip(kept.tokens_BxT, kept.mask_BxT)] == [[3, 4], [5, 6, 7], []]
    assert kept.logprobs_BxT[kept.mask_BxT].tolist() == [-3, -4, -5, -6, -7]
    assert dataclasses.asdict(kept)["mask_BxT"][:, 0].tolist() == [True, True, False]
