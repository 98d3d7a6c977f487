"""The step as one program: its halves, its keys, its mesh, and what it leaves alone.

The program of the whole step runs on eight devices and its two halves on one, and both must agree.
"""

import dataclasses
import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctxjax import rng
from ctxjax.distill import objective, optim, train_step as train_step_module
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.distill.train_step import (
    StepConfig,
    init_state,
    off_policy_steps,
    rollout_step,
    teacher_rollout,
    term_gradients,
    train_step,
    update_step,
)
from ctxjax.models import transformer
from ctxjax.models.lora import LoraConfig
from ctxjax.sharding import bring_to_device, make_mesh, offload_to_host, put_batch
from ctxjax.types import Batch, Frozen, PrefixKV, Rollout, TrainState

ROWS, RETAINED = 16, 8
rollouts_of = jax.jit(rollout_step, static_argnames="config")
update = jax.jit(update_step, static_argnames="config")


class Halves(NamedTuple):
    """What one device computes: a step, a second update on its rollouts, and what the same parameters draw later.

    ``places``: of the state and the rollouts on the device, where what was compiled for them serves again."""

    places: tuple
    before: TrainState
    rollouts: tuple[Rollout, Rollout]
    after: TrainState
    metrics: dict
    later_rollouts: tuple[Rollout, Rollout]
    metrics_again: dict


class Whole(NamedTuple):
    """What eight devices compute in one program, and the messages of the compiler during the second step."""

    before: TrainState
    state: TrainState
    metrics: dict
    compiled_again: list[str]
    frozen: dict
    frozen_after: dict
    donated: list[bool]


@pytest.fixture(scope="module")
def config(tiny_model) -> StepConfig:
    return StepConfig(
        model=tiny_model,
        teacher_model=tiny_model,
        sampling=SamplingConfig(max_tokens=6, eos_ids=(2, 5, 11), pad_id=0, temperature=0.8),
        loss=LossConfig(beta=0.5, mu=1.0, temperature=0.8, chunk=4),
        optim=OptimConfig(lr=1e-3, steps=10, schedule="cosine"),
    )


@pytest.fixture(scope="module")
def batch(make_prompts) -> Batch:
    other = make_prompts(2, RETAINED, 7)
    return Batch(make_prompts(0, ROWS, 5), make_prompts(1, ROWS, 9), other, np.arange(50, 50 + ROWS, dtype=np.int32))


@pytest.fixture(scope="module")
def halves(config, batch, make_params) -> Halves:
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        frozen, data = Frozen(make_params(config.model, 1, mesh)), put_batch(batch, mesh)
        before = init_state(make_params(config.model, 0, mesh), config, jax.random.key(2))
        rollouts = rollouts_of(before, frozen, data, config)
        after, metrics = update(before, frozen, data, *rollouts, config)
        again = update(after, frozen, data, *rollouts, config)[1]
        later = rollouts_of(before.replace(step=before.step + 1), frozen, data, config)
        places = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (before, rollouts))
        return Halves(places, *jax.device_get((before, rollouts, after, metrics, later, again)))


@pytest.fixture
def start(halves, mesh) -> tuple[TrainState, tuple[Rollout, Rollout]]:
    """The state before the step, and its rollouts, on the device again."""
    return jax.tree.map(jax.device_put, (halves.before, halves.rollouts), halves.places)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def whole(config, batch, make_params) -> Whole:
    mesh, log = make_mesh(2, 2, 2), Messages()
    with jax.set_mesh(mesh):
        frozen, data = Frozen(make_params(config.model, 1, mesh)), put_batch(batch, mesh)
        before = init_state(make_params(config.model, 0, mesh), config, jax.random.key(2))
        kept, frozen_values = jax.tree.map(np.array, (before.params, frozen))
        first, metrics = train_step(before, frozen, data, config)
        donated = [leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state))]
        state, metrics = jax.tree.map(np.array, (first.params, metrics))
        logging.getLogger("jax").addHandler(log)
        with jax.log_compiles():
            train_step(first, frozen, data, config)
        logging.getLogger("jax").removeHandler(log)
        again = [message for message in log.messages if message.startswith(("Compiling", "Finished XLA"))]
        return Whole(kept, state, metrics, again, frozen_values, jax.tree.map(np.array, frozen), donated)


