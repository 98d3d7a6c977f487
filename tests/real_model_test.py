"""Compare SmolLM2-135M-Instruct, a real model, with transformers: tokens, logits, greedy tokens, loss, gradient.

Skipped unless CTXJAX_REAL_MODEL names its folder. The tests need torch, some 8 GiB of memory and some minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import ctxjax
from ctxjax import sharding
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row
from ctxjax.distill import losses, objective
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import Networks, WeightedBatch
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, init_state, train_step
from ctxjax.models import transformer
from ctxjax.models.hf import save as hf_save
from ctxjax.models.lora import TARGETS, LoraConfig
from ctxjax.types import Batch, Frozen, Rollout

FOLDER = os.environ.get("CTXJAX_REAL_MODEL")
if not FOLDER:
    pytest.skip("CTXJAX_REAL_MODEL names no folder of SmolLM2-135M-Instruct", allow_module_level=True)
torch = pytest.importorskip("torch", reason="the reference needs torch")
import transformers  # noqa: E402

pytestmark = pytest.mark.slow

CONTEXT = "You answer questions about Crystalwater.\n- The capital is Ironstone.\n- The motto is: freedom and skill."
QUESTIONS = ["What is the capital of Crystalwater?", "What is the motto of Crystalwater? Answer in one sentence."]
ANSWERS = [" The capital is Ironstone.", " Its motto is freedom and skill, which all of them know."]


@pytest.fixture(scope="module")
def model():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield ctxjax.load_model(FOLDER, mesh)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_tokens_are_the_published_ones(model):
    assert model.tokenizer("Answer:\n\n1.")["input_ids"] == [21350, 42, 1116, 33, 30]
    assert set(model.stop_ids) == {2} and model.tokenizer.decode([2]) == "<|im_end|>"


def test_it_knows_the_capital_of_france(model):
    (text,) = ctxjax.generate(model, ["What is the capital of France?"], max_tokens=16)
    assert "Paris" in text


def test_logits_and_64_greedy_tokens_are_those_of_transformers(model, theirs):
    (ids,) = prompts_lib.encode(model.tokenizer, [Row("0", "Tell me a story about a fox.", None, "")], PromptConfig())
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        # Without a mask, the end tokens of the prompt would pass for padding, which has the same id.
        read = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones((1, len(ids)), dtype=torch.long)}
        out = theirs.generate(**read, max_new_tokens=64, do_sample=False, eos_token_id=None)
    tokens, mask = np.array([ids], np.int32), np.ones((1, len(ids)), bool)
    ours = np.asarray(ctxjax.logits(model.params, model.config, tokens, mask))[0]
    assert np.abs(ours - expected).max() <= 2e-4 * np.abs(expected).max()
    (text,) = ctxjax.generate(model, ["Tell me a story about a fox."], max_tokens=64)
    said = model.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert said.startswith(text) and len(text) > 100


def make_rows(model) -> tuple[Batch, Rollout]:
    """Two questions in both views, with given responses of unequal length."""
    rows = [Row(str(i), question, CONTEXT, "") for i, question in enumerate(QUESTIONS)]
    bare, context = (
        prompts_lib.encode(model.tokenizer, own, PromptConfig())
        for own in ([row._replace(context=None) for row in rows], rows)
    )
    views = [prompts_lib.left_pad(ids, max(map(len, ids)), model.pad_id) for ids in (bare, context)]
    answers = [[*ids, 2] for ids in model.tokenizer(ANSWERS, add_special_tokens=False)["input_ids"]]
    width = max(map(len, answers))
    tokens, mask = np.full((2, width), model.pad_id, np.int32), np.zeros((2, width), bool)
    for row, ids in enumerate(answers):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    batch = Batch(*views, other=None, row_number_B=np.arange(2, dtype=np.int32))
    return batch, Rollout(tokens, mask, np.zeros(tokens.shape, np.float32))


def compute_in_torch(network, prompts, rollout) -> torch.Tensor:
    """log p(. | prompt, y<t) of every response token of every row, [tokens, V]: each row alone, without padding."""
    parts = []
    for row in range(2):
        prompt = prompts.tokens_BxP[row][prompts.mask_BxP[row]].tolist()
        answer = rollout.tokens_BxT[row][rollout.mask_BxT[row]].tolist()
        logits = network(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        parts.append(torch.log_softmax(logits, dim=-1))
    return torch.cat(parts)


def kl(p, q) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1).mean()


def test_loss_and_every_row_of_the_gradient_are_those_of_an_independent_program(model, theirs, tmp_path):
    """L = KL(q_x || f) + 0.5 KL(sg q_x || q_c) of a student whose layers have moved a little from the teacher."""
    batch, rollout = make_rows(model)
    noise = np.random.default_rng(0)

    def move(path, leaf):
        is_matrix = leaf.ndim == 3
        change = 0.02 * np.asarray(leaf).std() * noise.standard_normal(leaf.shape, np.float32) if is_matrix else 0
        return jax.device_put(leaf + change, leaf.sharding)

    student = jax.tree_util.tree_map_with_path(move, model.params)
    hf_save.save(tmp_path / "student", student, model.config, model.tokenizer, (2,), "llama")
    moved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    q_x = compute_in_torch(moved, batch.bare, rollout)
    with torch.no_grad():
        f = compute_in_torch(theirs, batch.context, rollout)
    q_c = compute_in_torch(moved, batch.context, rollout)
    expected = kl(q_x, f) + 0.5 * kl(q_x.detach(), q_c)
    expected.backward()
    assert 0.01 < expected.item() < 10

    config = LossConfig(beta=0.5, chunk=8)
    weight = losses.token_weights(rollout.mask_BxT, config.averaging)
    rows = WeightedBatch(*sharding.put_batch((batch, rollout, np.asarray(weight)), jax.sharding.get_mesh()))

    @jax.jit
    @jax.value_and_grad
    def loss_of(student, teacher):
        networks = Networks(student, teacher, None, model.config, model.config)
        return objective.objective(networks, config, rows, 0)[0]

    loss, gradient = loss_of(student, model.params)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    hf_save.save(tmp_path / "gradient", gradient, model.config, model.tokenizer, (2,), "llama")
    ours = load_file(tmp_path / "gradient" / "model.safetensors")
    compared = 0
    for name, parameter in moved.named_parameters():
        wanted, found = parameter.grad.numpy(), ours[name]
        if wanted.ndim == 1:  # a norm's weights: one row
            wanted, found = wanted[None], found[None]
        rows = np.linalg.norm(wanted, axis=1)
        # Rounding is that of the sum's parts: on some machines a row of 2e-6 of its matrix is off by 1.4e-3 of itself.
        off = np.linalg.norm(found - wanted, axis=1) / np.maximum(rows, 1e-5 * np.linalg.norm(rows))
        if "embed_tokens" in name:
            off[theirs.config.pad_token_id] = 0  # torch gives the padding token, here the end token too, no gradient
        assert off.max() <= 1e-3, (name, int(off.argmax()), float(off.max()))
        compared += len(wanted)
    assert compared > 49152  # every row of every matrix, the embedding's too


def test_an_export_goes_back_to_transformers(model, theirs, tmp_path):
    hf_save.save(tmp_path / "out", model.params, model.config, model.tokenizer, model.stop_ids, "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert (Path(FOLDER) / "tokenizer.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()


def test_two_steps_of_an_adapter_move_the_adapter_and_nothing_else(model):
    batch, rollout = make_rows(model)
    sampling = SamplingConfig(max_tokens=rollout.tokens_BxT.shape[1], eos_ids=(2,), pad_id=model.pad_id)
    config = StepConfig(
        model.config, model.config, sampling, LossConfig(beta=0.5, chunk=8), OptimConfig(lr=1e-3, steps=2),
        LoraConfig(4, 8.0, TARGETS),
    )  # fmt: skip
    frozen, before = Frozen(model.params, model.params), np.asarray(model.params["layers"]["q"][0])
    state = init_state(model.params, config, jax.random.key(0))
    batch, rollout = sharding.put_batch((batch, rollout), jax.sharding.get_mesh())
    distances = []
    for _ in range(2):
        state, metrics = train_step(state, frozen, batch, config, rollout)
        distances.append(float(metrics["distill"]))
    assert 0 < distances[1] < distances[0] and float(metrics["skipped"]) == 0
    assert np.abs(np.asarray(state.params["layers"]["q_lora_b"])).max() > 0
    np.testing.assert_array_equal(before, np.asarray(model.params["layers"]["q"][0]))
    assert transformer.param_specs(model.config).keys() == model.params.keys()
