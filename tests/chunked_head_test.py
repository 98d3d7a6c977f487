"""The sweep over chunks of the head against the dense program, in value and in gradient, and what it must not do."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.distill import chunked_head, objective
from ctxjax.distill.anchors import ANCHORS
from ctxjax.distill.divergences import DIVERGENCES, REMAINDERS, SUPPORTS, Support, divergence, kl, token_logprob
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.terms import token_values
from ctxjax.sharding import batch_spec, make_mesh

B, T, D, V, CHUNK = 4, 7, 6, 16, 3
VIEWS = {"q_x": "student", "q_c": "student", "f": "teacher", "f_x": "teacher", "ema": "ema"}
# Each support and remainder with one divergence: the sweep knows neither, and divergences_test has all pairs.
PARTIAL = list(zip(itertools.cycle(DIVERGENCES), itertools.product(SUPPORTS[1:], REMAINDERS)))
NAMES = [f"{name}/full" for name in DIVERGENCES] + [f"{name}/{kind}/{rest}" for name, (kind, rest) in PARTIAL]
NAMES += [f"anchor/{name}" for name in ANCHORS] + ["logprob"]


def every_value(raw, tokens):
    """All values that a loss may ask for, from sharded logits; picking ids out of the vocabulary wants it whole."""
    whole = {view: jax.reshard(x, batch_spec(None, None)) for view, x in raw.items()}
    values = {"logprob": token_logprob(raw["q_x"], tokens)}
    values |= {f"{name}/full": divergence(name, raw["q_x"], raw["f"], 0.3) for name in DIVERGENCES}
    for name, (kind, rest) in PARTIAL:
        values[f"{name}/{kind}/{rest}"] = divergence(name, whole["q_x"], whole["f"], 0.3, Support(kind, 4, rest))
    return values | {f"anchor/{name}": anchor.value(raw) for name, anchor in ANCHORS.items()}


def two_values(raw):
    return {"distill": kl(raw["q_x"], raw["f"]), "anchor": kl(raw["q_x"], raw["q_c"]), "free": jnp.sum(raw["q_c"], -1)}


def problem(seed, rows=B, columns=T, width=D, vocab=V, views=VIEWS, longest=None, dtype=jnp.float32):
    """(hidden by view, heads by owner, mask, tokens) on the current mesh; the second row has no token."""
    rng = np.random.default_rng(seed)

    def put(x, spec):
        return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lengths = rng.integers(1, (longest or columns) + 1, rows)
    lengths[0], lengths[1] = longest or columns, 0
    mask = np.arange(columns) < lengths[:, None]
    hidden = {v: put(jnp.asarray(normal(rows, columns, width), dtype), batch_spec(None, None)) for v in views}
    heads = {owner: put(normal(width, vocab), jax.P(None, "tensor")) for owner in dict.fromkeys(views.values())}
    tokens = rng.integers(0, vocab, (rows, columns), dtype=np.int32)
    return hidden, heads, put(mask, batch_spec(None)), put(tokens, batch_spec(None))


def weights_of(seed, names, mask):
    rng = np.random.default_rng(seed)
    return {name: jnp.where(mask, rng.uniform(0.5, 2, mask.shape).astype(np.float32), 0.0) for name in names}


def loss_of(scan, function, chunk, views, hidden, heads, weights, mask, *others):
    return scan(function, chunk, hidden, {v: heads[views[v]] for v in hidden}, weights, mask, *others)


def gradient_of(scan, function, chunk, views=VIEWS):
    """The compiled ((loss, values), (gradients of hidden, of heads)) of (hidden, heads, weights, mask, *others)."""
    of = functools.partial(loss_of, scan, function, chunk, views)
    return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))


def assert_close(ours, expected, tolerance=2e-5):
    """Within ``tolerance`` of the largest entry of each array."""

    def compare(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())

    jax.tree.map(compare, ours, expected)


# --- Every divergence, support and anchor ---


@pytest.fixture(scope="module")
def sweeps():
    """run(devices, name): what the sweep computes on so many devices, and what the dense program computes on one,
    where the value ``name`` alone is the loss. One program serves all names, since weights are data."""

    @functools.cache
    def program(scan, devices):
        mesh = make_mesh(2, 2, 2) if devices == 8 else make_mesh(devices=jax.devices()[:1])
        return mesh, gradient_of(scan, every_value, CHUNK)

    def run(scan, devices, name):
        mesh, gradient = program(scan, devices)
        with jax.set_mesh(mesh):
            hidden, heads, mask, tokens = problem(0)
            weights = dict.fromkeys(NAMES, jnp.zeros_like(mask, jnp.float32)) | weights_of(1, [name], mask)
            return jax.device_get(gradient(hidden, heads, weights, mask, tokens))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", [1, 8])
def test_value_and_gradient_of_every_argument_are_those_of_the_dense_program(sweeps, devices, name):
    expected = sweeps(chunked_head.dense, 1, name)
    (_, values), _ = expected
    assert values.keys() == set(NAMES) and np.abs(values[name]).max() > 1e-3
    assert_close(sweeps(chunked_head.chunked, devices, name), expected)


# --- Shapes ---

THREE = {"q_x": "student", "q_c": "student", "f": "teacher"}


@pytest.mark.parametrize("seed", range(4))
def test_any_shape_and_chunk_size(seed, mesh):
    rng = np.random.default_rng(seed)
    rows, columns, width, vocab = (int(rng.integers(low, high)) for low, high in ((2, 5), (2, 9), (1, 7), (2, 20)))
    chunk = [1, columns - 1, columns, columns + 3][seed]
    hidden, heads, mask, _ = problem(seed, rows, columns, width, vocab, THREE)
    weights = weights_of(seed, ["distill", "anchor"], mask)
    ours, expected = (
        gradient_of(scan, two_values, chunk, THREE)(hidden, heads, weights, mask)
        for scan in (chunked_head.chunked, chunked_head.dense)
    )
    assert_close(ours, expected)
    (_, values), (d_hidden, _) = ours
    assert all(value.shape == mask.shape and not np.any(value[1]) for value in values.values())
    assert all(g.shape == (rows, columns, width) and not np.any(g[1]) for g in d_hidden.values())


def test_views_may_share_a_head_or_have_their_own(mesh):
    """A head's gradient is the sum over the views that share it."""
    hidden, heads, mask, _ = problem(0, views=THREE)
    weights, own = weights_of(0, ["distill", "anchor"], mask), {view: view for view in THREE}
    copies = {view: heads[owner] for view, owner in THREE.items()}
    (loss, _), (d_hidden, shared) = gradient_of(chunked_head.chunked, two_values, CHUNK, THREE)(
        hidden, heads, weights, mask
    )
    (same_loss, _), (same, apart) = gradient_of(chunked_head.chunked, two_values, CHUNK, own)(
        hidden, copies, weights, mask
    )
    summed = {"student": apart["q_x"] + apart["q_c"], "teacher": apart["f"]}
    assert_close((same_loss, same, summed), (loss, d_hidden, shared))


