"""Mean: adds up first, divides once, and is not disturbed by what a mask hides. Max adds up too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.types import Max, Mean


def test_a_mean_counts_only_what_the_mask_shows():
    mean = Mean.of(jnp.array([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]]), jnp.array([[1, 1, 0], [1, 0, 0]], bool))
    assert (mean.total, mean.count, mean.value) == (9.0, 3.0, 3.0)


def test_an_empty_mean_is_zero_and_so_is_its_gradient():
    value, gradient = jax.value_and_grad(lambda x: Mean.of(x, jnp.zeros(3, bool)).value)(jnp.array([1.0, 2.0, 3.0]))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("hidden", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_value_behind_the_mask_may_be_anything(hidden):
    mask = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(lambda x: Mean.of(x, mask).value)(jnp.array([1.0, hidden, 4.0]))
    assert value == 2.5
    np.testing.assert_array_equal(gradient, [0.5, 0.0, 0.5])


def test_micro_batches_of_unequal_size_add_up_to_the_whole():
    values = jax.random.normal(jax.random.key(0), (8, 5))
    mask = jnp.arange(5) < jnp.array([5, 0, 1, 3, 2, 2, 4, 1])[:, None]
    whole = Mean.of(values, mask)
    parts = [Mean.of(values[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 2), slice(2, 8))]
    added = parts[0] + parts[1] + parts[2]
    assert added.count == whole.count == 18
    assert added.value == pytest.approx(float(whole.value), rel=1e-6)
    assert np.mean([part.value for part in parts]) != pytest.approx(float(whole.value), rel=1e-2)


def test_a_mask_is_broadcast_before_it_is_counted():
    assert Mean.of(jnp.ones((4, 3)), jnp.array([True, True, False])).count == 8


def test_a_long_sum_of_half_precision_values_is_exact():
    mean = Mean.of(jnp.ones(5000, jnp.bfloat16), jnp.ones(5000, bool))
    assert mean.total.dtype == jnp.float32
    assert (mean.total, mean.count) == (5000, 5000)


def test_shares_of_booleans_are_means():
    assert Mean.of(jnp.array([True, False, True, True]), jnp.array([True, True, True, False])).value == pytest.approx(
        2 / 3
    )


def test_a_mean_passes_through_jit_as_a_tree():
    mean = jax.jit(lambda x: Mean.of(x, x > 0) + Mean.of(x, x > 0))(jnp.array([1.0, -1.0, 3.0]))
    assert (mean.total, mean.count) == (8, 4)


def test_maxima_add_up_to_the_larger():
    one, two = Max(jnp.float32(2.0)), Max(jnp.float32(3.0))
    assert (one + two).value == (two + one).value == 3