def largest_difference(one, two) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), one, two)))


@pytest.mark.slow
def test_the_whole_step_on_eight_devices_is_its_two_halves_on_one(halves, whole):
    assert whole.metrics.keys() == halves.metrics.keys()
    for name, value in halves.metrics.items():
        assert whole.metrics[name] == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
    assert largest_difference(whole.before, halves.before.params) == 0
    assert largest_difference(halves.before.params, halves.after.params) > 5e-4
    assert largest_difference(whole.state, halves.after.params) < 5e-5


@pytest.mark.slow
def test_a_second_step_compiles_nothing(whole):
    assert not whole.compiled_again


@pytest.mark.slow
def test_the_state_is_donated_and_the_teacher_is_left_alone(whole):
    assert all(whole.donated)
    assert largest_difference(whole.frozen, whole.frozen_after) == 0


def test_the_state_at_step_zero_is_a_copy_of_the_parameters(params, config):
    state = init_state(params, config, jax.random.key(0))
    assert largest_difference(jax.device_get(state.params), jax.device_get(params)) == 0
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_moments_lie_where_their_parameters_lie(config, make_params, mesh8):
    state = init_state(make_params(config.model, 0, mesh8), config, jax.random.key(0))
    adam = state.opt_state[1][0]
    places = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    assert len(set(map(str, jax.tree.leaves(places, is_leaf=lambda node: isinstance(node, jax.P))))) > 3
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, moments) == places


@pytest.mark.slow
def test_fewer_rows_may_be_retained_than_are_distilled(halves):
    rollout, other = halves.rollouts
    assert rollout.tokens_BxT.shape == (ROWS, 6) and other.tokens_BxT.shape == (RETAINED, 6)
    assert halves.metrics["retain"] > 0.01


@pytest.mark.slow
def test_the_gradients_of_the_terms_add_up_to_that_of_the_step(config, batch, start, make_params, mesh):
    state, rollouts = start
    frozen, data = Frozen(make_params(config.model, 1, mesh)), put_batch(batch, mesh)
    parts = term_gradients(state, frozen, data, config)
    rows = train_step_module._weighted_rows(data, *rollouts, config)
    whole = jax.jit(lambda state: train_step_module._gradient(state, frozen, rows, config)[1])(state)
    assert set(parts) == {"distill", "anchor", "retain"}
    total = jax.tree.map(lambda *own: sum(own), *parts.values())
    assert largest_difference(total, whole) < 1e-5 < largest_difference(parts["distill"], whole)


@pytest.mark.slow
def test_each_step_draws_anew_for_both_kinds_of_rollout(halves):
    (first, first_other), (second, second_other) = halves.rollouts, halves.later_rollouts
    assert (first.tokens_BxT != second.tokens_BxT).any(axis=1).sum() > ROWS / 2
    assert (first_other.tokens_BxT != second_other.tokens_BxT).any()


@pytest.mark.slow
def test_a_step_advances_the_count_keeps_the_root_key_and_changes_every_parameter(halves):
    before, after = halves.before, halves.after
    assert (before.step, after.step) == (0, 1)
    assert jax.random.key_data(before.key).tolist() == jax.random.key_data(after.key).tolist()
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params, after.params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
def test_a_step_lowers_the_loss_on_its_own_rollouts(halves):
    assert halves.metrics_again["distill"] < halves.metrics["distill"] - 1e-3
    assert halves.metrics_again["loss"] < halves.metrics["loss"] - 1e-3


@pytest.mark.slow
def test_metrics_describe_the_loss_and_the_responses(halves, config):
    metrics, (rollout, _) = halves.metrics, halves.rollouts
    total = metrics["distill"] + 0.5 * metrics["anchor"] + 1.0 * metrics["retain"]
    assert metrics["loss"] == pytest.approx(float(total), rel=1e-5)
    length = rollout.mask_BxT.sum(axis=1)
    ended = np.isin(np.where(rollout.mask_BxT, rollout.tokens_BxT, -1), config.sampling.eos_ids).any(axis=1)
    assert 0 < ended.sum() < ROWS
    assert metrics["response_length"] == pytest.approx(length.mean())
    assert metrics["response_tokens"] == length.sum()
    assert metrics["truncated"] == pytest.approx(1 - ended.mean())
    assert metrics["lr"] == pytest.approx(1e-3)
    assert metrics["logprob_gap"] <= metrics["logprob_gap_max"] < 5e-5  # the rollout was on-policy
    assert metrics["skipped"] == metrics["untrained"] == 0


