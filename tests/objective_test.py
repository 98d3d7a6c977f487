"""The objective of whole models against a dense program that never stops a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.distill import divergences, losses, objective, terms
from ctxjax.distill.anchors import ANCHORS, Anchor, anchor_term
from ctxjax.distill.divergences import kl
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import Networks, WeightedBatch
from ctxjax.models import transformer
from ctxjax.sharding import make_mesh, put_batch
from ctxjax.types import Batch, Prompts, Rollout

T = 7
CONFIG = LossConfig(beta=0.5, mu=0.25, temperature=0.7, chunk=3)


@functools.cache
def program(model, config, gradient):
    """The objective of (student, teacher, average, rows), with the gradients of the three models if ``gradient``."""

    def loss(student, teacher, ema, rows):
        return objective.objective(Networks(student, teacher, ema, model, model), config, rows, 0)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True) if gradient else loss)


def rows_of(batch, rollouts, config) -> WeightedBatch:
    """The batch on the device, with every token's weight."""
    batch, *rollouts = put_batch((batch, *rollouts), jax.sharding.get_mesh())
    weights = [r and losses.token_weights(losses.trained_tokens(config, r, ()), config.averaging) for r in rollouts]
    return WeightedBatch(batch, rollouts[0], weights[0], rollouts[1], weights[1])


def value(params, frozen, model, batch, rollouts, config=CONFIG, ema=None):
    """(loss, parts)."""
    return program(model, config, False)(params, frozen, ema, rows_of(batch, rollouts, config))


def gradient(params, frozen, model, batch, rollouts):
    """(loss, parts), gradients of the student, the teacher and the average, which is here another student."""
    ema = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    return program(model, CONFIG, True)(params, frozen, ema, rows_of(batch, rollouts, CONFIG))


def response_logprobs(params, model, prompts, rollout):
    """log p(. | prompt, y<t) at CONFIG's temperature, from one pass over everything: logits whole, nothing reused."""
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT], axis=1)
    logits = transformer.forward(params, model, tokens, mask) @ transformer.head_weights(params, model)
    return jnp.log(jax.nn.softmax(logits[:, -T - 1 : -1] / CONFIG.temperature))


@pytest.fixture
def batch(make_prompts) -> Batch:
    return Batch(make_prompts(0, 4, 5), make_prompts(1, 4, 8), make_prompts(2, 2, 6), np.arange(4, dtype=np.int32))


@pytest.fixture
def rollouts(make_rollout) -> tuple[Rollout, Rollout]:
    return make_rollout(3, 4, T), make_rollout(4, 2, T)


@pytest.fixture
def dense(params, frozen, tiny_model, batch, rollouts, mesh):
    """((loss, terms), gradient) of the equations, where a fixed target is an array of numbers: no stop_gradient."""
    batch, rollout, other = put_batch((batch, *rollouts), mesh)
    views = {"x": (batch.bare, rollout), "c": (batch.context, rollout), "o": (batch.other, other)}
    logprobs = jax.jit(lambda params: {v: response_logprobs(params, tiny_model, *views[v]) for v in views})
    fixed, teacher = logprobs(params), logprobs(frozen)

    def kl(p, q, mask):
        return jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)) / jnp.sum(mask)

    def objective(params):
        student = logprobs(params)
        terms = {
            "distill": kl(student["x"], teacher["c"], rollout.mask_BxT),
            "anchor": kl(fixed["x"], student["c"], rollout.mask_BxT),
            "retain": kl(teacher["o"], student["o"], other.mask_BxT),
        }
        return terms["distill"] + CONFIG.beta * terms["anchor"] + CONFIG.mu * terms["retain"], terms

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)


def close(one, two, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)
    return True


@pytest.mark.slow
def test_value_and_gradient_are_those_of_the_equations(params, frozen, tiny_model, batch, rollouts, dense):
    """Chunks, heads, temperature, shift, denominators, and which path of which term carries gradient, all at once."""
    (loss, parts), (student, *_) = gradient(params, frozen, tiny_model, batch, rollouts)
    (expected_loss, terms), expected = dense
    assert min(terms.values()) > 0.1
    assert {name: float(parts[name].value) for name in terms} == pytest.approx(jax.tree.map(float, terms), rel=1e-4)
    assert loss == pytest.approx(float(expected_loss), rel=1e-4)
    assert close(student, expected, rtol=1e-3, atol=1e-5)


