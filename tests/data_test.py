"""Tasks, prompts and the order of data."""

import itertools

import numpy as np
import pytest

from ctxjax.data import prompts
from ctxjax.data.pipeline import RetentionRows, encode_rows, training_batches
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row, make_evaluation_views
from ctxjax.data.worlds import rules

CONTEXT = "f>b;a>e;c>d;b>a;e>f;d>c;"


@pytest.fixture(scope="module")
def world():
    return rules.Rules(rules.RulesConfig(0, 0, 512, 64, 128, empty_share=1 / 3))


def test_the_worlds_answers_by_hand():
    assert rules.answer("#2:fac", rules.parse_table(CONTEXT)) == "s1 bed s2 afc"


def test_targets_are_six_cycles_and_all_pools_are_disjoint(world):
    assert len(world.targets) == 8 and all(rules.is_six_cycle(table) for table in world.targets)
    assert not rules.is_six_cycle("badcfe") and not rules.is_six_cycle("abcdef")
    pools = [set(world.targets), *(set(tables) for tables in world.tables.values())]
    assert sum(len(pool) for pool in pools) == len(set.union(*pools)) == 720


def test_splits_share_no_question_and_the_base_sees_only_training_ones(world):
    questions = {split: set(itertools.chain(*world.strata[split])) for split in ("train", "dev", "test")}
    assert sum(len(part) for part in questions.values()) == len(set.union(*questions.values())) == 27864
    for split, part in questions.items():
        assert set(world.choose_questions(split)) <= part
    rng = np.random.default_rng(0)
    drawn = [world.pretraining_row(rng) for _ in range(2000)]
    assert {question for question, _, _ in drawn} <= questions["train"]
    tables = {"".join(v for _, v in sorted(rules.parse_table(c).items())) for _, c, _ in drawn if c}
    assert tables <= set(world.tables["train"])


def test_the_base_sees_tables_defaults_and_doubt_in_their_shares(world):
    rng = np.random.default_rng(0)
    drawn = [world.pretraining_row(rng) for _ in range(4000)]
    told = np.mean([bool(context) for _, context, _ in drawn])
    empty = np.mean([context == "" for _, context, _ in drawn])
    copied = np.mean([not c and a == rules.answer(q, {x: x for x in rules.LETTERS}) for q, c, a in drawn])
    assert abs(told - 0.7) < 0.03 and abs(empty - 0.1) < 0.02 and abs(copied - 0.15) < 0.02


def test_no_pretraining_row_is_longer_than_the_longest(world):
    rng, tokenizer = np.random.default_rng(0), world.tokenizer()
    rows = [world.longest_pretraining_row(), *(world.pretraining_row(rng) for _ in range(500))]
    for texts in ([(row.context or "") + row.question for row in rows], [row.response for row in rows]):
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        assert lengths[0] == max(lengths[1:])


@pytest.mark.parametrize(
    ("response", "parsed", "correct"),
    [
        ("s1 bed s2 afc", True, True),
        ("s1 bed s2 afd", True, False),
        ("s1 bed", True, False),
        ("s2 afc", False, False),
        ("bed afc", False, False),
        ("", False, False),
    ],
)
def test_rules_grading(world, response, parsed, correct):
    grade = world.grade(response, "s1 bed s2 afc")
    assert (grade.parsed is not None, grade.correct) == (parsed, correct)


def test_every_view_keeps_its_reference(world):
    rows = world.rows("test")
    views = make_evaluation_views(world, rows, "test")
    assert list(views) == ["bare", "context", "empty", "other", "paraphrase"]
    wordings = [world.paraphrase(row, np.random.default_rng(number)) for number, row in enumerate(rows)]
    assert views["paraphrase"] == [row._replace(context=wording) for row, wording in zip(rows, wordings)]
    for row, other, paraphrase in zip(rows, views["other"], views["paraphrase"]):
        assert other.reference == rules.answer(row.question, rules.parse_table(other.context))
        assert rules.parse_table(paraphrase.context) == rules.parse_table(row.context)
    assert {row.context for row in views["bare"]} == {None} and {row.context for row in views["empty"]} == {""}
    held_out = set(world.other_contexts("test"))
    assert {row.context for row in views["other"]} <= held_out
    assert not held_out & set(world.other_contexts("train")) and not held_out & set(world.other_contexts("dev"))


def test_text_survives_the_tokenizer(tokenizer):
    for text in ("s1 bed s2 afc", "s1 abcde s2 abcde s3 fffff"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]) == 6