# --- Steps that are skipped ---


@pytest.mark.slow
def test_a_step_without_a_finite_loss_moves_nothing_but_on(start, config, batch, make_params, mesh):
    broken = make_params(config.model, 1, mesh)
    broken["final_norm"] = broken["final_norm"].at[0].set(np.nan)
    before, rollouts = start
    after, metrics = update(before, Frozen(broken), put_batch(batch, mesh), *rollouts, config)
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
    assert after.step == before.step + 1
    kept, now = (jax.tree.leaves((state.params, state.opt_state)) for state in (before, after))
    changed = [(int(a), int(b)) for a, b in zip(kept, now) if not np.array_equal(a, b)]
    assert changed == [(0, 1)]  # the schedule's count


@pytest.fixture(scope="module")
def step_of(config, batch, halves):
    """step_of(state, loss, gradient): the state and the metrics after a step that found these."""

    @jax.jit
    def step(before, loss, grads):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_step_module, "_gradient", lambda *_: ((loss, {}), grads))
            return update_step(before, Frozen(before.params), batch, *halves.rollouts, config)

    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "slope", "skipped"), [(1.0, 1.0, 0), (1.0, np.inf, 1), (1.0, np.nan, 1), (np.inf, 1.0, 1)]
)
def test_loss_and_gradient_must_both_be_finite(loss, slope, skipped, halves, step_of, mesh):
    before = halves.before.replace(ema=halves.before.params)
    grads = jax.tree.map(np.ones_like, before.params)
    grads["final_norm"][0] = slope
    after, metrics = step_of(before, np.float32(loss), grads)
    assert metrics["skipped"] == skipped
    if not skipped:
        assert metrics["grad_norm"] == pytest.approx(sum(leaf.size for leaf in jax.tree.leaves(grads)) ** 0.5)
    assert (largest_difference(before.params, after.params) == 0) == bool(skipped)
    assert (largest_difference(before.ema, after.ema) == 0) == bool(skipped)
    assert np.isfinite(jax.tree.leaves(after.params)[0]).all()


@pytest.mark.slow
def test_the_rate_after_skipped_steps_is_the_logged_one_and_that_of_the_step(config, halves, step_of, mesh):
    """The schedule then ends with the training, however many steps are skipped."""
    state, grads = halves.before, jax.tree.map(np.ones_like, halves.before.params)
    for _ in range(3):
        state, metrics = step_of(state, np.float32(np.nan), grads)
        assert metrics["skipped"] == 1
    after, metrics = step_of(state, np.float32(1), grads)
    rate = float(metrics["lr"])
    assert rate == pytest.approx(float(optim.schedule(config.optim)(3)), rel=1e-6) and rate < 0.9 * config.optim.lr
    applied = optim.optimizer(config.optim, lambda count: rate)
    updates, _ = applied.update(grads, applied.init(halves.before.params), halves.before.params)
    assert largest_difference(after.params, optax.apply_updates(halves.before.params, updates)) < 1e-6


# --- Micro-batches ---


@pytest.mark.slow
@pytest.mark.parametrize("on, count", [("mesh", 2), ("mesh", 4), ("mesh8", 2)])
def test_micro_batches_change_neither_metrics_nor_gradient(on, count, halves, config, batch, make_params, request):
    """On fixed rollouts, whose first log-probabilities are off by 1/16 nat in the first row to 1 in the last. Adam's
    moments show the gradient, which the parameters hide."""
    mesh, config = request.getfixturevalue(on), dataclasses.replace(config, micro_batches=count)
    frozen = Frozen(make_params(config.model, 1, mesh))
    before = init_state(make_params(config.model, 0, mesh), config, jax.random.key(2))
    rollout, other = halves.rollouts
    off = rollout.logprobs_BxT + (np.arange(1, ROWS + 1)[:, None] / ROWS) * (np.arange(6) == 0)
    data = put_batch((batch, rollout.replace(logprobs_BxT=off.astype(np.float32)), other), mesh)
    after, metrics = jax.device_get(update(before, frozen, *data, config))
    assert metrics.pop("logprob_gap_max") == pytest.approx(1, abs=1e-4)
    assert metrics.pop("logprob_gap") == pytest.approx(8.5 / rollout.mask_BxT.sum(), abs=1e-4)
    expected = {name: value for name, value in halves.metrics.items() if not name.startswith("logprob_gap")}
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=3e-6)
    assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, expected), rel=1e-5, abs=1e-6)
    for ours, moment in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(halves.after.opt_state)):
        np.testing.assert_allclose(ours, moment, rtol=0, atol=3e-5 * np.abs(moment).max())


