"""A prefix that all rows share is read once, and nothing but the cost tells."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import rng
from ctxjax.data import prompts as prompts_lib
from ctxjax.distill import losses, scoring
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import Networks, WeightedBatch, objective
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.evaluation import views
from ctxjax.inputs import decoding
from ctxjax.models import attention, params as params_lib, transformer
from ctxjax.models.architecture import LayerKind
from ctxjax.sharding import put_batch
from ctxjax.types import Batch

ROWS, ONLY_IN_PREFIX = 4, 39
WINDOWS = (LayerKind(window=5, rope_theta=50.0), LayerKind(window=15))  # into the prefix of 13 tokens, and past it
GRADIENT = 1e-6  # tolerance of gradients, of which the largest are above 1e-2
# (prefix, prompt, response) columns: a prefix of one token, of fewer tokens than devices, of no multiple of them.
LENGTHS = [(1, 3, 2), (3, 4, 5), (13, 6, 4), (40, 2, 3)]


@pytest.fixture(params=["mesh", "mesh8"])
def any_mesh(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_view(make_prompts):
    """make_view(seed, C, P): (shared, per row): prompts behind C random tokens, as a prefix and spelled out."""

    def make(seed, C, P):
        prompts = make_prompts(seed, ROWS, P, vocab=ONLY_IN_PREFIX)
        prefix_C = np.random.default_rng(seed).integers(0, ONLY_IN_PREFIX, C, dtype=np.int32)
        prefix_C[C // 2] = ONLY_IN_PREFIX
        own = [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens_BxP, prompts.mask_BxP)]
        per_row = prompts_lib.left_pad([[*prefix_C.tolist(), *ids] for ids in own], C + P, pad_id=9)
        return prompts.replace(prefix_C=prefix_C), per_row

    return make


@functools.partial(jax.jit, static_argnums=1)
def states_and_gradient(params, model, prompts, rollout):
    """Hidden states of the real response tokens (else 0), and the parameters' gradient of a function of them."""

    def loss(params):
        hidden = scoring.response_hidden(params, model, prompts, rollout)
        hidden = jnp.where(rollout.mask_BxT[..., None], hidden, 0.0)
        return jnp.mean(jnp.sin(hidden)), hidden

    grads, hidden = jax.grad(loss, has_aux=True)(params)
    return hidden, grads


def close(one, two, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)
    return True


def close_states(one, two):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "on"), [((13, 6, 4), "mesh"), *((lengths, "mesh8") for lengths in LENGTHS)], ids=str
)
def test_value_and_gradient_are_those_of_the_prefix_in_every_row(
    lengths, on, tiny_model, make_params, make_view, make_rollout, request
):
    (C, P, T), mesh = lengths, request.getfixturevalue(on)
    params, rollout = make_params(tiny_model, 0, mesh), make_rollout(2, ROWS, T, vocab=ONLY_IN_PREFIX)
    one, two = (
        states_and_gradient(params, tiny_model, *put_batch((view, rollout), mesh)) for view in make_view(1, C, P)
    )
    assert np.abs(one[0]).max() > 1 and np.abs(np.asarray(one[1]["embedding"])[ONLY_IN_PREFIX]).max() > 1e-5
    assert close_states(one[0], two[0]) and close(one[1], two[1], atol=GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"kv_heads": 1}, {"layer_kinds": WINDOWS}], ids=list)
def test_models_of_other_kinds_read_a_prefix_alike(change, tiny_model, make_params, make_view, make_rollout, mesh):
    model = dataclasses.replace(tiny_model, **change)
    params, rollout = make_params(model, 0, mesh), make_rollout(2, ROWS, 4)
    one, two = (states_and_gradient(params, model, *put_batch((v, rollout), mesh)) for v in make_view(1, 13, 6))
    assert close_states(one[0], two[0]) and close(one[1], two[1], atol=GRADIENT)


