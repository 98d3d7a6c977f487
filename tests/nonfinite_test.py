"""The file of a skipped step's rows: every prompt with its own teacher's prompt, response and loss."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ctxjax.data import prompts as prompts_lib
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.rollouts import StepInputs
from ctxjax.distill.train_step import StepConfig
from ctxjax.training import nonfinite
from ctxjax.types import Batch, Frozen, TrainState

LOSSES = {"bare": [0.5, np.nan, 1.5, np.inf], "other": [np.nan, 2.5]}


@pytest.fixture
def tokenizer():
    """Text of tokens: their numbers."""
    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    return SimpleNamespace(decode=decode, batch_decode=lambda lists: [decode(ids) for ids in lists])


@pytest.mark.parametrize("retains", [True, False])
def test_each_view_is_written_with_its_own_prompts_responses_and_losses(
    retains, make_prompts, make_rollout, tokenizer, tmp_path, monkeypatch
):
    bare, context, other = make_prompts(0, 4, 5), make_prompts(1, 4, 8), make_prompts(2, 2, 6)
    rollout, other_rollout = make_rollout(3, 4, 7), make_rollout(4, 2, 7) if retains else None
    batch = Batch(bare, context, other if retains else None, np.arange(40, 44, dtype=np.int32))
    state = TrainState(np.int32(9), {"w": np.ones(2)}, (), jax.random.key(0))
    sampled, measured = [], []

    def sample(state, frozen, batch, config, rollout, other_rollout):
        sampled.append((config, frozen))
        return jax.tree.map(lambda x: x + 0 * state.step if x.dtype != bool else x, (rollout, other_rollout))

    def losses(state, frozen, student, teacher, rollout, config):
        measured.append((student, teacher, int(state.step)))
        return np.array(LOSSES["bare" if len(rollout.mask_BxT) == 4 else "other"])

    monkeypatch.setattr(nonfinite, "rollout_step", sample)
    monkeypatch.setattr(nonfinite, "_compute_row_losses", losses)
    inputs = StepInputs(batch, rollout, other_rollout)
    config = StepConfig(None, None, None, LossConfig(), None)
    path = nonfinite.save_rows(tmp_path, state, None, inputs, config, 7, tokenizer)
    assert path == tmp_path / "not_finite_step_8.jsonl" and sampled == [(config, None)]
    views = [("bare", bare, context, rollout)] + [("other", other, other, other_rollout)] * retains
    assert len(measured) == len(views)
    for found, (_, student, teacher, _) in zip(measured, views):
        assert found[0] is student and found[1] is teacher and found[2] == 7
    expected = []
    for view, student, teacher, given in views:
        texts = [tokenizer.batch_decode(prompts_lib.unpad(prompts)) for prompts in (student, teacher)]
        for row, (loss, prompt, teacher_prompt) in enumerate(zip(LOSSES[view], *texts)):
            tokens = given.tokens_BxT[row][given.mask_BxT[row]].tolist()
            expected.append({
                "loss": loss if np.isfinite(loss) else None, "view": view, "row_number": 40 + row, "prompt": prompt,
                "teacher_prompt": teacher_prompt, "response": tokenizer.decode(tokens), "tokens": tokens,
                "logprobs": [-1.0] * len(tokens),
            })  # fmt: skip
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == sorted(expected, key=lambda row: row["loss"] is not None)


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_rows_are_compared_with_the_teacher_of_the_step(teacher, tiny_model, make_prompts, make_rollout, monkeypatch):
    found = []

    def values(networks, loss, rows):
        found.append(networks.teacher)
        return rows.weight_BxT

    monkeypatch.setattr(nonfinite, "distillation_values", values)
    config = StepConfig(tiny_model, tiny_model, None, LossConfig(teacher=teacher), None)
    state = TrainState(np.int32(9), {"w": np.ones(2)}, (), jax.random.key(0), {"w": np.full(2, 2.0)})
    frozen = Frozen({"w": np.full(2, 3.0)}, None, None)
    score = nonfinite._compute_row_losses.__wrapped__
    score(state, frozen, make_prompts(0, 4, 5), make_prompts(1, 4, 8), make_rollout(3, 4, 7), config)
    assert found[0]["w"][0] == (2 if teacher == "ema" else 3)


def test_rows_of_retention_are_judged_as_retention_is_whatever_distillation_is(
    tiny_model, make_prompts, tmp_path, monkeypatch
):
    found = {}

    def make_rows(view, *given):
        loss = given[-2].loss
        found[view] = loss.teacher, loss.divergence, loss.support
        return []

    monkeypatch.setattr(nonfinite, "_make_rows", make_rows)
    monkeypatch.setattr(nonfinite, "rollout_step", lambda state, frozen, batch, config, *rollouts: rollouts)
    batch = Batch(make_prompts(0, 4, 5), make_prompts(1, 4, 8), make_prompts(2, 2, 6), np.arange(4, dtype=np.int32))
    loss = LossConfig(teacher="ema", divergence="jsd", support="student_top_k", mu=1.0)
    config = StepConfig(tiny_model, tiny_model, None, loss, None)
    state = TrainState(np.int32(9), {"w": np.ones(2)}, (), jax.random.key(0), {"w": np.ones(2)})
    nonfinite.save_rows(tmp_path, state, Frozen({}, None, None), StepInputs(batch, None, None), config, 3, None)
    assert found == {"bare": ("ema", "jsd", "student_top_k"), "other": ("frozen", "forward_kl", "full")}
