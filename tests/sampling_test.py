"""The sampler: what it reports is what scoring finds, and what it draws depends on row and position alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.sampler import count_ending, count_row_steps
from ctxjax import masks, rng
from ctxjax.distill import divergences, sampling, scoring
from ctxjax.distill.sampling import SamplingConfig, draw_token, filter_logits, invert_cdf, sample
from ctxjax.models import transformer
from ctxjax.models.transformer import LayerKind
from ctxjax.sharding import make_mesh, put_batch
from ctxjax.types import Prompts, Rollout

CONFIG = SamplingConfig(max_tokens=8, eos_ids=(2, 5, 11, 23, 31), pad_id=0, temperature=0.7)
IDS = np.array([40, 41, 7, 99, 5, 1000])
FILTERS = [(0, 0.8), (5, 1.0), (5, 0.6), (1, 1.0), (64, 0.999), (3, 0.999), (0, 1e-6), (20, 0.95)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def compiled(params, model, config, prompts, ids):
    keys = rng.row_keys(rng.key_for(jax.random.key(5), 3, "rollout"), ids)
    return sample(params, model, config, prompts, keys)


def rollout_of(params, model, config, prompts, ids) -> Rollout:
    return jax.device_get(compiled(params, model, config, *put_batch((prompts, ids), jax.sharding.get_mesh())))


@functools.partial(jax.jit, static_argnums=1)
def scored(params, model, prompts, rollout):
    hidden = scoring.response_hidden(params, model, prompts, rollout)
    return transformer.apply_head(hidden, transformer.head_weights(params, model))


def window_logits(*arguments):
    return np.asarray(scored(*arguments))


def rows(tree, index):
    return jax.tree.map(lambda array: array[index], tree)


def assert_close(ours, expected):
    """Equal up to float32: CPUs differ in log-probabilities by some 2e-6 of the largest."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def same(one: Rollout, two: Rollout) -> bool:
    """Equal masks, and equal tokens and log-probabilities if the mask is True."""
    np.testing.assert_array_equal(one.mask_BxT, two.mask_BxT)
    np.testing.assert_array_equal(one.tokens_BxT[one.mask_BxT], two.tokens_BxT[one.mask_BxT])
    assert_close(one.logprobs_BxT, two.logprobs_BxT)
    return True


@pytest.fixture
def prompts(make_prompts) -> Prompts:
    """Six prompts, of which several contain end tokens many times."""
    prompts = make_prompts(0, 6, 7)
    prompts.tokens_BxP[:4, 3:6] = 2
    return prompts


@pytest.fixture
def rollout(params, tiny_model, prompts) -> Rollout:
    rollout = rollout_of(params, tiny_model, CONFIG, prompts, IDS)
    assert len(set(rollout.mask_BxT.sum(axis=1))) > 2, "the responses should differ in length"
    return rollout


def test_log_probabilities_while_decoding_are_those_that_scoring_finds(params, tiny_model, prompts, rollout):
    logits = window_logits(params, tiny_model, prompts, rollout) / CONFIG.temperature
    expected = np.asarray(divergences.token_logprob(logits, rollout.tokens_BxT))
    real = rollout.mask_BxT
    assert_close(rollout.logprobs_BxT[real], expected[real])
    assert expected[real].std() > 0.5, "nearly equal values would hide a shift"


@pytest.mark.slow
def test_a_response_that_outgrows_its_cache_goes_on_alike(params, tiny_model, prompts):
    """70 tokens are decoded by three loops, each with a longer cache; a row ends in the second, others in the last."""
    long = dataclasses.replace(CONFIG, max_tokens=70, eos_ids=())
    tokens = rollout_of(params, tiny_model, long, prompts, IDS).tokens_BxT
    ending = dataclasses.replace(long, eos_ids=(int(tokens[0, 40]),))
    rollout = rollout_of(params, tiny_model, ending, prompts, IDS)
    np.testing.assert_array_equal(rollout.tokens_BxT[rollout.mask_BxT], tokens[rollout.mask_BxT])
    logits = window_logits(params, tiny_model, prompts, rollout) / long.temperature
    expected = np.asarray(divergences.token_logprob(logits, rollout.tokens_BxT))
    real = rollout.mask_BxT
    assert_close(rollout.logprobs_BxT[real], expected[real])
    assert real[0].sum() <= 41 and real.sum() > 70