def test_the_views_differ_by_the_context_block_alone(tokenizer):
    row = Row("", "#2:fac", CONTEXT, "")
    assert prompts.render(tokenizer, row._replace(context=None), PromptConfig()) == (
        "<|begin|><|user|>#2:fac<|end|><|assistant|>"
    )
    assert prompts.render(tokenizer, row, PromptConfig()) == (
        f"<|begin|><|system|>{CONTEXT}<|end|><|user|>#2:fac<|end|><|assistant|>"
    )
    assert "<|system|><|end|>" in prompts.render(tokenizer, row._replace(context=""), PromptConfig())
    assert prompts.render(tokenizer, row, PromptConfig("user")) == (
        f"<|begin|><|user|>{CONTEXT}\n\n#2:fac<|end|><|assistant|>"
    )


def test_special_tokens_are_written_once(tokenizer):
    ids = prompts.encode(tokenizer, [Row("", "#2:fac", None, "")], PromptConfig())[0]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_left_padding_by_example():
    padded = prompts.left_pad([[17, 4, 9], [5]], 4, pad_id=0)
    assert padded.tokens_BxP.tolist() == [[0, 17, 4, 9], [0, 0, 0, 5]]
    assert padded.mask_BxP.tolist() == [[False, True, True, True], [False, False, False, True]]
    with pytest.raises(ValueError, match="3 tokens of its own does not fit into 2"):
        prompts.left_pad([[1, 2, 3]], 2, pad_id=0)


def batches(tokenizer, world, first_step, count, seed=0):
    encoded = encode_rows(tokenizer, world.rows("train"), PromptConfig())
    retention = RetentionRows.build(tokenizer, world, encoded, PromptConfig())
    stream = training_batches(
        encoded, retention, seed=seed, batch_size=32, retention_rows=8, pad_id=0, first_step=first_step
    )
    return list(itertools.islice(stream, count))


def test_a_prompt_without_the_context_saves_its_block(tokenizer, world):
    rows = world.rows("train")
    assert encode_rows(tokenizer, rows, PromptConfig()).saved_tokens == 8  # <|system|>, six pairs of letters, <|end|>
    bare = [row._replace(context=None) for row in rows]
    assert encode_rows(tokenizer, bare, PromptConfig()).saved_tokens == 0
    some = [*rows[:3], *bare[3:8]]
    assert encode_rows(tokenizer, some, PromptConfig()).saved_tokens == 0  # the median


def test_a_run_that_starts_at_step_17_sees_what_an_uninterrupted_one_sees_there(tokenizer, world):
    whole = batches(tokenizer, world, 0, 20)
    for ours, theirs in zip(batches(tokenizer, world, 17, 3), whole[17:]):
        np.testing.assert_array_equal(ours.bare.tokens_BxP, theirs.bare.tokens_BxP)
        np.testing.assert_array_equal(ours.other.tokens_BxP, theirs.other.tokens_BxP)
        np.testing.assert_array_equal(ours.row_number_B, theirs.row_number_B)


def test_an_epoch_shows_every_question_once_and_the_next_one_in_another_order(tokenizer, world):
    def text(batch):
        return [tuple(tokens[mask]) for tokens, mask in zip(batch.bare.tokens_BxP, batch.bare.mask_BxP)]

    seen = [row for batch in batches(tokenizer, world, 0, 32) for row in text(batch)]
    assert len(set(seen[:512])) == len(set(seen[512:])) == 512
    assert seen[:512] != seen[512:]
    other_seed = [row for batch in batches(tokenizer, world, 0, 16, seed=1) for row in text(batch)]
    assert other_seed != seen[:512]


def test_both_views_of_a_row_ask_the_same_question(tokenizer, world):
    batch = batches(tokenizer, world, 0, 1)[0]
    for bare, context in zip(batch.bare.tokens_BxP, batch.context.tokens_BxP):
        assert tokenizer.decode(context).endswith(tokenizer.decode(bare).split("<|begin|>")[1])
    assert batch.bare.tokens_BxP.shape[0] == 32 and batch.other.tokens_BxP.shape[0] == 8


def test_batches_with_shared_prefixes_are_the_same_prompts(tokenizer, world, monkeypatch):
    whole = batches(tokenizer, world, 0, 2)
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", 2)
    for batch, expected in zip(batches(tokenizer, world, 0, 2), whole):
        assert len(batch.context.prefix_C) == 10  # template and table; the question's "#n:" differs
        for view in ("bare", "context", "other"):
            ours, theirs = getattr(batch, view), getattr(expected, view)
            assert theirs.prefix_C is None and len(ours.prefix_C) >= 2
            for row in range(ours.tokens_BxP.shape[0]):
                tokens = [*ours.prefix_C, *ours.tokens_BxP[row][ours.mask_BxP[row]]]
                assert tokens == list(theirs.tokens_BxP[row][theirs.mask_BxP[row]])
