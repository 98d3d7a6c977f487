"""The reasoning of a teacher that thinks: what is kept and cut of its samples."""

import dataclasses
import json

import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import tiny
from ctxjax.data import responses
from ctxjax.data.grading import graders
from ctxjax.data.worlds import word_tokenizer
from ctxjax.inputs import teacher_samples

END = 2


def test_the_reasoning_of_a_family_with_tags_of_its_own_is_reasoning():
    """Seed-OSS writes <seed:think>; grading and cutting know <think>."""
    made = word_tokenizer.build(["<seed:think>", "</seed:think>", *"ab"], r"</?seed:think>|[ab]")
    tokens = made("<seed:think>a</seed:think>b", add_special_tokens=False)["input_ids"]
    (text,) = responses.decode(made, [tokens], [])
    assert "".join(text.split()) == "<think>a</think>b" and graders.grade_short(text, "b").correct
    assert not graders.grade_short(text, "a").correct
    place = responses.find_answer(made, tokens, [], opened=False)
    assert tokens[place:] == made("b", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def tokenizer():
    made = word_tokenizer.build([*"abc", "<think>", "</think>", " ", "\n", "</", "think", ">"], r"</?think>|[\s\S]")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


@pytest.mark.parametrize(
    ("said", "opened", "answer"),
    [
        ("<think>ab</think>\n\nc a", False, "c a"),
        ("ab</think> c", True, "c"),
        ("<think>a</think>b<think>a</think>c", False, "c"),
        ("a b", False, "a b"),
        ("ab", True, ""),
        ("<think>ab", False, ""),
        ("<think>ab</think>\n", False, ""),
        ("<think>ab</think>", False, ""),
        ("<think>ab</think>c<think>", False, ""),
        ("", False, ""),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_the_answer_follows_the_reasoning(tokenizer, said, opened, answer, ended):
    end = [tokenizer.eos_token_id] * ended
    tokens = [*tokenizer(said, add_special_tokens=False)["input_ids"], *end]
    place = responses.find_answer(tokenizer, tokens, end, opened)
    kept = tokens[place:]
    wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert kept == ([*wanted, *end] if answer or not said and not opened else [])


def test_a_tag_of_several_tokens_is_found(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    tokens = [*ids(["a", "</", "think", ">", " ", "b"])]
    assert tokens[responses.find_answer(tokenizer, tokens, [], opened=True) :] == [ids("b")]


def experiment(reasoning: str):
    config = tiny.get_config()
    config.model.path, config.run_arms, config.teacher.reasoning = "/model", ("sft",), reasoning
    config.train.batch_size, config.rollout.max_tokens = 8, 4
    return config_lib.experiment(config, 1)


def write(path, lengths):
    rows = [{"step": 1, "tokens": [3] * n, "logprobs": [-1.0] * n} for n in lengths]
    (path / teacher_samples.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_samples(path, monkeypatch, reasoning):
    monkeypatch.setattr(teacher_samples, "steps_with_samples", lambda config, arm: [0])
    folder = dataclasses.make_dataclass("Folder", ["pad_id"])(0)
    inputs = dataclasses.make_dataclass("Inputs", ["student"])(folder)
    return teacher_samples.open_teacher_samples(experiment(reasoning), inputs, path, None)


def test_a_sample_without_an_answer_is_warned_of_and_not_trained_on(tmp_path, monkeypatch, capsys):
    write(tmp_path, [2, 0, 4, 1, 1, 1, 1, 0])
    rollout = open_samples(tmp_path, monkeypatch, "cut")[0]
    assert np.array_equal(rollout.mask_BxT.sum(axis=1), [2, 0, 4, 1, 1, 1, 1, 0])
    said = capsys.readouterr().out
    assert "warning: 2 of 8 of the teacher's samples have no answer after their reasoning" in said
    with pytest.raises(ValueError, match="does not hold 8 responses of at most 4 tokens for step 1"):
        open_samples(tmp_path, monkeypatch, "keep")


def test_samples_that_are_all_reasoning_end_the_run(tmp_path, monkeypatch):
    write(tmp_path, [0] * 8)
    with pytest.raises(ValueError, match=r"8 of 8 of the teacher's samples have no answer .*max_tokens = 4 .*; raise"):
        open_samples(tmp_path, monkeypatch, "cut")