def test_teacher_and_average_receive_exactly_no_gradient(params, frozen, tiny_model, batch, rollouts):
    _, (_, *fixed) = gradient(params, frozen, tiny_model, batch, rollouts)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fixed))


def test_without_context_and_with_the_student_as_its_own_teacher_there_is_nothing_to_learn(
    params, tiny_model, batch, rollouts
):
    bare = batch.bare
    same = Prompts(np.pad(bare.tokens_BxP, [(0, 0), (3, 0)]), np.pad(bare.mask_BxP, [(0, 0), (3, 0)]))
    (loss, parts), (student, *_) = gradient(params, params, tiny_model, batch.replace(context=same), rollouts)
    assert loss == pytest.approx(0, abs=1e-5) and parts["top1_agreement"].value == 1
    assert close(student, jax.tree.map(jnp.zeros_like, params), atol=1e-4)


def test_what_masks_hide_never_counts(params, frozen, tiny_model, batch, rollouts):
    """Ids under the padding of prompts and responses, and their log-probabilities, are replaced by others."""

    def other_ids(tokens, mask):
        return np.where(mask, tokens, (tokens + 19) % 40).astype(np.int32)

    def disguised(tree):
        if isinstance(tree, Prompts):
            return tree.replace(tokens_BxP=other_ids(tree.tokens_BxP, tree.mask_BxP))
        hidden = np.where(tree.mask_BxT, tree.logprobs_BxT, 7.0).astype(np.float32)
        return tree.replace(tokens_BxT=other_ids(tree.tokens_BxT, tree.mask_BxT), logprobs_BxT=hidden)

    views = {name: disguised(getattr(batch, name)) for name in ("bare", "context", "other")}
    plain = gradient(params, frozen, tiny_model, batch, rollouts)
    disguise = gradient(params, frozen, tiny_model, batch.replace(**views), tuple(map(disguised, rollouts)))
    assert close(plain, disguise, rtol=0, atol=0)


@pytest.mark.slow
def test_the_end_token_is_trained(params, frozen, tiny_model, batch, rollouts):
    rollout, other = rollouts
    length = rollout.mask_BxT.sum(axis=1)
    cut = rollout.replace(mask_BxT=np.arange(T) < length[:, None] - 1)
    loss, parts = value(params, frozen, tiny_model, batch, rollouts)
    cut_loss, cut_parts = value(params, frozen, tiny_model, batch, (cut, other))
    assert parts["distill"].count == cut_parts["distill"].count + 4
    assert abs(loss - cut_loss) > 1e-3 and parts["anchor"].total > cut_parts["anchor"].total


@pytest.mark.slow
def test_terms_count_response_tokens_and_share_their_denominator(params, frozen, tiny_model, batch, rollouts):
    _, parts = value(params, frozen, tiny_model, batch, rollouts)
    rollout, other = rollouts
    assert parts["distill"].count == parts["anchor"].count == rollout.mask_BxT.sum()
    assert parts["retain"].count == other.mask_BxT.sum()


@pytest.mark.slow
@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean"])
def test_losses_and_terms_of_parts_add_up_to_those_of_the_batch(averaging, params, frozen, tiny_model, batch, rollouts):
    config = dataclasses.replace(CONFIG, mu=0.0, averaging=averaging)
    whole = rows_of(batch.replace(other=None), (rollouts[0], None), config)

    def loss(kept):
        part = whole.replace(weight_BxT=whole.weight_BxT * np.isin(np.arange(4), kept)[:, None])
        return program(tiny_model, config, False)(params, frozen, None, part)

    (all_loss, every), (one_loss, one), (two_loss, two) = loss([0, 1, 2, 3]), loss([0]), loss([1, 2, 3])
    assert min(one_loss, two_loss) > 0.1 and one_loss + two_loss == pytest.approx(float(all_loss), rel=1e-5)
    for name in ("distill", "anchor", "entropy"):
        added = one[name] + two[name]
        assert (added.count, added.value) == (every[name].count, pytest.approx(float(every[name].value), rel=1e-5))
    gaps = [parts["logprob_gap_max"] for parts in (one, two, every)]
    assert (gaps[0] + gaps[1]).value == gaps[2].value > 1


def test_a_batch_without_any_response_token_has_loss_and_gradient_zero(params, frozen, tiny_model, batch, rollouts):
    empty = tuple(rollout.replace(mask_BxT=np.zeros_like(rollout.mask_BxT)) for rollout in rollouts)
    (loss, _), (student, *_) = gradient(params, frozen, tiny_model, batch, empty)
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(student))


