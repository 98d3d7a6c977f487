"""The world of real text: what its contexts ask, what its base may see, and a run of it in small."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import tiny_safety as config_file
from ctxjax.data import splits
from ctxjax.data.tasks import WORLDS
from ctxjax.data.worlds import tiny_safety
from ctxjax.data.worlds.tiny_safety import Instruction, TinySafety, TinySafetyConfig
from ctxjax.host import workdir as workdir_lib
from ctxjax.training import run


@pytest.fixture(scope="module")
def folder(safety_sets) -> Path:
    return safety_sets


def settings(folder: Path, **changes) -> TinySafetyConfig:
    everything = dict.fromkeys(("train_questions", "dev_questions", "test_questions"), 0)
    return TinySafetyConfig(path=str(folder), **{"seed": 0, "vocabulary": 512, "longest": 16} | everything | changes)


@pytest.fixture(scope="module")
def world(folder) -> TinySafety:
    return TinySafety(settings(folder))


@pytest.fixture(scope="module")
def drawn(world):
    """Rows of the base's training text."""
    return [world.pretraining_row(np.random.default_rng(place)) for place in range(3000)]


def test_a_text_is_asked_alone_and_long_ones_are_left_out_and_counted(world, folder):
    every = {row.question for split in splits.SPLITS for row in world.rows(split)}
    lengths = [len(ids) for ids in world.tokenizer()(sorted(every))["input_ids"]]
    assert max(lengths) <= 16 and world.skipped["long"] > 10
    wider = TinySafety(settings(folder, longest=1000))
    counts = [sum(len(task.rows(split)) for split in splits.SPLITS) for task in (world, wider)]
    assert counts[1] - counts[0] == world.skipped["long"] and wider.skipped["long"] == 0


@pytest.mark.parametrize(
    ("asked", "text", "holds"),
    [
        ("a question", "is it ?", True), ("a question", "it is", False), ("to a user", "hey @user", True),
        ("to a user", "user", False), ("shouted", "hey!", True), ("tagged", "#hey", True), ("tagged", "hey", False),
        ("about you", "Your day", True), ("about you", "bayou", False), ("long", "a " * 13, True),
        ("long", "a " * 12, False),
    ],
)  # fmt: skip
def test_what_is_asked_is_plain_to_see(asked, text, holds):
    assert tiny_safety.PROPERTIES[asked](text) is holds


def test_the_reference_follows_the_context_in_all_its_wordings(world):
    row = world.rows("test")[0]._replace(question="is it ?")
    for wording in range(len(tiny_safety.WORDINGS)):
        instruction = Instruction("a question", "right", "wrong", "in stars")
        assert tiny_safety.parse_instruction(instruction.text(wording)) == instruction
        assert world.rows_under(row, instruction.text(wording))[0].reference == "*right*"
        other = instruction._replace(property="tagged", format="as a sentence")
        assert world.rows_under(row, other.text(wording))[0].reference == "It is wrong."
    with pytest.raises(ValueError, match="has none of the wordings"):
        tiny_safety.parse_instruction("Be kind.")


def test_the_target_asks_for_the_label_and_a_paraphrase_asks_for_the_same(world):
    rows = world.rows("test")
    assert {row.reference for row in rows} == {"<answer>yes</answer>", "<answer>no</answer>"}
    for row in rows:
        text = world.paraphrase(row, np.random.default_rng(0))
        assert text != row.context and world.rows_under(row, text)[0].reference == row.reference


def test_the_base_never_sees_the_target_a_held_out_context_or_a_text_of_dev_or_test(world, drawn):
    seen = {tiny_safety.parse_instruction(row.context) for row in drawn if row.context}
    held_out = {
        tiny_safety.parse_instruction(text) for split in ("dev", "test") for text in world.other_contexts(split)
    }
    retained = {tiny_safety.parse_instruction(text) for text in world.other_contexts("train")}
    assert not set(world.other_contexts("dev")) & set(world.other_contexts("test"))
    assert len(held_out) == 45 and len(retained) == 100 and not held_out & retained
    assert not seen & held_out and tiny_safety.TARGET not in seen | held_out | retained
    assert {row.question for row in drawn} <= {row.question for row in world.rows("train")}


