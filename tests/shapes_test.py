"""Batch shapes: a limit is not a length, one long row is reported, and no draw goes on for ever."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import tiny
from ctxjax.data import prompts, shapes
from ctxjax.data.pipeline import RetentionRows, encode_rows, training_batches
from ctxjax.data.prompts import PromptConfig
from ctxjax.evaluation.evaluator import Split

LIMITS = PromptConfig(max_bare_tokens=1024, max_context_tokens=4096, overlong="drop")


def first_batch(tokenizer, task, config):
    encoded = encode_rows(tokenizer, task.rows("train"), config)
    retention = RetentionRows.build(tokenizer, task, encoded, config)
    return next(training_batches(encoded, retention, seed=0, batch_size=8, retention_rows=4, pad_id=0))


@pytest.mark.parametrize("shortest", [prompts.SHORTEST_PREFIX, 2])
def test_a_limit_that_no_row_reaches_changes_no_batch(tokenizer, world, monkeypatch, shortest):
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", shortest)
    limited, free = (first_batch(tokenizer, world, config) for config in (LIMITS, PromptConfig()))
    jax.tree.map(np.testing.assert_array_equal, limited, free)


def test_a_limit_that_no_row_reaches_pads_no_evaluation(tokenizer, world, mesh):
    config = config_lib.experiment(tiny.get_config(), 1)
    folder = SimpleNamespace(tokenizer=tokenizer, pad_id=0)
    free, limited = (
        Split.of(dataclasses.replace(config, prompt=prompt), world, "dev", folder, mesh)
        for prompt in (config.prompt, LIMITS)
    )
    assert limited.columns == free.columns and max(free.columns.values()) < 24


def test_long_contexts_do_not_pad_the_prompts_without_one(tokenizer, world, mesh, monkeypatch):
    def columns(repeats: int) -> tuple[int, int]:
        monkeypatch.setattr(world, "other_contexts", lambda split: [table * repeats, swapped * repeats])
        found = Split.of(config, world, "dev", SimpleNamespace(tokenizer=tokenizer, pad_id=0), mesh).columns
        return found["empty"], found["other"]

    config = config_lib.experiment(tiny.get_config(), 1)
    table, swapped = "a>b;b>c;c>d;d>e;e>f;f>a;", "a>c;b>a;c>b;d>f;e>d;f>e;"
    empty, other = columns(1)
    assert empty == other  # short: one program serves both
    empty, other = columns(20)
    assert empty < other / 2  # not one length, of which most is padding in the view without a context


def test_lengths_are_rounded_up_to_one_of_eight_between_powers_of_two():
    rounded = {n: shapes.round_columns(n) for n in range(1, 5000)}
    assert [rounded[n] for n in (1, 10, 18, 33, 67, 1000, 3998)] == [1, 10, 18, 36, 72, 1024, 4096]
    assert all(n <= size <= 1.125 * n for n, size in rounded.items())
    assert len({size for n, size in rounded.items() if 512 < n <= 1024}) == 8


def describe(lists, prefix=(), view="context"):
    return shapes.describe_outliers({view: lists}, {view: list(prefix)})


def test_one_row_that_pads_all_others_is_reported_with_the_limit_that_leaves_it_out():
    lists = [[1] * 40 + [2] * n for n in [*range(20, 30)] * 20] + [[1] * 40 + [2] * 400]
    for prefix in ([1] * 40, []):
        said = describe(lists, prefix)
        assert "1 of 201 context prompts pad all others: the longest has 440 tokens, the median 65" in said
        assert "prompt.max_context_tokens=69 with prompt.overlong=drop leaves them out" in said
    assert "prompt.max_bare_tokens=69" in describe(lists, view="bare")
    assert describe(lists, view="other").endswith("or leave them out of their file")
    assert not describe([ids for ids in lists if len(ids) <= 69], [1] * 40)
    assert not describe([[1] * 3, [1] * 9])


def test_other_contexts_over_the_limit_are_left_out_and_counted(tokenizer, world, monkeypatch):
    contexts = ["f>b;a>e;", "f>b;a>e;c>d;b>a;"]
    monkeypatch.setattr(world, "other_contexts", lambda split: contexts)
    monkeypatch.setattr(world, "rows_under", lambda row, context: [row._replace(context=context)])
    encoded = encode_rows(tokenizer, [row._replace(context="f>b;") for row in world.rows("train")], PromptConfig())
    whole = RetentionRows.build(tokenizer, world, encoded, PromptConfig())
    limit = min(map(len, whole.longest))
    limited = RetentionRows.build(tokenizer, world, encoded, PromptConfig(max_context_tokens=limit))
    assert (whole.contexts, whole.left_out) == (contexts, 0)
    assert (limited.contexts, limited.left_out) == (contexts[:1], 1)
    assert limited.shape.longest == limit < whole.shape.longest


def test_a_retention_row_that_cannot_be_drawn_is_an_error(tokenizer, world):
    encoded = encode_rows(tokenizer, world.rows("train"), PromptConfig())
    retention = RetentionRows.build(tokenizer, world, encoded, PromptConfig())
    never = dataclasses.replace(retention, longest=[[1, 2, 3]])
    with pytest.raises(ValueError, match=r"retention row 5: .* 64 questions .* 3 tokens,.*prompt.max_bare_tokens"):
        never.draw(0, 5)


def test_a_growing_conversation_has_few_sizes():
    sizes = [shapes.round_conversation(tokens) for tokens in range(1, 5001)]
    assert sorted(set(sizes)) == [256, 512, 1024, 2048, 3072, 4096, 5120]
    assert all(tokens <= size < max(257, 2 * tokens) for tokens, size in enumerate(sizes, start=1))