# --- Moving averages ---


@pytest.mark.slow
def test_an_average_teaches_in_place_of_the_frozen_teacher_and_follows_the_student(start, config, batch, mesh):
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, mu=0.0))
    ema = dataclasses.replace(config, loss=dataclasses.replace(config.loss, teacher="ema", ema_decay=0.75))
    data, (before, rollouts) = put_batch(batch, mesh), start
    average, nobody = (jax.tree.map(lambda leaf: times * leaf, before.params) for times in (0.9, 0.0))  # noqa: B023
    after, metrics = update(before.replace(ema=average), Frozen(nobody), data, *rollouts, ema)
    expected, of_frozen = update(before, Frozen(average), data, *rollouts, config)
    assert metrics["distill"] > 0.01
    assert metrics.keys() == of_frozen.keys()
    for name, value in of_frozen.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert largest_difference(after.params, expected.params) < 1e-6
    by_hand = jax.tree.map(lambda old, new: 0.75 * np.array(old) + 0.25 * np.array(new), average, after.params)
    assert largest_difference(after.ema, by_hand) < 1e-6


@pytest.mark.slow
def test_beside_an_average_the_frozen_teacher_holds_retention_the_reference_and_its_own_bare_output(
    config, batch, make_params, mesh
):
    """The average is the student itself at first, so that a comparison with it has no gradient."""
    loss = dataclasses.replace(config.loss, teacher="ema", reference=1.0, anchor="teacher_bare")
    config = dataclasses.replace(config, loss=loss)
    data, frozen = put_batch(batch, mesh), Frozen(make_params(config.model, 1, mesh))
    state = init_state(make_params(config.model, 0, mesh), config, jax.random.key(2))
    norms = {name: float(optax.tree.norm(g)) for name, g in term_gradients(state, frozen, data, config).items()}
    assert norms.keys() == {"distill", "reference", "anchor", "retain"}
    assert min(norms.values()) > 0.01, norms


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_the_stored_prefix_is_read_with_the_weights_that_computed_it(teacher, config, monkeypatch, mesh):
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, teacher=teacher))
    trained, average, fixed = ({"w": jnp.full(2, value)} for value in (1.0, 2.0, 3.0))
    frozen = Frozen(fixed, teacher_prefix=PrefixKV(jnp.zeros(1), jnp.zeros(1)))
    given = []
    monkeypatch.setattr(objective, "objective", lambda *own: given.append(own) or (jnp.sum(own[0].student["w"]), {}))
    train_step_module._gradient(TrainState(0, trained, (), jax.random.key(0), average), frozen, None, config)
    ((networks, *_),) = given
    assert float(networks.teacher["w"][0]) == {"frozen": 3.0, "ema": 2.0}[teacher]
    assert networks.teacher_prefix is (frozen.teacher_prefix if teacher == "frozen" else None)
    assert teacher == "frozen" or float(networks.frozen["w"][0]) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"teacher": "ema"}, {"anchor": "ema"}])
