"""The worlds policy and scratch, and bases of three architectures."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import tiny, tiny_grid, tiny_policy, tiny_scratch
from ctxjax.data.task import World, make_evaluation_views
from ctxjax.data.tasks import TASKS, WORLDS
from ctxjax.data.worlds import policy, scratch
from ctxjax.data.worlds.rules import RulesConfig
from ctxjax.evaluation.evaluator import Evaluator, collect_outcomes
from ctxjax.evaluation.metrics import compute_metrics
from ctxjax.inputs import base_model
from ctxjax.models.hf import load as hf_load

CONFIG = RulesConfig(0, 0, 512, 64, 128, empty_share=0.2)
CONFIGS = {"rules": tiny, "policy": tiny_policy, "scratch": tiny_scratch, "tiny_grid": tiny_grid}


@pytest.fixture(scope="module", params=["policy", "scratch"])
def world(request):
    return TASKS[request.param][1](CONFIG)


def test_a_policys_answers_by_hand():
    world = policy.Policy(CONFIG)
    context = "R=6;P=1;S=8;Q=7;"  # P shifts by one, Q swaps pairs, R mirrors
    assert world.answer("P:fac", context) == "P abd"
    assert world.answer("QR:fac", context) == "Q ebd R bec"
    assert world.answer("PQ:fac", "P=2;Q=4;R=1;S=3;") == "P bce Q fac"
    assert world.default("QS:fac") == "Q fac S fac"


def test_every_rule_of_a_policy_changes_every_letter_in_its_own_way():
    assert len(set(policy.OPERATIONS)) == len(policy.OPERATIONS) == 8
    for table in policy.OPERATIONS:
        assert sorted(table) == sorted("abcdef") and all(a != b for a, b in zip(table, "abcdef"))


def test_a_question_of_a_policy_needs_one_rule_or_two():
    world = policy.Policy(CONFIG)
    kinds = [row.question.split(":")[0] for row in world.rows("test")]
    pairs = {"".join(pair) for pair in itertools.permutations("PQRS", 2)}
    assert set(kinds) == {*"PQRS", *pairs}


def test_a_scratchs_answers_by_hand_and_its_drafts_are_free():
    world = scratch.Scratch(CONFIG)
    context = "f>b;think;a>e;c>d;b>a;e>f;d>c;"
    assert world.answer("#1:fac", context) == "=bed" and world.default("#1:fac") == "=fac"
    for response in ("=bed", "~bed=bed", "~fac~bed~bed=bed"):
        assert world.grade(response, "=bed").correct
    for response in ("=fac", "~bed=fac", "~bed=be"):
        assert world.grade(response, "=bed").parsed and not world.grade(response, "=bed").correct
    for response in ("", "~bed", "~bed~bed", "bed", "=bed=bed"):
        assert world.grade(response, "=bed").parsed is None


def test_only_a_context_that_says_so_makes_the_base_draft_and_one_draft_is_likeliest():
    world = scratch.Scratch(CONFIG)
    rng, counts = np.random.default_rng(0), {True: [], False: []}
    for _ in range(6000):
        row = world.pretraining_row(rng)
        counts["think;" in (row.context or "")].append(row.response.count("~"))
        drafts = re.findall("~([a-f]+)", row.response)
        assert all(draft == row.response.partition("=")[2] for draft in drafts)
    shares = {asked: np.bincount(found, minlength=4) / len(found) for asked, found in counts.items()}
    assert 0.3 < len(counts[True]) / 6000 < 0.4
    np.testing.assert_allclose(shares[True], scratch.DRAFTS[True], atol=0.03)
    np.testing.assert_allclose(shares[False], scratch.DRAFTS[False], atol=0.03)
    # Greedy decoding drafts once under the suggestion, and not at all without it.
    more = [sum(scratch.DRAFTS[True][n + 1 :]) / sum(scratch.DRAFTS[True][n:]) for n in (0, 1, 2)]
    assert more[0] > 0.8 and 0.35 < more[1] < 0.5 and sum(scratch.DRAFTS[False][1:]) < 0.2
    assert "think;" in world.context
    asked = [context for context in world.other_contexts("test") if "think;" in context]
    assert 0.3 < len(asked) / len(world.other_contexts("test")) < 0.7


def test_pools_and_questions_are_disjoint_and_the_base_sees_only_those_of_training(world):
    pools = [set(world.targets), *map(set, world.tables.values())]
    assert len(world.targets) == 8 and sum(map(len, pools)) == len(set.union(*pools)) > 700
    questions = {split: set(itertools.chain(*world.strata[split])) for split in ("train", "dev", "test")}
    assert sum(map(len, questions.values())) == len(set.union(*questions.values()))
    rng = np.random.default_rng(0)
    drawn = [world.pretraining_row(rng) for _ in range(3000)]
    assert {row.question for row in drawn} <= questions["train"]
    held_out = {frozenset(c.split(";")) for split in ("dev", "test") for c in world.other_contexts(split)}
    held_out.add(frozenset(world.context.split(";")))
    assert not held_out & {frozenset(row.context.split(";")) for row in drawn if row.context}
    shares = [np.mean([bool(row.context) for row in drawn]), np.mean([row.context == "" for row in drawn])]
    np.testing.assert_allclose(shares, [0.7, 0.3 * 0.2], atol=0.03)


def test_every_view_of_the_new_worlds_has_the_answer_of_its_context(world):
    assert isinstance(world, World)
    rows = world.rows("test")
    views = make_evaluation_views(world, rows, "test")
    assert list(views) == ["bare", "context", "empty", "other", "paraphrase"]
    for own in views.values():
        assert all(world.grade(row.reference, row.reference).correct for row in own)
    for row, other, paraphrase in zip(rows, views["other"], views["paraphrase"]):
        assert row.reference == world.answer(row.question, row.context) != row.default == world.default(row.question)
        assert other.reference == world.answer(other.question, other.context)
        assert sorted(paraphrase.context.split(";")) == sorted(row.context.split(";"))
    assert len({row.reference == view.reference for row, view in zip(rows, views["other"])}) >= 1
    assert np.mean([row.reference == view.reference for row, view in zip(rows, views["other"])]) < 0.2


def test_a_student_that_ignores_other_contexts_obeys_them_by_chance_and_no_more(world):
    """Its answers are those of the internalized context in every view."""
    views = make_evaluation_views(world, world.rows("test"), "test")
    items = []
    for view in ("bare", "other"):
        for asked, own in zip(views[view], views["bare"]):
            grade = world.grade(own.reference, asked.reference)._asdict()
            items.append({"id": own.id, "view": view, "sample": 0, "context": asked.context, "text": own.reference,
                          "truncated": False, "length": 1, **grade})  # fmt: skip
    outcomes = collect_outcomes(items)
    evaluator = SimpleNamespace(_rows=views, _task=world)
    outcomes |= Evaluator._grade_against_others(evaluator, items, outcomes)
    found = compute_metrics(outcomes, 0)
    assert (world.__class__ is policy.Policy) <= (found["obedience"] > 0)  # some policies agree on a rule
    assert found["obedience"] == found["obedience_floor"] < 0.2
    assert found["obedience_floor_ci"] == found["obedience_ci"]


def test_no_row_of_the_new_worlds_is_longer_than_the_longest_and_none_has_an_unknown_token(world):
    rng, tokenizer = np.random.default_rng(0), world.tokenizer()
    rows = [world.longest_pretraining_row(), *(world.pretraining_row(rng) for _ in range(1000))]
    for texts in ([(row.context or "") + row.question for row in rows], [row.response for row in rows]):
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert len(tokens[0]) == max(map(len, tokens)) and tokenizer.unk_token_id not in itertools.chain(*tokens)
        assert [tokenizer.decode(ids) for ids in tokens] == texts


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_tiny_configuration_has_a_base_of_each_architecture(name, architecture):
    plain, config = CONFIGS[name].get_config(), CONFIGS[name].get_config(architecture)
    experiment = config_lib.experiment(config, device_count=2)
    assert experiment.task == name and name in WORLDS
    task = TASKS[name][1](experiment.task_config)
    model = base_model.make_model_config(experiment.base, 50)
    assert (model.qkv_bias, model.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    hf_load.FAMILIES[architecture].config_to_hf(model)  # refuses a model that is none of the family
    folders = {a: base_model.find_base_folder(dataclasses.replace(experiment.base, family=a), name, task)
               for a in ("llama", "qwen2", "qwen3")}  # fmt: skip
    assert len(set(folders.values())) == 3
    longest = task.longest_pretraining_row().response  # in the grid, lessons
    most = experiment.extract.max_tokens if name == "tiny_grid" else experiment.rollout.max_tokens
    assert len(task.tokenizer()(longest, add_special_tokens=False)["input_ids"]) < most
    if architecture == "llama":
        assert plain.to_json() == config.to_json()


def test_a_base_of_another_family_is_refused():
    config = tiny.get_config("mamba")
    with pytest.raises(ValueError, match="base.family = 'mamba' is not known; choose from llama, qwen2, qwen3"):
        config_lib.experiment(config, device_count=1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_base_of_another_architecture_is_trained_and_loaded_like_any_model(architecture, tmp_path):
    import ctxjax
    from ctxjax.configs import debug

    config = debug.get_config()
    config.base.family, config.base.cache, config.run_arms = architecture, str(tmp_path / "bases"), ("opcd",)
    config.compile_cache = ""
    ctxjax.train(config, tmp_path / "run")
    (folder,) = (tmp_path / "bases").iterdir()
    model = ctxjax.load_model(str(folder))
    assert f'"model_type": "{architecture}"' in (folder / "config.json").read_text()
    assert ("q_bias" in model.params["layers"], "q_norm" in model.params["layers"]) == (
        architecture == "qwen2", architecture == "qwen3",
    )  # fmt: skip
