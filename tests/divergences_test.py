"""Divergences against numbers worked out by hand, and their gradients against finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.distill import divergences
from ctxjax.distill.divergences import DIVERGENCES, REMAINDERS, SUPPORTS, Support, divergence

# p = (1/2, 1/2), q = (1/4, 3/4):
KL_P_Q = 0.14384104  # 1/2 ln 2   + 1/2 ln(2/3)
KL_Q_P = 0.13081204  # 1/4 ln 1/2 + 3/4 ln(3/2)
P = jnp.log(jnp.array([0.5, 0.5]))
Q = jnp.log(jnp.array([0.25, 0.75]))
INF = jnp.inf
ROUNDING = 3e-6  # ten times what float32 loses of numbers near 1
MANY = (200, 13)  # rows of logits: of one shape, since every operation is compiled for every shape
NAMES = sorted(DIVERGENCES)
PARTIAL = list(itertools.product(SUPPORTS[1:], REMAINDERS))
EVERY = [("full", "renormalise"), *PARTIAL]


def softmax(logits):
    values = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return values / values.sum()


def kl_of(p, q):
    return np.sum(p * np.log(p / q))


# The definitions, over probabilities in float64: what a student's s and a teacher's t differ by.
DEFINITIONS = {
    "reverse_kl": lambda s, t, a: kl_of(s, t),
    "forward_kl": lambda s, t, a: kl_of(t, s),
    "jsd": lambda s, t, a: a * kl_of(t, a * t + (1 - a) * s) + (1 - a) * kl_of(s, a * t + (1 - a) * s),
    "skewed_forward_kl": lambda s, t, a: kl_of(t, a * t + (1 - a) * s),
    "skewed_reverse_kl": lambda s, t, a: kl_of(s, a * s + (1 - a) * t),
}


def kept_ids(student, teacher, support):
    likeliest = {
        "teacher_top_k": np.argsort(teacher)[-support.k :],
        "student_top_k": np.argsort(student)[-support.k :],
    }
    union = sorted(set().union(*(ids.tolist() for ids in likeliest.values())))
    return {"full": np.arange(len(student)), "union_top_k": np.array(union), **likeliest}[support.kind]


def defined(name, student, teacher, alpha, ids, remainder):
    """A divergence over the tokens ``ids`` by its definition, from logits, in float64."""
    parts = []
    for p in (softmax(student), softmax(teacher)):
        inside = p[ids]
        if remainder == "renormalise":
            inside = inside / inside.sum()
        elif remainder == "tail" and len(ids) < len(p):
            inside = np.append(inside, np.delete(p, ids).sum())
        parts.append(inside)
    return DEFINITIONS[name](*parts, alpha)


def finite_differences(function, x, step=1e-5):
    x = np.asarray(x, np.float64)
    unit = np.eye(x.size) * step
    return np.array([(function(x + e) - function(x - e)) / (2 * step) for e in unit])


def test_kl_has_the_value_and_the_direction_worked_out_by_hand():
    assert divergences.kl(P, Q) == pytest.approx(KL_P_Q, abs=ROUNDING)
    assert divergences.kl(Q, P) == pytest.approx(KL_Q_P, abs=ROUNDING)


@pytest.mark.parametrize(
    "name, alpha, value",
    [
        ("reverse_kl", 0.5, KL_P_Q),
        ("forward_kl", 0.5, KL_Q_P),
        ("jsd", 0.5, 0.0338224),  # m = (3/8, 5/8): (1/4 ln 2/3 + 3/4 ln 6/5 + 1/2 ln 4/3 + 1/2 ln 4/5) / 2
        ("jsd", 0.25, 0.0248702),  # m = (7/16, 9/16): 1/4 (1/4 ln 4/7 + 3/4 ln 4/3) + 3/4 (1/2 ln 8/7 + 1/2 ln 8/9)
        ("skewed_forward_kl", 0.25, 0.0758576),  # m = (7/16, 9/16): 1/4 ln 4/7 + 3/4 ln 4/3
        ("skewed_reverse_kl", 0.25, 0.0757749),  # m = (5/16, 11/16): 1/2 ln 8/5 + 1/2 ln 8/11
    ],
)
def test_each_divergence_by_hand_where_the_student_is_p_and_the_teacher_q(name, alpha, value):
    assert divergence(name, student=P, teacher=Q, alpha=alpha) == pytest.approx(value, abs=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_a_distribution_does_not_diverge_from_itself(name):
    logits = jax.random.normal(jax.random.key(0), MANY) * 6
    np.testing.assert_allclose(divergence(name, logits, logits), np.zeros(200), atol=ROUNDING)
    np.testing.assert_allclose(divergence(name, logits, logits + 3.0), np.zeros(200), atol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: divergence(name, x, logits).sum())(logits), 0.0, atol=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_never_negative(name):
    s, t = jax.random.normal(jax.random.key(1), (2, *MANY)) * 4
    assert jnp.all(divergence(name, s, t) > 0)


@pytest.mark.parametrize("kind, remainder", EVERY)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_follow_the_definition_and_its_finite_differences(name, kind, remainder):
    """Student and teacher alike; which tokens are the likeliest is not differentiated."""
    logits = np.asarray(jax.random.normal(jax.random.key(2), (2, 9)) * 2)
    support, alpha = Support(kind, 3, remainder), 0.3
    ids = kept_ids(*logits, support)
    value, gradients = jax.value_and_grad(divergence, argnums=(1, 2))(name, *jnp.asarray(logits), alpha, support)
    assert value == pytest.approx(defined(name, *logits, alpha, ids, remainder), rel=1e-5, abs=ROUNDING)
    for place, gradient in enumerate(gradients):

        def moved(x, place=place):
            return defined(name, *(x if i == place else logits[i] for i in range(2)), alpha, ids, remainder)

        np.testing.assert_allclose(gradient, finite_differences(moved, logits[place]), atol=ROUNDING)


# --- Supports ---

# The student's tokens, likeliest first, are 0, 1, 2, 3, the teacher's 3, 2, 1, 0.
FALLING, RISING = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize(
    "kind, k, remainder, value",
    [
        ("student_top_k", 2, "raw", 0.6761573),  # .4 ln 4 + .3 ln 3/2
        ("student_top_k", 2, "tail", 0.4219680),  # and .3 ln 3/7
        ("student_top_k", 2, "renormalise", 0.1186415),  # 4/7 ln 12/7 + 3/7 ln 9/14
        ("teacher_top_k", 2, "raw", -0.2197225),  # .2 ln 2/3 + .1 ln 1/4: below 0
        ("teacher_top_k", 2, "tail", 0.3733861),  # and .7 ln 7/3
        ("teacher_top_k", 2, "renormalise", 0.1148896),  # 2/3 ln 14/9 + 1/3 ln 7/12
        ("union_top_k", 1, "raw", 0.4158883),  # tokens 0 and 3: .4 ln 4 + .1 ln 1/4
        ("union_top_k", 1, "tail", 0.4158883),  # and .5 ln 1
        ("union_top_k", 1, "renormalise", 0.8317766),  # .8 ln 4 + .2 ln 1/4
        ("union_top_k", 2, "raw", 0.4564348),  # all four: the whole divergence
    ],
)
def test_reverse_kl_on_each_support_by_hand(kind, k, remainder, value):
    assert divergence("reverse_kl", FALLING, RISING, support=Support(kind, k, remainder)) == pytest.approx(
        value, abs=ROUNDING
    )


def test_a_token_that_both_sides_name_counts_once_in_the_union():
    student, teacher = jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1])), jnp.log(jnp.array([0.6, 0.1, 0.2, 0.1]))
    support = Support("union_top_k", 2, "raw")  # tokens 0 and 1, 0 and 2
    # 1/2 ln 5/6 + .3 ln 3 + .1 ln 1/2
    assert divergence("reverse_kl", student, teacher, support=support) == pytest.approx(0.1691082, abs=ROUNDING)
    ids, counts = divergences.support_ids(student, teacher, support)
    assert sorted(ids[counts].tolist()) == [0, 1, 2]
    assert divergences.support_mass(student, ids, counts) == pytest.approx(0.9, abs=ROUNDING)


def test_the_reference_code_of_opcd_sums_over_the_students_256_likeliest_tokens_as_they_are():
    student, teacher = np.asarray(jax.random.normal(jax.random.key(4), (2, 1000)) * 3, np.float64)
    p, q = softmax(student), softmax(teacher)
    top = np.argsort(p)[-256:]
    found = divergence(
        "reverse_kl", jnp.asarray(student), jnp.asarray(teacher), support=Support("student_top_k", remainder="raw")
    )
    assert found == pytest.approx(np.sum(p[top] * np.log(p[top] / q[top])), rel=1e-5)
    assert found != pytest.approx(kl_of(p, q), rel=1e-4)


def test_a_raw_sum_drives_a_student_that_is_right_already_out_of_the_support():
    """Its gradient is p_v (1 - mass) on the support and -p_v mass elsewhere: descent moves mass out. The full
    divergence, the tail and renormalisation have nothing to say to a student that equals its teacher."""

    def gradient(kind, remainder):
        support = Support(kind, 2, remainder)
        return np.asarray(jax.grad(lambda x: divergence("reverse_kl", x, FALLING, support=support))(FALLING))

    np.testing.assert_allclose(
        gradient("student_top_k", "raw"), [0.4 * 0.3, 0.3 * 0.3, -0.2 * 0.7, -0.1 * 0.7], atol=ROUNDING
    )
    for kind, remainder in (("full", "raw"), ("student_top_k", "tail"), ("student_top_k", "renormalise")):
        np.testing.assert_allclose(gradient(kind, remainder), np.zeros(4), atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUPPORTS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_a_tail_makes_a_lower_bound_of_the_full_divergence(name, kind):
    s, t = jax.random.normal(jax.random.key(5), (2, *MANY)) * 2
    bound, whole = divergence(name, s, t, support=Support(kind, 3, "tail")), divergence(name, s, t)
    assert jnp.all(bound >= -1e-6) and jnp.all(bound <= whole + 1e-5)
    assert jnp.mean(bound) < 0.95 * jnp.mean(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind, remainder", PARTIAL)
def test_a_support_of_more_tokens_than_there_are_is_the_full_divergence(kind, remainder):
    s, t = jax.random.normal(jax.random.key(6), (2, *MANY)) * 2

    def total(s, t, support):
        return divergence("jsd", s, t, 0.3, support).sum()

    ours = jax.value_and_grad(total, argnums=(0, 1))(s, t, Support(kind, 256, remainder))
    whole = jax.value_and_grad(total, argnums=(0, 1))(s, t, Support())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=ROUNDING), ours, whole)


# --- Extreme logits ---


@pytest.mark.slow
@pytest.mark.parametrize("out", [-1e30, -INF])
@pytest.mark.parametrize("k", [2, 4])  # fewer than the tokens that are left, and more
@pytest.mark.parametrize("kind, remainder", EVERY)
def test_tokens_that_both_sides_exclude_change_neither_value_nor_gradient(kind, remainder, k, out):
    s, t = jnp.array([0.3, out, 1.2, out, -0.5]), jnp.array([1.0, out, 0.1, out, 0.4])
    kept, support = jnp.array([0, 2, 4]), Support(kind, k, remainder)
    for name in NAMES if kind == "full" else ("reverse_kl", "jsd"):  # without a mixture and with one
        of = jax.value_and_grad(divergence, argnums=(1, 2))
        value, gradients = of(name, s, t, 0.3, support)
        expected, expected_gradients = of(name, s[kept], t[kept], 0.3, support)
        assert value == pytest.approx(float(expected), abs=ROUNDING), name
        for gradient, wanted in zip(gradients, expected_gradients):
            np.testing.assert_allclose(gradient[kept], wanted, atol=ROUNDING, err_msg=name)
            np.testing.assert_array_equal(gradient[jnp.array([1, 3])], [0, 0], err_msg=name)


def test_a_token_that_p_excludes_contributes_nothing_and_one_that_q_excludes_is_infinitely_far():
    p, q = jnp.array([0.0, -INF]), jnp.log(jnp.array([0.5, 0.5]))
    assert divergences.kl(p, q) == pytest.approx(0.6931472, abs=ROUNDING)  # ln 2
    assert divergences.kl(q, p) == INF


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_compared_in_float32(name):
    s, t = (jax.random.normal(jax.random.key(3), (2, 4, 300)) * 3).astype(jnp.bfloat16)
    for function in (lambda s, t: divergence(name, s, t), lambda s, _: divergences.entropy(s)):
        value = function(s, t)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, function(s.astype(jnp.float32), t.astype(jnp.float32)), rtol=1e-6)


def test_entropy_by_hand():
    assert divergences.entropy(jnp.log(jnp.array([0.5, 0.25, 0.25]))) == pytest.approx(1.5 * np.log(2), abs=ROUNDING)
    assert divergences.entropy(jnp.zeros(8)) == pytest.approx(np.log(8), abs=ROUNDING)
    assert divergences.entropy(jnp.array([3.0, -INF, -INF])) == 0


def test_token_logprob_by_hand_and_for_large_logits():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])) + 500.0
    picked = divergences.token_logprob(logits, jnp.array([1, 2]))
    np.testing.assert_allclose(picked, [-1.3862944, -0.3566749], atol=1e-4)  # ln 1/4, ln 7/10


def test_token_logprob_is_the_logarithm_of_softmax_and_minus_infinity_for_excluded_tokens():
    logits = jnp.array([0.4, -1.0, -INF, 2.0])
    every = divergences.token_logprob(jnp.broadcast_to(logits, (4, 4)), jnp.arange(4))
    np.testing.assert_allclose(every, jnp.log(jax.nn.softmax(logits)), atol=ROUNDING)


def test_a_token_too_rare_for_float32_may_be_excluded_by_the_other_side():
    assert float(divergences.kl(jnp.array([0.0, -200.0]), jnp.array([0.0, -jnp.inf]))) == 0.0