def test_a_response_includes_its_first_end_token_whichever_it_is_and_nothing_behind_it(rollout):
    ends, cut = set(), 0
    for tokens, mask, logprobs in zip(rollout.tokens_BxT, rollout.mask_BxT, rollout.logprobs_BxT):
        length = mask.sum()
        assert mask[:length].all() and not np.isin(tokens[: length - 1], CONFIG.eos_ids).any()
        assert (tokens[length:] == CONFIG.pad_id).all() and (logprobs[length:] == 0).all()
        if tokens[length - 1] in CONFIG.eos_ids:
            ends.add(int(tokens[length - 1]))
        else:
            assert length == CONFIG.max_tokens
            cut += 1
    assert len(ends) >= 2 and cut >= 1, "the example should have several kinds of end, and a response without"


@pytest.mark.slow
def test_padding_with_the_end_token_changes_no_response(params, tiny_model, prompts, rollout):
    padded_with_end = dataclasses.replace(CONFIG, pad_id=2)
    assert same(rollout, rollout_of(params, tiny_model, padded_with_end, prompts, IDS))


def test_end_tokens_in_the_prompt_are_read_like_any_other(params, tiny_model, prompts, rollout):
    """A mask inferred from ids would make these two prompts alike."""
    first = window_logits(params, tiny_model, prompts, rollout)[0, 0]
    hidden = Prompts(prompts.tokens_BxP, prompts.mask_BxP & (prompts.tokens_BxP != 2))
    assert np.abs(first - window_logits(params, tiny_model, hidden, rollout)[0, 0]).max() > 1e-3


def test_rows_are_drawn_by_their_name_and_not_by_their_place(params, tiny_model, prompts, rollout):
    order = np.array([3, 0, 5, 1, 4, 2])
    permuted = rollout_of(params, tiny_model, CONFIG, rows(prompts, order), IDS[order])
    assert same(rows(rollout, order), permuted)


@pytest.mark.slow
def test_splitting_a_batch_changes_no_token(params, tiny_model, prompts, rollout):
    for part in (slice(0, 3), slice(3, 6)):
        assert same(rows(rollout, part), rollout_of(params, tiny_model, CONFIG, rows(prompts, part), IDS[part]))


def test_more_prompt_padding_changes_no_token(params, tiny_model, prompts, rollout):
    wide = Prompts(*(np.pad(array, [(0, 0), (4, 0)]) for array in (prompts.tokens_BxP, prompts.mask_BxP)))
    assert same(rollout, rollout_of(params, tiny_model, CONFIG, wide, IDS))


def test_equal_prompts_draw_different_responses(params, tiny_model, prompts):
    equal = rows(prompts, np.full(6, 4))
    tokens = rollout_of(params, tiny_model, CONFIG, equal, IDS).tokens_BxT
    assert len({row.tobytes() for row in tokens}) > 3


def test_every_position_of_a_row_has_its_own_random_number(params, tiny_model, prompts):
    """Under a model that finds all tokens equally likely, a response spells out its random numbers."""
    indifferent = params | {"head": params["head"] * 0}
    rollout = rollout_of(indifferent, tiny_model, CONFIG, prompts, IDS)
    keys = rng.row_keys(rng.key_for(jax.random.key(5), 3, "rollout"), jnp.asarray(IDS))
    numbers = np.asarray(rng.token_uniforms(keys, CONFIG.max_tokens))
    np.testing.assert_array_equal(rollout.tokens_BxT[rollout.mask_BxT], np.floor(numbers * 40)[rollout.mask_BxT])


def test_greedy_decoding_takes_the_most_probable_token_of_forward(params, tiny_model, prompts):
    greedy = dataclasses.replace(CONFIG, temperature=0.0, eos_ids=(2,))
    rollout = rollout_of(params, tiny_model, greedy, prompts, IDS)
    logits = window_logits(params, tiny_model, prompts, rollout)
    real = rollout.mask_BxT
    np.testing.assert_array_equal(np.argmax(logits, axis=-1)[real], rollout.tokens_BxT[real])
    at_one = np.asarray(divergences.token_logprob(logits, rollout.tokens_BxT))
    assert_close(rollout.logprobs_BxT[real], at_one[real])