@pytest.mark.slow
def test_terms_with_weight_zero_are_not_computed(params, frozen, tiny_model, batch, rollouts):
    plain = dataclasses.replace(CONFIG, beta=0.0, mu=0.0)
    loss, parts = value(params, frozen, tiny_model, batch.replace(other=None), (rollouts[0], None), plain)
    _, full = value(params, frozen, tiny_model, batch, rollouts)
    assert not {"anchor", "retain"} & set(parts)
    assert loss == pytest.approx(float(full["distill"].value), rel=1e-5)


# --- Variants ---


@pytest.fixture(scope="module")
def every_view(make_params, tiny_model, make_prompts, make_rollout):
    """(models, batch, rollout, log-probabilities [B, T, V] by view, share of L of each token)."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        student, other, ema = (make_params(tiny_model, seed, mesh) for seed in (0, 1, 2))
        teacher = jax.tree.map(lambda a, b: a + 0.02 * b, student, other)  # so that the two agree here and there
        batch = Batch(make_prompts(0, 4, 5), make_prompts(1, 4, 8), None, np.arange(4, dtype=np.int32))
        rollout = make_rollout(3, 4, T)
        bare, context, y = put_batch((batch.bare, batch.context, rollout), mesh)
        logprobs = jax.jit(lambda p: tuple(response_logprobs(p, tiny_model, view, y) for view in (bare, context)))
        (q_x, q_c), (f_x, f), (ema_x, ema_c) = (logprobs(p) for p in (student, teacher, ema))
        views = {"q_x": q_x, "q_c": q_c, "f": f, "f_x": f_x, "ema": ema_x, "ema_c": ema_c}
    return (student, teacher, ema), batch, rollout, jax.device_get(views)


def mean_kl(p, q, mask):
    """By response token, then over the response tokens of the batch."""
    return (np.exp(p) * (p - q)).sum(-1)[mask].mean()


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ANCHORS)
def test_each_anchor_reads_the_models_and_prompts_of_its_view(anchor, every_view, tiny_model, mesh):
    (student, teacher, ema), batch, rollout, views = every_view
    config = LossConfig(beta=0.5, anchor=anchor, reference=0.1, temperature=0.7, chunk=3)
    loss, parts = value(student, teacher, tiny_model, batch, (rollout, None), config, ema)
    mask = rollout.mask_BxT
    targets, context = [views[name] for name in ANCHORS[anchor].targets], views["q_c"]
    target = targets[0]
    if anchor == "handover":
        w = np.minimum(*np.exp(targets)).sum(-1, keepdims=True)
        target = np.log(w * np.exp(targets[0]) + (1 - w) * np.exp(targets[1]))
    forward, backward = mean_kl(target, context, mask), mean_kl(context, target, mask)
    expected = {"symmetric": (forward + backward) / 2, "teacher": backward}.get(anchor, forward)
    assert parts["anchor"].value == pytest.approx(expected, rel=1e-4)
    assert parts["reference"].value == pytest.approx(mean_kl(views["q_x"], views["f_x"], mask), rel=1e-4)
    total = parts["distill"].value + 0.5 * parts["anchor"].value + 0.1 * parts["reference"].value
    assert loss == pytest.approx(float(total), rel=1e-5)


@pytest.mark.slow
def test_a_gate_by_response_anchors_those_that_mostly_agree_with_the_teacher(every_view, tiny_model, mesh):
    (student, teacher, _), batch, rollout, views = every_view
    mask = rollout.mask_BxT
    agrees = views["q_x"].argmax(-1) == views["f"].argmax(-1)
    share_B = (agrees & mask).sum(1) / mask.sum(1)
    threshold = float(np.unique(share_B)[-2:].mean())
    gate_Bx1 = (share_B >= threshold)[:, None]
    assert 0 < gate_Bx1.sum() < 4
    config = LossConfig(beta=0.5, gate="response", gate_threshold=threshold, temperature=0.7, chunk=3)
    loss, parts = value(student, teacher, tiny_model, batch, (rollout, None), config)
    kl_BxT = (np.exp(views["q_x"]) * (views["q_x"] - views["q_c"])).sum(-1)
    gated = np.where(mask & gate_Bx1, kl_BxT, 0)
    by_hand = 0.5 * gated.sum() / mask.sum()
    assert loss - parts["distill"].value == pytest.approx(by_hand, rel=1e-4)
    assert parts["anchor"].value == pytest.approx(gated[mask].mean(), rel=1e-4)
    assert parts["gate"].value == pytest.approx((mask & gate_Bx1).sum() / mask.sum())


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.25, [1, 1, 1, 1, 0]), (0.3, [0, 1, 1, 1, 0]), (0.5, [0, 1, 1, 1, 0]), (0.8, [0, 0, 0, 1, 0])],
)
def test_a_gate_by_response_opens_at_its_own_threshold(threshold, expected):
    mask = np.arange(4) < np.array([4, 4, 3, 1, 0])[:, None]
    agrees = jnp.asarray(np.arange(4) < np.array([1, 2, 2, 1, 0])[:, None], jnp.float32)
    asked = []

    def measure(passes, function):
        asked.append(passes)
        return {"agrees": agrees}

    gate = anchor_term(LossConfig(beta=0.5, gate="response", gate_threshold=threshold)).row_gate
    assert gate(measure, jnp.asarray(mask)).tolist() == [[value] for value in expected]
    assert asked == [("q_x", "f")]
    assert all(anchor_term(LossConfig(beta=0.5, gate=other)).row_gate is None for other in ("none", "token"))


# --- What an addition touches (docs/extending.md) ---


@pytest.mark.slow
def test_an_anchor_with_a_new_distribution_is_a_line_in_passes_and_one_in_anchors(
    every_view, tiny_model, mesh, monkeypatch
):
    """Here: the moving average that sees the context."""
    monkeypatch.setitem(terms.PASSES, "ema_c", terms.Pass("ema", "context"))
    monkeypatch.setitem(ANCHORS, "ema_context", Anchor(("ema_c",), lambda p: kl(p["ema_c"], p["q_c"])))
    (student, teacher, ema), batch, rollout, views = every_view
    config = LossConfig(beta=0.5, anchor="ema_context", temperature=0.7, chunk=3)
    assert objective.needs_ema(config) and not objective.needs_ema(dataclasses.replace(config, beta=0.0))
    _, parts = value(student, teacher, tiny_model, batch, (rollout, None), config, ema)
    assert parts["anchor"].value == pytest.approx(mean_kl(views["ema_c"], views["q_c"], rollout.mask_BxT), rel=1e-4)


@pytest.mark.slow
def test_a_term_is_a_function_and_a_line_in_terms(every_view, tiny_model, mesh, monkeypatch):
    """Here: the entropy of the context view, of weight 0.1 from the second step on."""

    def term(config):
        def values(logits, tokens):
            return {"entropy_c": divergences.entropy(logits["q_c"])}

        return terms.Term("entropy_c", ("q_c",), values, weight=lambda step: 0.1 * (step > 0))

    monkeypatch.setattr(objective, "TERMS", (*objective.TERMS, term))
    (student, teacher, _), batch, rollout, views = every_view
    rows = rows_of(batch, (rollout, None), LossConfig())
    networks = Networks(student, teacher, None, tiny_model, tiny_model)
    config = LossConfig(temperature=0.7, chunk=3)
    found = jax.jit(lambda step: objective.objective(networks, config, rows, step))
    (first, parts), (second, _) = found(0), found(1)
    expected = -(np.exp(views["q_c"]) * views["q_c"]).sum(-1)[rollout.mask_BxT].mean()
    assert parts["entropy_c"].value == pytest.approx(expected, rel=1e-4)
    assert second - first == pytest.approx(0.1 * expected, rel=1e-3)


# --- Next tokens ---


@pytest.mark.slow
def test_the_loss_of_given_responses_is_their_mean_negative_log_probability(params, tiny_model, batch, rollouts, mesh):
    prompts, responses = put_batch((batch.bare, rollouts[0]), mesh)
    untempered = jax.jit(lambda p: response_logprobs(p, tiny_model, prompts, responses) * CONFIG.temperature)(params)
    logp = np.asarray(jax.nn.log_softmax(untempered))
    tokens, mask = rollouts[0].tokens_BxT, rollouts[0].mask_BxT
    expected = -np.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0][mask].mean()
    loss = jax.jit(lambda p: objective.next_token_loss(p, tiny_model, prompts, responses, 3))(params)
    assert loss == pytest.approx(expected, rel=1e-4)
