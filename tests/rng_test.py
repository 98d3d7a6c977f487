"""Randomness is a pure function of (root key, step, stream, row, position)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import rng

ROOT = jax.random.key(7)
IDS = jnp.array([3, 14, 15, 92, 65])


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def uniform(step=4, stream="rollout", ids=IDS, position=2, root=ROOT):
    return np.asarray(rng.token_uniforms(rng.row_keys(rng.key_for(root, step, stream), ids), 5)[:, position])


def test_the_same_arguments_give_the_same_numbers_in_python_and_under_jit():
    compiled = jax.jit(lambda root, step, ids, position: uniform_traced(root, step, ids, position))
    np.testing.assert_array_equal(uniform(), uniform())
    np.testing.assert_array_equal(uniform(), compiled(ROOT, 4, IDS, 2))


def uniform_traced(root, step, ids, position):
    return rng.token_uniforms(rng.row_keys(rng.key_for(root, step, "rollout"), ids), 5)[:, position]


@pytest.mark.parametrize(
    "change", [{"step": 5}, {"stream": "retention"}, {"position": 3}, {"root": jax.random.key(8)}, {"ids": IDS + 100}]
)
def test_each_argument_changes_every_number(change):
    assert not np.any(uniform() == uniform(**change))


def test_streams_have_distinct_keys_at_every_step():
    keys = [data(rng.key_for(ROOT, step, stream)).tobytes() for step in range(6) for stream in rng.STREAMS]
    assert len(set(keys)) == 6 * len(rng.STREAMS)


def test_a_row_draws_the_same_numbers_wherever_it_stands():
    order = jnp.array([4, 2, 0, 1, 3])
    np.testing.assert_array_equal(uniform(ids=IDS[order]), uniform()[order])
    np.testing.assert_array_equal(uniform(ids=IDS[:2]), uniform()[:2])
    np.testing.assert_array_equal(uniform(ids=IDS[3:]), uniform()[3:])


def test_a_position_has_the_same_numbers_however_many_are_drawn():
    keys = rng.row_keys(rng.key_for(ROOT, 0, "rollout"), IDS)
    np.testing.assert_array_equal(rng.token_uniforms(keys, 9)[:, :4], rng.token_uniforms(keys, 4))


def test_numbers_are_uniform_in_the_half_open_interval():
    keys = rng.row_keys(rng.key_for(ROOT, 0, "rollout"), jnp.arange(500))
    numbers = np.asarray(rng.token_uniforms(keys, 40)).T
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    np.testing.assert_allclose(counts, 2000, atol=200)  # 4.7 standard deviations of 42
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03


def test_an_unknown_stream_is_an_error():
    with pytest.raises(KeyError):
        rng.key_for(ROOT, 0, "sampling")