@pytest.mark.slow
def test_a_single_token_is_the_first_of_a_longer_response(params, tiny_model, prompts, rollout):
    single = rollout_of(params, tiny_model, dataclasses.replace(CONFIG, max_tokens=1), prompts, IDS)
    assert single.tokens_BxT.shape == (6, 1) and single.mask_BxT.all()
    assert same(rows(rollout, np.s_[:, :1]), single)


@pytest.mark.slow
def test_columns_after_every_row_has_ended_are_padding(params, tiny_model, prompts):
    always = dataclasses.replace(CONFIG, eos_ids=tuple(range(40)), pad_id=13)
    rollout = rollout_of(params, tiny_model, always, prompts, IDS)
    np.testing.assert_array_equal(rollout.mask_BxT, np.broadcast_to(np.arange(8) == 0, (6, 8)))
    assert (rollout.tokens_BxT[:, 1:] == 13).all() and (rollout.logprobs_BxT[:, 1:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 9])  # deep models hold the cache of all layers in one array
def test_samples_of_a_prompt_are_those_of_as_many_rows_with_their_keys(tiny_model, make_params, prompts, mesh, layers):
    model = dataclasses.replace(tiny_model, layers=layers)
    params, two = make_params(model, 0, mesh), rows(prompts, slice(2))
    samples = rollout_of(params, model, dataclasses.replace(CONFIG, samples=3), two, IDS[:2])

    @jax.jit
    def apart(params, repeated, ids):
        keys = rng.sample_keys(rng.row_keys(rng.key_for(jax.random.key(5), 3, "rollout"), ids), 3)
        return sample(params, model, CONFIG, repeated, keys)

    repeated, ids = put_batch((rows(prompts, np.repeat(np.arange(2), 3)), IDS[:2]), mesh)
    assert same(samples, jax.device_get(apart(params, repeated, ids)))
    assert len({row.tobytes() for row in samples.tokens_BxT[:3]}) == 3


def test_a_prompt_is_read_once_for_all_its_samples(params, tiny_model, prompts, products):
    def shapes(samples):
        inputs = put_batch((prompts, IDS), jax.sharding.get_mesh())
        config = dataclasses.replace(CONFIG, samples=samples)
        return products(lambda *a: compiled(a[0], tiny_model, config, *a[1:]), params, *inputs)

    def reads(samples, rows):  # products with all columns of ``rows`` prompts; on CPUs these are one axis
        return [shape for shape in shapes(samples) if shape[:2] == (rows, 7) or shape[0] == rows * 7]

    assert reads(4, 6) and reads(4, 6) == reads(1, 6)
    assert not reads(4, 24)


def test_the_head_is_never_applied_to_a_whole_prompt(params, tiny_model, prompts):
    inputs = put_batch((prompts, IDS), jax.sharding.get_mesh())
    program = compiled.trace(params, tiny_model, CONFIG, *inputs).jaxpr
    shapes = set(re.findall(r"f32\[([\d,]+)\]", re.sub(r"@\(?[\w, ]+\)?", "", str(program))))
    assert "6,40" in shapes and "6,7,40" not in shapes


@functools.partial(jax.jit, static_argnums=1)
def filtered_jit(logits, config):
    return filter_logits(logits, config)


def kept_by_definition(logits, top_k, top_p):
    """transformers' rule: the k largest; then, in ascending order, drop while the mass so far is <= 1 - top_p."""
    logits = np.asarray(logits, np.float64)
    kept = np.ones_like(logits, bool)
    for row, keep in zip(logits, kept):
        ascending = np.argsort(row)
        if top_k:
            keep[ascending[: max(len(row) - top_k, 0)]] = False
        mass = np.where(keep, np.exp(row - row.max()), 0)
        below = np.cumsum((mass / mass.sum())[ascending])
        if top_p < 1:
            keep[ascending[:-1][below[:-1] <= 1 - top_p]] = False
    return kept