def test_columns_behind_the_longest_response_are_not_visited(mesh):
    hidden, heads, mask, _ = problem(3, columns=11, views=THREE, longest=4)  # two chunks of 3 hold 4 columns
    weights = weights_of(0, ["distill", "anchor"], mask)
    sweep = gradient_of(chunked_head.chunked, two_values, CHUNK, THREE)
    poisoned = {view: x.at[:, 6:].set(jnp.nan) for view, x in hidden.items()}
    ours, clean = sweep(poisoned, heads, weights, mask), sweep(hidden, heads, weights, mask)
    jax.tree.map(np.testing.assert_array_equal, ours, clean)
    assert np.abs(ours[1][0]["q_x"][:, :4]).max() > 0 and not np.any(ours[1][0]["q_x"][:, 6:])


def test_a_batch_without_tokens_has_loss_and_gradients_zero(mesh):
    hidden, heads, mask, _ = problem(0, views=THREE)
    weights, nothing = weights_of(0, ["distill", "anchor"], mask & False), mask & False
    result = gradient_of(chunked_head.chunked, two_values, CHUNK, THREE)(hidden, heads, weights, nothing)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


# --- Gradients ---


@pytest.mark.slow
def test_the_gradient_scales_with_what_follows_the_loss_and_none_comes_from_values(mesh):
    hidden, heads, mask, _ = problem(0, views=THREE)
    weights = weights_of(0, ["distill", "anchor"], mask)

    def after(hidden, heads, values_too):
        loss, values = loss_of(chunked_head.chunked, two_values, CHUNK, THREE, hidden, heads, weights, mask)
        return jnp.square(loss) + sum(jnp.sum(v) for v in values.values()) if values_too else loss

    of = jax.jit(jax.value_and_grad(after, argnums=(0, 1)), static_argnums=2)
    loss, plain = of(hidden, heads, False)
    _, squared = of(hidden, heads, True)
    assert_close(squared, jax.tree.map(lambda g: 2 * loss * g, plain))


@pytest.mark.slow
def test_values_alone_have_no_gradient(mesh):
    hidden, heads, mask, _ = problem(0, views=THREE)

    def total(hidden, heads):
        _, values = loss_of(chunked_head.chunked, two_values, CHUNK, THREE, hidden, heads, {}, mask)
        return sum(jnp.sum(v) for v in values.values())

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, heads)
    assert value != 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("trained, of_heads, of_hidden", [("hidden", 0, 1), ("head", 1, 0), ("both", 1, 1)])
