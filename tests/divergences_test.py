"""Divergences against numbers worked out by hand, and their gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import divergences

# p = (1/2, 1/2), q = (1/4, 3/4):
KL_P_Q = 0.14384104  # 1/2 ln 2   + 1/2 ln(2/3)
KL_Q_P = 0.13081204  # 1/4 ln 1/2 + 3/4 ln(3/2)
P = jnp.log(jnp.array([0.5, 0.5]))
Q = jnp.log(jnp.array([0.25, 0.75]))
INF = jnp.inf


def kl_in_float64(p, q):
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    logp, logq = p - np.log(np.sum(np.exp(p))), q - np.log(np.sum(np.exp(q)))
    return np.sum(np.exp(logp) * (logp - logq))


def finite_differences(function, x, step=1e-5):
    x = np.asarray(x, np.float64)
    unit = np.eye(x.size) * step
    return np.array([(function(x + e) - function(x - e)) / (2 * step) for e in unit])


def test_kl_has_the_value_and_the_direction_worked_out_by_hand():
    assert divergences.kl(P, Q) == pytest.approx(KL_P_Q, abs=1e-6)
    assert divergences.kl(Q, P) == pytest.approx(KL_Q_P, abs=1e-6)


def test_reverse_kl_weighs_by_the_student_and_forward_kl_by_the_teacher():
    assert divergences.reverse_kl(student=P, teacher=Q) == pytest.approx(KL_P_Q, abs=1e-6)
    assert divergences.forward_kl(student=P, teacher=Q) == pytest.approx(KL_Q_P, abs=1e-6)
    assert divergences.DIVERGENCES["reverse_kl"](P, Q) == pytest.approx(KL_P_Q, abs=1e-6)
    assert divergences.DIVERGENCES["forward_kl"](P, Q) == pytest.approx(KL_Q_P, abs=1e-6)


@pytest.mark.parametrize("name", sorted(divergences.DIVERGENCES))
def test_a_distribution_does_not_diverge_from_itself(name):
    logits = jax.random.normal(jax.random.key(0), (5, 11)) * 6
    divergence = divergences.DIVERGENCES[name]
    np.testing.assert_array_equal(divergence(logits, logits), np.zeros(5))
    np.testing.assert_allclose(divergence(logits, logits + 3.0), np.zeros(5), atol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: divergence(x, logits).sum())(logits), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(divergences.DIVERGENCES))
def test_a_divergence_is_never_negative(name):
    s, t = jax.random.normal(jax.random.key(1), (2, 200, 13)) * 4
    assert jnp.all(divergences.DIVERGENCES[name](s, t) > 0)


@pytest.mark.parametrize("argument", [0, 1])
def test_the_gradient_of_kl_matches_finite_differences_in_both_arguments(argument):
    logits = np.asarray(jax.random.normal(jax.random.key(2), (2, 9)) * 2)

    def value(x):
        return kl_in_float64(*(x if i == argument else logits[i] for i in range(2)))

    gradient = jax.grad(divergences.kl, argnums=argument)(*jnp.asarray(logits))
    np.testing.assert_allclose(gradient, finite_differences(value, logits[argument]), atol=2e-6)


@pytest.mark.parametrize("name", sorted(divergences.DIVERGENCES))
def test_tokens_that_both_sides_exclude_change_neither_value_nor_gradient(name):
    divergence = divergences.DIVERGENCES[name]
    s, t = jnp.array([0.3, -INF, 1.2, -INF, -0.5]), jnp.array([1.0, -INF, 0.1, -INF, 0.4])
    kept = jnp.array([0, 2, 4])
    value, gradients = jax.value_and_grad(divergence, argnums=(0, 1))(s, t)
    expected, expected_gradients = jax.value_and_grad(divergence, argnums=(0, 1))(s[kept], t[kept])
    assert value == pytest.approx(float(expected), abs=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient[kept], wanted, atol=1e-6)
        np.testing.assert_array_equal(gradient[jnp.array([1, 3])], [0, 0])


def test_a_token_that_p_excludes_contributes_nothing_and_one_that_q_excludes_is_infinitely_far():
    p, q = jnp.array([0.0, -INF]), jnp.log(jnp.array([0.5, 0.5]))
    assert divergences.kl(p, q) == pytest.approx(0.6931472, abs=1e-6)  # ln 2
    assert divergences.kl(q, p) == INF


def test_half_precision_logits_are_compared_in_float32():
    s, t = (jax.random.normal(jax.random.key(3), (2, 4, 300)) * 3).astype(jnp.bfloat16)
    for divergence in (*divergences.DIVERGENCES.values(), lambda s, _: divergences.entropy(s)):
        value = divergence(s, t)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, divergence(s.astype(jnp.float32), t.astype(jnp.float32)), rtol=1e-6)


def test_entropy_by_hand():
    assert divergences.entropy(jnp.log(jnp.array([0.5, 0.25, 0.25]))) == pytest.approx(1.0397208, abs=1e-6)  # 3/2 ln 2
    assert divergences.entropy(jnp.zeros(8)) == pytest.approx(2.0794415, abs=1e-6)  # ln 8
    assert divergences.entropy(jnp.array([3.0, -INF, -INF])) == 0


def test_token_logprob_by_hand_and_for_large_logits():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])) + 500.0
    picked = divergences.token_logprob(logits, jnp.array([1, 2]))
    np.testing.assert_allclose(picked, [-1.3862944, -0.3566749], atol=1e-4)  # ln 1/4, ln 7/10


def test_token_logprob_is_the_logarithm_of_softmax_and_minus_infinity_for_excluded_tokens():
    logits = jnp.array([0.4, -1.0, -INF, 2.0])
    every = divergences.token_logprob(jnp.broadcast_to(logits, (4, 4)), jnp.arange(4))
    np.testing.assert_allclose(every, jnp.log(jax.nn.softmax(logits)), atol=1e-6)


def test_a_token_too_rare_for_float32_may_be_excluded_by_the_other_side():
    assert float(divergences.kl(jnp.array([0.0, -200.0]), jnp.array([0.0, -jnp.inf]))) == 0.0