@pytest.mark.parametrize("top_k, top_p", FILTERS)
def test_filters_keep_what_their_definition_keeps(top_k, top_p):
    logits = jax.random.normal(jax.random.key(1), (50, 64)) * 3
    config = dataclasses.replace(CONFIG, top_k=top_k, top_p=top_p)
    after = np.asarray(filtered_jit(logits, config))
    kept = kept_by_definition(logits / CONFIG.temperature, top_k, top_p)
    np.testing.assert_array_equal(after > -1e29, kept)
    np.testing.assert_allclose(after[kept], (np.asarray(logits) / CONFIG.temperature)[kept], rtol=1e-6)


@pytest.mark.parametrize("top_k, top_p", FILTERS)
def test_filters_keep_what_transformers_keeps(top_k, top_p):
    torch = pytest.importorskip("torch", reason="transformers' filters run in torch")
    from transformers.generation import logits_process

    logits = np.array(jax.random.normal(jax.random.key(2), (50, 64)) * 3)
    theirs = logits_process.TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    theirs = logits_process.TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = logits_process.TopPLogitsWarper(top_p)(None, theirs)
    ours = np.asarray(filtered_jit(logits, dataclasses.replace(CONFIG, top_k=top_k, top_p=top_p)))
    np.testing.assert_array_equal(ours > -1e29, np.isfinite(theirs.numpy()))


def test_a_drawn_token_passed_the_filters_and_reports_its_probability_before_them():
    config = dataclasses.replace(CONFIG, top_k=4, top_p=0.9)
    logits = jax.random.normal(jax.random.key(3), (300, 64)) * 2
    token, logprob = jax.jit(lambda x, u: draw_token(x, config, u))(
        logits, jax.random.uniform(jax.random.key(4), (300,))
    )
    scaled = np.asarray(logits, np.float64) / 0.7
    assert kept_by_definition(scaled, 4, 0.9)[np.arange(300), token].all()
    mass = np.exp(scaled)
    expected = np.log(mass / mass.sum(axis=1, keepdims=True))[np.arange(300), token]
    assert_close(logprob, expected)


def test_filtered_samples_are_scored_as_they_are_reported(params, tiny_model, prompts):
    """The gap between sampling and scoring compares like with like: both over the whole vocabulary."""
    filtered = dataclasses.replace(CONFIG, top_p=0.5)
    rollout = rollout_of(params, tiny_model, filtered, prompts, IDS)
    logits = window_logits(params, tiny_model, prompts, rollout) / CONFIG.temperature
    kept = kept_by_definition(logits.reshape(-1, 40), 0, 0.5).reshape(logits.shape)
    real = rollout.mask_BxT
    assert np.take_along_axis(kept, rollout.tokens_BxT[..., None], -1)[real].all() and not kept.all()
    expected = np.asarray(divergences.token_logprob(logits, rollout.tokens_BxT))
    np.testing.assert_allclose(rollout.logprobs_BxT[real], expected[real], rtol=0, atol=1e-5)


tokens_at = jax.jit(invert_cdf)
LAST = np.float32(1 - 2**-24)  # the largest float32 below 1


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 64, 1000])
def test_evenly_spaced_numbers_draw_every_token_in_proportion_to_its_probability(vocab):
    probs = np.random.default_rng(vocab).dirichlet(np.full(vocab, 0.5)).astype(np.float32)
    probs[1::3] = 0  # tokens that a filter took out
    n = 2**14
    uniforms = ((np.arange(n) + 0.5) / n).astype(np.float32)
    drawn = np.asarray(tokens_at(np.broadcast_to(probs, (n, vocab)), uniforms))
    assert (np.diff(drawn) >= 0).all()
    counts = np.bincount(drawn, minlength=vocab)
    assert len(counts) == vocab and not counts[probs == 0].any()
    np.testing.assert_allclose(counts, n * probs / probs.sum(), atol=1.1)


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 64, 1000])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token(vocab):
    probs = np.random.default_rng(0).dirichlet(np.full(vocab, 5.0)).astype(np.float32)
    if vocab > 6:
        probs[:3] = probs[-3:] = 0
    possible = np.flatnonzero(probs)
    drawn = tokens_at(np.stack([probs, probs]), np.array([0, LAST], np.float32))
    np.testing.assert_array_equal(drawn, possible[[0, -1]])