def test_gradients_that_nobody_asks_for_are_not_made(trained, of_heads, of_hidden, products, mesh):
    """Of a frozen head, as under an adapter, and of a frozen teacher's hidden states."""
    hidden, heads, mask, _ = problem(0, views=THREE)
    weights = weights_of(0, ["distill", "anchor"], mask)

    def loss(bare, head):
        h, w = hidden | {"q_x": bare}, heads | {"student": head}
        return loss_of(chunked_head.chunked, two_values, CHUNK, THREE, h, w, weights, mask)[0]

    argnums = {"hidden": 0, "head": 1, "both": (0, 1)}[trained]
    shapes = products(jax.grad(loss, argnums), hidden["q_x"], heads["student"])
    assert shapes.count((B, CHUNK, V)) == len(THREE)  # each view's logits, once
    assert shapes.count((1, D, V)) == of_heads
    assert shapes.count((B, CHUNK, D)) == of_hidden


@pytest.mark.slow
def test_half_precision_hidden_states(mesh):
    """Products are of bfloat16; losses, and sums that make a head's gradient, are float32."""
    hidden, heads, mask, _ = problem(0, views=THREE, dtype=jnp.bfloat16)
    weights = weights_of(0, ["distill", "anchor"], mask)
    sweep, dense = (gradient_of(scan, two_values, CHUNK, THREE) for scan in (chunked_head.chunked, chunked_head.dense))
    (loss, values), (d_hidden, d_heads) = sweep(hidden, heads, weights, mask)
    assert {x.dtype for x in (loss, *values.values(), *d_heads.values())} == {jnp.dtype("float32")}
    assert {x.dtype for x in d_hidden.values()} == {jnp.dtype("bfloat16")}
    rounded = {owner: head.astype(jnp.bfloat16).astype(jnp.float32) for owner, head in heads.items()}
    exact = {view: x.astype(jnp.float32) for view, x in hidden.items()}
    expected = dense(exact, rounded, weights, mask)
    assert_close((loss, values), expected[0])
    assert_close((d_hidden, d_heads), expected[1], tolerance=0.02)
    quarters = {"free": jnp.where(mask, 0.25, 0.0)}  # a gradient of the logits that bfloat16 holds exactly
    _, (_, d_heads) = sweep(hidden, heads, quarters, mask)
    by_hand = 0.25 * jnp.sum(jnp.where(mask[..., None], exact["q_c"], 0.0), axis=(0, 1))
    assert_close(d_heads["student"], jnp.broadcast_to(by_hand[:, None], (D, V)), tolerance=1e-6)


# --- What devices say to each other ---


def computations(text: str) -> dict[str, str]:
    """The bodies of a compiled program's computations, by name."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return dict(found)


def reached(name: str, bodies: dict[str, str]) -> str:
    """A computation's text with that of everything it calls."""
    seen, todo = set(), {name}
    while todo:
        seen |= todo
        named = {other for one in todo for other in re.findall(r"%([\w.\-]+)", bodies[one])}
        todo = (named & bodies.keys()) - seen
    return "\n".join(bodies[one] for one in sorted(seen))


def moved(operation: str, text: str) -> list[tuple[int, ...]]:
    """The shapes that operations of this name give."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
    return [tuple(map(int, dims.split(","))) for line in lines for dims in re.findall(r"\w+\[([\d,]+)\]", line)]


def of_one_head(shapes, width, vocab):
    return [shape for shape in shapes if math.prod(shape) in (width * vocab, width * vocab // 2)]


@pytest.mark.slow
@pytest.mark.parametrize("support, whole_logits", [("full", False), ("teacher_top_k", True)])
def test_devices_exchange_no_logits_and_a_heads_gradient_once_behind_the_loop(support, whole_logits, tiny_model, mesh8):
    """The loss with an anchor and all its metrics, on eight devices with half of the vocabulary each. Only a support
    wants logits whole."""
    width, vocab = 26, 88
    hidden, heads, mask, tokens = problem(0, rows=8, columns=9, width=width, vocab=vocab, views=THREE)
    model = dataclasses.replace(tiny_model, vocab_size=vocab)
    config = LossConfig(beta=0.5, support=support, top_k=4, clip=1.0)
    function = functools.partial(token_values, objective.terms(config), (model, model), config.temperature)
    gradient = gradient_of(chunked_head.chunked, function, CHUNK, THREE)
    weights = weights_of(0, ["distill", "anchor"], mask)
    text = gradient.lower(hidden, heads, weights, mask, tokens).compile().as_text()
    bodies = computations(text)
    loop = "\n".join(reached(name, bodies) for name in set(re.findall(r"body=%?([\w.\-]+)", text)))
    assert (2, CHUNK, width) in moved("all-reduce", loop)  # hidden states' gradients, summed over the vocabulary
    assert not of_one_head(moved("all-reduce", loop), width, vocab)
    assert len(of_one_head(moved("all-reduce", text), width, vocab)) == 2  # the student's and the teacher's
    assert any(vocab in shape for shape in moved("all-gather", text)) == whole_logits
    assert not moved("all-to-all", text)