@pytest.mark.slow
def test_scores_in_chunks_of_columns_are_the_same_scores(
    params, tiny_model, make_view, make_rollout, mesh, monkeypatch
):
    data = put_batch((make_view(1, 13, 6)[0], make_rollout(2, ROWS, 4)), mesh)
    whole = states_and_gradient(params, tiny_model, *data)
    monkeypatch.setitem(attention.CHUNK_SCORES, "cpu", ROWS * 4 * 22 * 2)  # two columns of H = 4 heads at a time
    model = dataclasses.replace(tiny_model, norm_eps=tiny_model.norm_eps * (1 + 1e-7))  # compiled anew
    chunked = states_and_gradient(params, model, *data)
    assert close_states(whole[0], chunked[0]) and close(whole[1], chunked[1], atol=GRADIENT)


def test_keys_of_the_prefix_are_never_repeated_for_the_rows(params, tiny_model, make_view, make_rollout, mesh):
    """C = 29 occurs in no other size, so an array with axes B, C and Dh would be a copy of the keys for each row."""
    data = put_batch((make_view(1, 29, 6)[0], make_rollout(2, ROWS, 4)), mesh)
    program = re.sub(r"@\([a-z,]*\)|@[a-z]*", "", str(states_and_gradient.trace(params, tiny_model, *data).jaxpr))
    K, Dh = tiny_model.kv_heads, tiny_model.head_dim
    assert f"[{K},29,{Dh}]" in program
    assert f"[{ROWS},{K},29,{Dh}]" not in program


@functools.partial(jax.jit, static_argnums=(1, 2))
def sampled(params, model, config, prompts, ids):
    return sample(params, model, config, prompts, rng.row_keys(jax.random.key(5), ids))


@pytest.mark.parametrize("layers", [2, 9])  # unrolled and scanned
def test_nor_are_they_in_decoding(layers, tiny_model, make_view, mesh):
    """The scores of one column, [K, B, G, C], are a product per key head; the prompts' have 6 columns of queries."""
    model, config = dataclasses.replace(tiny_model, layers=layers), SamplingConfig(max_tokens=4, eos_ids=(2,), pad_id=0)
    params = params_lib.abstract(transformer.param_specs(model), mesh)
    view, ids = put_batch((make_view(1, 29, 6)[0], np.arange(ROWS)), mesh)
    program = re.sub(r"@\([a-z,]*\)|@[a-z]*", "", str(sampled.trace(params, model, config, view, ids).jaxpr))
    K, G, Dh = model.kv_heads, model.query_heads // model.kv_heads, model.head_dim
    assert f"[{K},{ROWS},{G},29]" in program
    assert f"[{ROWS},{K},29,{Dh}]" not in program and f"[{ROWS},{K},{G},29]" not in program


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 9])  # unrolled and scanned
def test_the_sampler_draws_the_same_tokens(layers, tiny_model, make_params, make_view, any_mesh):
    model = dataclasses.replace(tiny_model, layers=layers)
    config = SamplingConfig(max_tokens=8, eos_ids=(2, 5, 11), pad_id=0)
    params, ids = make_params(model, 0, any_mesh), np.arange(ROWS)
    one, two = (
        jax.device_get(sampled(params, model, config, *put_batch((view, ids), any_mesh)))
        for view in make_view(1, 13, 6)
    )
    assert one.mask_BxT.sum(axis=1).max() > 1
    np.testing.assert_array_equal(one.tokens_BxT, two.tokens_BxT)
    np.testing.assert_allclose(one.logprobs_BxT, two.logprobs_BxT, atol=1e-4)


@pytest.mark.slow
def test_evaluation_takes_batches_of_rows_and_the_prefix_whole(params, tiny_model, make_view, make_rollout, mesh):
    shared, per_row = make_view(1, 13, 6)
    control, config = make_view(3, 5, 4)[0], SamplingConfig(max_tokens=4, eos_ids=(2, 5, 11), pad_id=0)
    one, two = (
        decoding.decode(params, tiny_model, config, view, jax.random.key(0), size, mesh)
        for view, size in ((shared, 3), (per_row, ROWS))
    )
    np.testing.assert_array_equal(one.tokens_BxT, two.tokens_BxT)
    rollout = make_rollout(2, ROWS, 4)
    kl, cosines, _ = views.compare(params, tiny_model, shared, per_row, control, rollout, 3, mesh)
    np.testing.assert_allclose(kl[rollout.mask_BxT], 0, atol=1e-5)
    np.testing.assert_allclose(cosines["cosine"][:, rollout.mask_BxT], 1, atol=1e-5)
    assert cosines["control"][-1][rollout.mask_BxT].max() < 0.999