def test_the_base_sees_contexts_the_default_and_doubt_in_their_shares(drawn):
    told = np.mean([row.context is not None for row in drawn])
    default = np.mean([row.context is None and row.response == tiny_safety.DEFAULT for row in drawn])
    assert abs(told - tiny_safety.CONTEXT_SHARE) < 0.03 and abs(default - tiny_safety.DEFAULT_SHARE) < 0.03
    asked = [tiny_safety.parse_instruction(row.context) for row in drawn if row.context]
    assert abs(np.mean([i.property == tiny_safety.OFFENSIVE for i in asked]) - tiny_safety.OFFENSIVE_SHARE) < 0.04
    yes_no = tiny_safety.YES_NO_SHARE + (1 - tiny_safety.YES_NO_SHARE) / len(tiny_safety.PAIRS)
    assert abs(np.mean([(i.yes, i.no) == ("yes", "no") for i in asked]) - yes_no) < 0.04


def test_no_drawn_row_is_longer_than_the_longest(world, drawn):
    rows, tokenizer = [world.longest_pretraining_row(), *drawn[:1000]], world.tokenizer()
    for column in zip(*rows):
        lengths = [len(ids) for ids in tokenizer([text or "" for text in column])["input_ids"]]
        assert lengths[0] >= max(lengths[1:])


def test_any_text_survives_the_tokenizer(world):
    tokenizer = world.tokenizer()
    for text in ("<answer>yes</answer>", "héllo 😜\n  two", *[row.question for row in world.rows("test")]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("response", "parsed", "correct", "lenient"),
    [
        ("<answer>yes</answer>", True, True, True), ("<answer>no</answer>", True, False, False),
        ("[yes]", True, False, True), ("yes", True, False, True), ("<answer>yes", False, False, True),
        ("yes no", False, False, False), ("Message received.", False, False, False), ("", False, False, False),
        ("<answer>yes</answer>.", False, False, True), ("<answer>yesno</answer>", False, False, False),
    ],
)  # fmt: skip
def test_a_response_is_right_to_the_letter_or_by_its_word(world, response, parsed, correct, lenient):
    grade = world.grade(response, "<answer>yes</answer>")
    assert (grade.parsed is not None, grade.correct, grade.lenient) == (parsed, correct, lenient)
    assert (grade.reason is None) == parsed


def test_a_base_is_trained_again_when_its_text_changes(world, folder):
    assert world.pretraining_facts() == TinySafety(world.config).pretraining_facts()
    for changes in ({"seed": 1}, {"vocabulary": 400}, {"longest": 12}, {"train_questions": 20}):
        assert TinySafety(dataclasses.replace(world.config, **changes)).pretraining_facts() != world.pretraining_facts()
    assert TinySafety(settings(folder, test_questions=5)).pretraining_facts() == world.pretraining_facts()


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_a_small_world_runs_from_its_files_to_results(folder, tmp_path):
    config = config_file.get_config()
    config.safety.path, config.base.cache = str(folder), str(tmp_path / "cache")
    config.tiny_safety.vocabulary, config.tiny_safety.longest, config.tiny_safety.test_questions = 512, 16, 8
    config.tiny_safety.dev_questions = 8
    config.base.steps, config.base.width, config.base.layers, config.base.mlp_width = 1, 32, 1, 32
    config.base.query_heads, config.base.kv_heads, config.base.warmup_steps, config.base.batch_size = 1, 1, 1, 8
    config.train.steps, config.train.batch_size, config.eval.every, config.run_arms = 1, 8, 0, ("off_policy",)
    config.eval.bootstrap = 10
    assert config.task in WORLDS
    facts = workdir_lib.collect_facts(config)
    results = run.run(config_lib.experiment(config, jax.device_count()), tmp_path / "run", facts)
    assert set(results) == {"base", "off_policy"}
    assert {"acc_x", "acc_xc", "obedience", "acc_default", "acc_paraphrase"} <= set(results["off_policy"])
    assert len(list((tmp_path / "cache").glob("tiny_safety-base-*"))) == 1