def test_an_average_starts_as_a_copy_and_keeps_its_place_on_the_mesh(fields, config, batch, make_params, mesh8):
    ema = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **fields))
    params = make_params(config.model, 0, mesh8)
    state = init_state(params, ema, jax.random.key(0))
    assert largest_difference(state.ema, params) == 0
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state.ema, params)))
    assert init_state(params, config, jax.random.key(0)).ema is None
    before = jax.eval_shape(lambda: init_state(params, ema, jax.random.key(0)))
    step = functools.partial(train_step.__wrapped__, config=ema)
    after, metrics = jax.eval_shape(step, before, Frozen(params), put_batch(batch, mesh8))
    types, types_before = (jax.tree.map(lambda leaf: str(jax.typeof(leaf)), tree) for tree in (after, before))
    assert types == types_before and "tensor" in str(types.ema)  # shapes and shardings
    assert "anchor" in metrics


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_what_is_trained_its_moments_and_its_average_are_float32(kind, config, make_params, mesh):
    """In bfloat16 an update of 5e-6 would round away. Frozen weights may have it, under an adapter too."""
    rank = LoraConfig(2, 4.0, ("q", "down")) if kind == "bfloat16" else None
    own = dataclasses.replace(config, lora=rank, loss=dataclasses.replace(config.loss, teacher="ema"))
    params = jax.tree.map(lambda leaf: leaf.astype(kind), make_params(config.model, 0, mesh))
    state = init_state(params, own, jax.random.key(0))
    numbers = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)) if leaf.ndim]
    assert numbers and {leaf.dtype.name for leaf in numbers} == {"float32"}


# --- Whose responses ---