@pytest.mark.parametrize("vocab", [64, 1000])
def test_no_rounding_at_the_border_between_two_tokens_draws_an_impossible_one(vocab):
    """Running sums round differently from place to place; the uniforms here lie on and right beside every step."""
    random = np.random.default_rng(0)
    for density in (0.05, 0.3, 0.9) * 10:
        probs = random.gamma(0.3, size=vocab) * (random.random(vocab) < density)
        probs = ((probs + (np.arange(vocab) == 3)) / (probs.sum() + 1)).astype(np.float32)
        steps = np.cumsum(probs, dtype=np.float64)[random.integers(0, vocab, 2048)] / probs.sum(dtype=np.float64)
        grid = np.round(steps * 2**23) + random.integers(-4, 5, 2048)
        uniforms = (np.clip(grid, 0, 2**23 - 1) / 2**23).astype(np.float32)
        drawn = np.asarray(tokens_at(np.broadcast_to(probs, (2048, vocab)), uniforms))
        assert (drawn < vocab).all() and (probs[drawn] > 0).all()


def test_a_point_mass_is_always_drawn():
    probs = np.eye(100, dtype=np.float32)
    for uniform in (0.0, 0.3, LAST):
        np.testing.assert_array_equal(tokens_at(probs, np.full(100, uniform, np.float32)), np.arange(100))


def test_until_eos_and_the_sampler_agree_on_the_mask(rollout):
    np.testing.assert_array_equal(rollout.mask_BxT, masks.until_eos(jnp.asarray(rollout.tokens_BxT), CONFIG.eos_ids))


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2])
def test_a_batch_of_one_prompt_is_sampled(params, tiny_model, prompts, samples):
    """Broadcasting an axis of size 1 drops its sharding."""
    config = dataclasses.replace(CONFIG, samples=samples)
    one = rollout_of(params, tiny_model, config, rows(prompts, slice(1)), IDS[:1])
    both = rollout_of(params, tiny_model, config, rows(prompts, slice(2)), IDS[:2])
    assert same(one, jax.tree.map(lambda x: x[:samples], both))


# --- Rows that have ended leave the batch ---

KINDS = (LayerKind(window=4, rope_theta=100.0), LayerKind(rope_theta=1000.0))
ENDING = SamplingConfig(max_tokens=24, eos_ids=(2, 5, 11), pad_id=0)


def program_of(model, config):
    """A new jitted sampler, which is traced anew."""

    @jax.jit
    def run(params, prompts, ids):
        return sample(params, model, config, prompts, rng.row_keys(rng.key_for(jax.random.key(5), 3, "rollout"), ids))

    return run


def sampled(monkeypatch, limits, model, config, *arguments):
    """(rollout, text of the compiled program), with these limits for the rows of a device."""
    monkeypatch.setattr(sampling, "row_limits", lambda rows, max_tokens: limits)
    program = program_of(model, config).lower(*arguments).compile()
    return jax.device_get(program(*arguments)), program.as_text()


