"""Positions, attention masks, and the one place where tokens are shifted."""

import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import masks
from ctxjax.types import Prompts, Rollout

T, F = True, False


def test_positions_count_real_tokens_from_zero():
    mask = jnp.array([[F, F, T, T, T], [T, T, T, T, T], [F, T, T, F, F]])
    np.testing.assert_array_equal(masks.positions(mask), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 1]])


def test_positions_are_not_limited_by_the_mask_dtype():
    assert masks.positions(jnp.ones((1, 300), bool))[0, -1] == 299


def test_a_query_reads_real_tokens_up_to_itself():
    expected = [[T, F, F, F], [F, T, F, F], [F, T, T, F], [F, T, T, T]]  # the padding query reads only itself
    np.testing.assert_array_equal(masks.causal(jnp.array([[F, T, T, T]]))[0], expected)


def test_nothing_reads_the_padding_behind_a_response():
    expected = [[T, F, F], [T, T, F], [T, T, T]]
    np.testing.assert_array_equal(masks.causal(jnp.array([[T, T, F]]))[0], expected)
    later = masks.causal(jnp.array([[T, T, F, F]]))[0]
    np.testing.assert_array_equal(later[3], [T, T, F, T])


def test_a_window_hides_what_is_further_back():
    mask = masks.causal(jnp.array([[F, T, T, T, T]]), window=2)
    expected = [[T, F, F, F, F], [F, T, F, F, F], [F, T, T, F, F], [F, F, T, T, F], [F, F, F, T, T]]
    np.testing.assert_array_equal(mask[0], expected)
    later = masks.causal(jnp.array([[T, T, T]]), jnp.array([[4], [6]]), window=3)  # three keys before all queries
    np.testing.assert_array_equal(later[:, 0], [[F, F, T], [F, F, F]])


def test_scoring_reads_the_prompt_and_all_but_the_last_response_token():
    prompts = Prompts(jnp.array([[9, 4, 5]]), jnp.array([[F, T, T]]))
    rollout = Rollout(jnp.array([[6, 7]]), jnp.array([[T, T]]), jnp.zeros((1, 2)))
    tokens, mask = masks.join_response(prompts, rollout)
    np.testing.assert_array_equal(tokens, [[9, 4, 5, 6]])
    np.testing.assert_array_equal(mask, [[F, T, T, T]])


def test_the_response_window_starts_at_the_last_prompt_column():
    """A model that predicts column number + 1 predicts each response token from the column before it."""
    prompt_length, response_length = 3, 4
    read = jnp.arange(prompt_length + response_length - 1)[None]
    window = masks.response_window(read + 1, prompt_length)
    np.testing.assert_array_equal(window, [[3, 4, 5, 6]])


def test_the_response_window_keeps_further_axes():
    assert masks.response_window(jnp.zeros((2, 6, 5)), 3).shape == (2, 4, 5)


@pytest.mark.parametrize(
    "tokens, eos_ids, expected",
    [
        ([5, 6, 2, 7, 2], (2,), [T, T, T, F, F]),
        ([5, 6, 7, 8, 9], (2,), [T, T, T, T, T]),
        ([2, 2, 2, 2, 2], (2,), [T, F, F, F, F]),
        ([5, 3, 2, 7, 7], (2, 3), [T, T, F, F, F]),
        ([5, 6, 7, 8, 2], (2,), [T, T, T, T, T]),
        ([5, 2, 7, 8, 2], (), [T, T, T, T, T]),
    ],
)
def test_a_response_reaches_up_to_and_includes_its_first_end_token(tokens, eos_ids, expected):
    np.testing.assert_array_equal(masks.until_eos(jnp.array([tokens]), eos_ids), [expected])


def test_the_end_survives_more_end_tokens_than_a_byte_can_count():
    mask = masks.until_eos(jnp.full((1, 600), 2), (2,))
    assert mask.sum() == 1 and mask[0, 0]


def test_is_any_finds_each_of_several_ids():
    np.testing.assert_array_equal(masks.is_any(jnp.array([1, 2, 3, 4]), (2, 4)), [F, T, F, T])
    np.testing.assert_array_equal(masks.is_any(jnp.array([1, 2]), ()), [F, F])