@pytest.fixture(scope="module")
def taught(config, batch, make_params):
    """(state, frozen, device batch, the teacher's responses at step 3, those drawn by hand), on one device."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        key, frozen = jax.random.key(0), Frozen(make_params(config.model, 1, mesh))
        data = put_batch(batch.replace(other=None), mesh)
        state = init_state(make_params(config.model, 0, mesh), config, key)
        samples = teacher_rollout(frozen.teacher, data, key, 3, config.model, config.sampling)
        row_keys = rng.row_keys(rng.key_for(key, 3, "rollout"), data.row_number_B)
        by_hand = jax.jit(lambda params: sample(params, config.model, config.sampling, data.context, row_keys))
        yield state, frozen, data, samples, by_hand(frozen.teacher)


@pytest.mark.slow
def test_the_teachers_responses_are_its_own_with_context_and_another_steps_are_others(config, taught):
    _, frozen, data, samples, by_hand = taught
    jax.tree.map(np.testing.assert_array_equal, samples, by_hand)
    later = teacher_rollout(frozen.teacher, data, jax.random.key(0), 4, config.model, config.sampling)
    assert (later.tokens_BxT != samples.tokens_BxT).any(axis=1).sum() > ROWS / 2


@pytest.mark.slow
def test_a_step_that_is_given_responses_learns_from_them_and_samples_no_others(config, taught, products):
    state, frozen, data, samples, _ = taught
    rollout, other = rollout_step(state, frozen, data, config, samples)
    assert rollout is samples and other is None
    assert not products(lambda: rollout_step(state, frozen, data, config, samples))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
def test_an_off_policy_step_is_that_of_the_formula_written_out(divergence, config, taught):
    """Whole logits, one sum, one gradient, one optimiser step: classical distillation, and supervised fine-tuning."""
    state, frozen, data, samples, _ = taught
    loss = LossConfig(divergence=divergence, on_policy_fraction=0.0, temperature=0.8, chunk=4)
    config = dataclasses.replace(config, loss=loss)
    tokens, mask = samples.tokens_BxT, samples.mask_BxT

    def log_probabilities(params, prompts):
        sequences = [jnp.concatenate(pair, axis=1) for pair in ((prompts.tokens_BxP, tokens), (prompts.mask_BxP, mask))]
        hidden = transformer.forward(params, config.model, *sequences)[:, prompts.tokens_BxP.shape[1] - 1 : -1]
        logits = transformer.apply_head(hidden, transformer.head_weights(params, config.model))
        return jax.nn.log_softmax(logits / 0.8, axis=-1)

    def formula(params):
        student, teacher = log_probabilities(params, data.bare), log_probabilities(frozen.teacher, data.context)
        if divergence == "forward_kl":
            per_token = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
        else:
            per_token = -jnp.sum(jax.nn.one_hot(tokens, student.shape[-1]) * student, axis=-1)
        return jnp.sum(per_token * mask) / jnp.sum(mask)

    expected, gradient = jax.jit(jax.value_and_grad(formula))(state.params)
    after, metrics = update(state, frozen, data, samples, None, config)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert ("teacher_entropy" in metrics) == (divergence == "forward_kl")
    updates, _ = jax.jit(optim.optimizer(config.optim).update)(gradient, state.opt_state, state.params)
    assert largest_difference(after.params, optax.apply_updates(state.params, updates)) < 2e-5


@pytest.mark.slow
def test_a_teacher_that_waits_in_the_hosts_memory_teaches_the_same(config, taught):
    state, frozen, data, samples, _ = taught
    config = dataclasses.replace(config, loss=LossConfig(temperature=0.8, chunk=4))
    away = frozen.replace(teacher=offload_to_host(frozen.teacher))
    places = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.teacher)}
    assert places == {"pinned_host"} and bring_to_device(frozen.teacher)["embedding"] is frozen.teacher["embedding"]
    near, far = (update(state, kept, data, samples, None, config) for kept in (frozen, away))
    jax.tree.map(np.testing.assert_array_equal, (near[0].params, near[1]), (far[0].params, far[1]))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(far[0].params)} == {"device"}
    again = teacher_rollout(away.teacher, data, jax.random.key(0), 3, config.model, config.sampling)
    jax.tree.map(np.testing.assert_array_equal, again, samples)
    own = init_state(away.teacher, config, jax.random.key(0)).params
    assert largest_difference(own, frozen.teacher) == 0


def test_a_mixture_draws_whose_step_it_is_after_the_first_which_are_off_policy():
    key = jax.random.key(0)
    uniform = [float(jax.random.uniform(rng.key_for(key, step, "policy"))) for step in range(8)]
    assert any(u < 0.6 for u in uniform[:2]) and {u < 0.6 for u in uniform[2:]} == {True, False}
    mixed = off_policy_steps(LossConfig(on_policy_fraction=0.6, off_policy_steps=2), key, 8)
    assert mixed.tolist() == [True, True, *(u >= 0.6 for u in uniform[2:])]
    assert off_policy_steps(LossConfig(on_policy_fraction=0.0), key, 8).all()
    assert not off_policy_steps(LossConfig(), key, 8).any()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"on_policy_fraction": 0.5}, {"off_policy_steps": 1}])
def test_only_on_policy_steps_report_a_gap_of_log_probabilities(fields, config, halves, start, batch, mesh):
    """Elsewhere it would compare two models."""
    mixed = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **fields))
    before, rollouts = start
    step = functools.partial(update_step, config=mixed)
    _, metrics = jax.eval_shape(step, before, Frozen(before.params), put_batch(batch, mesh), *rollouts)
    assert set(halves.metrics) - set(metrics) == {"logprob_gap", "logprob_gap_max"}


# --- The learning rate ---


@pytest.mark.parametrize("schedule", sorted(optim.SCHEDULES))
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert optim.schedule(OptimConfig(lr=1e-3, steps=10, schedule=schedule))(0) == pytest.approx(1e-3)


def test_the_constant_rate_rises_to_its_value_and_stays():
    rate = optim.schedule(OptimConfig(lr=1e-3, steps=10, schedule="constant", warmup_steps=4))
    wanted = [2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3]  # no step is without a rate: its rollouts would be wasted
    np.testing.assert_allclose([rate(step) for step in (0, 1, 3, 4, 50)], wanted, rtol=1e-6)


def test_the_cosine_rate_rises_and_falls_to_zero_at_the_last_step():
    rate = optim.schedule(OptimConfig(lr=1e-3, steps=10, schedule="cosine", warmup_steps=4))
    wanted = [2.5e-4, 5e-4, 1e-3, 5e-4, 0, 0]
    np.testing.assert_allclose([rate(step) for step in (0, 1, 3, 6.5, 10, 50)], wanted, atol=1e-9)
    assert rate(9) > 0


@pytest.mark.parametrize("schedule", sorted(optim.SCHEDULES))
def test_one_step_of_warm_up_has_the_full_rate(schedule):
    assert optim.schedule(OptimConfig(lr=1e-3, steps=10, schedule=schedule, warmup_steps=1))(0) == pytest.approx(1e-3)


def test_the_gradient_is_clipped_by_its_norm_before_adam():
    """Adam's first step does not show a gradient's scale; its moments do."""
    optimizer = optim.optimizer(OptimConfig(lr=1e-3, steps=10, clip=0.5))
    params = {"w": np.zeros(2, np.float32)}
    _, state = optimizer.update({"w": np.array([30.0, 40.0], np.float32)}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if np.shape(leaf) == (2,)]
    np.testing.assert_allclose(moments[0], [0.03, 0.04], rtol=1e-5)  # (1 - b1) * clip * gradient / norm