def reached_limits(rollout: Rollout) -> list[int]:
    """Two numbers of rows that are still unfinished after others have ended, and 0."""
    lengths = np.sort(rollout.mask_BxT.sum(axis=1))[::-1]
    reached = [limit for limit in range(len(lengths) * 3 // 4, 0, -1) if lengths[limit] < lengths[0]]
    assert len(reached) > 1, f"the responses should differ in length, and not in {lengths}"
    return [reached[0], reached[-1], 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_model", "of_sampling", "has_prefix"),
    [
        ({}, {}, False),
        ({}, {"temperature": 0.0, "eos_ids": (2, 5, 11, 3, 4, 6, 7, 8, 9)}, True),
        ({}, {"samples": 2, "top_p": 0.9}, True),
        ({"layers": 9}, {}, True),  # the cache of all layers in one array
        ({"layer_kinds": KINDS}, {}, True),
        ({"layers": 9, "layer_kinds": KINDS[:1] * 8 + KINDS[1:]}, {"samples": 2}, False),
    ],
)
def test_rows_that_leave_change_no_response(
    tiny_model, make_params, make_prompts, mesh, monkeypatch, of_model, of_sampling, has_prefix
):
    model, config = dataclasses.replace(tiny_model, **of_model), dataclasses.replace(ENDING, **of_sampling)
    prompts = make_prompts(0, 16 // config.samples, 7)
    prompts = prompts.replace(prefix_C=np.arange(9, dtype=np.int32) if has_prefix else None)
    arguments = make_params(model, 0, mesh), *put_batch((prompts, np.arange(16 // config.samples) * 7), mesh)
    whole, _ = sampled(monkeypatch, [0], model, config, *arguments)
    fewer, _ = sampled(monkeypatch, reached_limits(whole), model, config, *arguments)
    assert same(whole, fewer)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_on_a_mesh_rows_leave_their_own_device(tiny_model, make_params, make_prompts, monkeypatch, shape):
    """The responses are those of one device. No collective moves the cache, whose columns no other array has."""
    prompts = make_prompts(0, 64, 7).replace(prefix_C=np.arange(9, dtype=np.int32))

    def run(shape, limits):
        mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            inputs = put_batch((prompts, np.arange(64)), mesh)
            return sampled(monkeypatch, limits, tiny_model, ENDING, make_params(tiny_model, 0, mesh), *inputs)

    whole, _ = run((1, 1, 1), [0])
    ways = shape[0] * shape[1]
    fewer, text = run(shape, [5, 2, 1, 0] if ways == 8 else [9, 4, 0])
    by_device = np.sort(whole.mask_BxT.sum(axis=1).reshape(ways, -1), axis=1)
    assert by_device[:, :2].max() < 24 and by_device[:, -1].min() > 2, "every device should have rows that end"
    assert same(whole, fewer)
    slots = str(7 + ENDING.max_tokens - 1)
    moved = re.findall(r"= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", text)
    assert re.search(rf"\b{slots}\b", text) and moved and not [one for one in moved if re.search(rf"\b{slots}\b", one)]


@pytest.mark.slow
def test_the_program_takes_the_steps_that_are_counted(tiny_model, make_params, make_prompts, mesh, monkeypatch):
    """64 responses of up to 96 tokens, each of which is the last with probability 1/24."""
    model = dataclasses.replace(tiny_model, layers=1, vocab_size=48)
    params = make_params(model, 0, mesh)
    indifferent = params | {"head": params["head"] * 0}  # all tokens are equally likely
    arguments = indifferent, *put_batch((make_prompts(0, 64, 5), np.arange(64)), mesh)
    step, rows = transformer.decode_step, []

    def counted(params, config, token_B, real_B, cache):
        jax.debug.callback(lambda: rows.append(token_B.shape[0]))
        return step(params, config, token_B, real_B, cache)

    monkeypatch.setattr(transformer, "decode_step", counted)
    rollout = program_of(model, SamplingConfig(max_tokens=96, eos_ids=(0, 1), pad_id=0))(*arguments)
    lengths = np.asarray(rollout.mask_BxT).sum(axis=1)
    jax.effects_barrier()
    assert set(rows) == {64, *sampling.row_limits(64, 96)} - {0}
    # The pass over the prompts gives the first token.
    assert 64 + sum(rows) == count_row_steps(lengths[None], 96) < 0.6 * 64 * lengths.max()


@pytest.mark.parametrize("rows, max_tokens, most", [(64, 256, 1.25), (128, 1024, 1.25), (64, 128, 1.5), (64, 64, 2.1)])
def test_what_responses_of_different_lengths_cost(rows, max_tokens, most):
    whole, fewer = count_ending(1, rows, max_tokens, batches=20)
    assert 1 < fewer < most and whole > 3.8
    assert count_row_steps(np.full((1, rows), max_tokens), max_tokens) == rows * max_tokens


def test_few_rows_and_short_responses_are_decoded_together():
    assert sampling.row_limits(64, 63) == sampling.row_limits(4, 512) == [0]
    assert sampling.row_limits(64, 64) == [16, 0]
    for rows in (5, 8, 64, 1000):
        limits = sampling.row_limits(rows, 512)
        assert limits == sorted(set(limits), reverse=True) and len(limits) <= 7
        assert rows > limits[0] and limits[-2:][0] >= 4