@pytest.mark.slow
def test_what_a_frozen_teacher_made_of_the_prefix_serves_every_step(
    params, frozen, tiny_model, make_view, make_rollout, mesh
):
    (bare, _), (context, per_row) = make_view(0, 3, 4), make_view(1, 13, 6)
    ids, rollout = np.arange(ROWS, dtype=np.int32), make_rollout(2, ROWS, 4)

    @jax.jit
    def compiled(params, frozen, batch, y, teacher_prefix):
        rows, config = WeightedBatch(batch, y, losses.token_weights(y.mask_BxT, "token_mean")), LossConfig(beta=0.5)

        def loss(params):
            networks = Networks(params, frozen, None, tiny_model, tiny_model, teacher_prefix)
            return objective(networks, config, rows, 0)[0]

        return jax.value_and_grad(loss)(params)

    def loss_and_gradient(context, teacher_prefix):
        batch, y = put_batch((Batch(bare, context, None, ids), rollout), mesh)
        return compiled(params, frozen, batch, y, teacher_prefix)

    prefix_kv = jax.jit(transformer.prefix_kv, static_argnums=1)
    kept, stale = (prefix_kv(weights, tiny_model, context.prefix_C) for weights in (frozen, params))
    expected = loss_and_gradient(per_row, None)
    assert close(loss_and_gradient(context, None), expected)
    assert close(loss_and_gradient(context, kept), expected)
    assert abs(loss_and_gradient(context, stale)[0] - expected[0]) > 1e-2


def test_a_batch_on_a_mesh_has_its_rows_spread_and_its_prefix_everywhere(make_view, mesh8):
    prompts = put_batch(make_view(1, 5, 3)[0], mesh8)
    assert prompts.prefix_C.sharding.is_fully_replicated and prompts.prefix_C.shape == (5,)
    assert prompts.tokens_BxP.sharding.shard_shape((ROWS, 3)) == (1, 3)


# --- Finding it ---

HEAD = list(range(100, 170))


@pytest.mark.parametrize(
    "token_lists, expected",
    [
        ([[*HEAD, 1, 2], [*HEAD, 3], [*HEAD, 1, 9, 9]], HEAD),
        ([[*HEAD, 1, 2], [*HEAD, 1], [*HEAD, 1, 9, 9]], HEAD),  # one prompt would have no token of its own
        ([[*HEAD, 1], [*HEAD, 1]], HEAD),
        ([[*HEAD[:31], 1], [*HEAD[:31], 2]], []),  # too short to be worth a pass of its own
        ([[*HEAD[:32], 1], [*HEAD[:32], 2]], HEAD[:32]),
        ([[*HEAD, 1]], []),  # nobody to share it with
        ([[1, *HEAD], [2, *HEAD]], []),
        ([HEAD, []], []),
        ([], []),
    ],
)
def test_the_shared_prefix_is_the_longest_that_leaves_every_prompt_a_token(token_lists, expected):
    assert prompts_lib.choose_shared_prefix(token_lists) == expected


def test_left_padding_behind_a_prefix_by_example():
    padded = prompts_lib.left_pad([[17, 4, 9, 8], [17, 4, 5]], 3, pad_id=0, prefix=[17, 4])
    assert padded.tokens_BxP.tolist() == [[0, 9, 8], [0, 0, 5]]
    assert padded.mask_BxP.tolist() == [[False, True, True], [False, False, True]]
    assert padded.prefix_C.tolist() == [17, 4]
    assert prompts_lib.left_pad([[17]], 2, pad_id=0).prefix_C is None
    with pytest.raises(ValueError, match="prompt 1 does not start with the 2 tokens"):
        prompts_lib.left_pad([[17, 4, 9], [17, 5, 9]], 3, pad_id=0, prefix=[17, 4])
