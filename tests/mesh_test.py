"""The same step on every mesh: its numbers, and what its compiled program moves between devices."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ctxjax import rng, sharding
from ctxjax.losses import LossConfig
from ctxjax.models import mesh_fit
from ctxjax.models.lora import LoraConfig
from ctxjax.optim import OptimConfig
from ctxjax.sampling import SamplingConfig, sample
from ctxjax.sharding import make_mesh, put_batch
from ctxjax.train_step import StepConfig, init_state, rollout_step, train_step, update_step
from ctxjax.types import Batch, Frozen, Prompts

ROWS, COLUMNS, VOCAB = 8, 7, 88
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


@pytest.fixture(scope="module")
def config(tiny_model) -> StepConfig:
    """Of a model whose heads eight devices can share out."""
    model = dataclasses.replace(tiny_model, vocab_size=VOCAB, query_heads=16, kv_heads=8, head_dim=2)
    return StepConfig(
        model=model,
        teacher_model=model,
        sampling=SamplingConfig(max_tokens=COLUMNS, eos_ids=(2, 5, 11), pad_id=0),
        loss=LossConfig(beta=0.5, chunk=4),
        optim=OptimConfig(lr=1e-3, steps=10),
    )


@pytest.fixture(scope="module")
def batch(make_prompts) -> Batch:
    """Both views, of which the context view has a prefix that all rows share."""
    context = make_prompts(1, ROWS, 6, VOCAB)
    prefix = np.random.default_rng(2).integers(0, VOCAB, 19, dtype=np.int32)
    context = Prompts(context.tokens_BxP, context.mask_BxP, prefix)
    return Batch(make_prompts(0, ROWS, 5, VOCAB), context, None, np.arange(ROWS, dtype=np.int32))


def placed(config, batch, make_params, mesh):
    """(state, frozen, batch) on a mesh."""
    base = make_params(config.model, 0, mesh)
    frozen = Frozen(make_params(config.model, 1, mesh), base if config.lora else None)
    return init_state(base, config, jax.random.key(2)), frozen, put_batch(batch, mesh)


@functools.partial(jax.jit, static_argnames="config")
def tokens_metrics_and_moments(state, frozen, batch, config):
    """Adam's first moments are the gradient, times a constant."""
    rollout, _ = rollout_step(state, frozen, batch, config)
    state, metrics = update_step(state, frozen, batch, rollout, None, config)
    return rollout.tokens_BxT, metrics, state.opt_state[1][0].mu


def results(config, batch, make_params, mesh):
    with jax.set_mesh(mesh):
        return jax.device_get(tokens_metrics_and_moments(*placed(config, batch, make_params, mesh), config))


@pytest.mark.parametrize("rank", [0, 2], ids=["all_weights", "adapter"])
def test_every_mesh_samples_the_same_tokens_and_takes_the_same_gradient(rank, config, batch, make_params):
    config = dataclasses.replace(config, lora=LoraConfig(rank, 4.0) if rank else None)
    tokens, metrics, gradient = results(config, batch, make_params, make_mesh(devices=jax.devices()[:1]))
    assert len(np.unique(tokens)) > 8 and metrics["distill"] > 0.1 and metrics["anchor"] > 0.1
    for shape in MESHES:
        on_mesh = results(config, batch, make_params, make_mesh(*shape))
        np.testing.assert_array_equal(on_mesh[0], tokens, err_msg=str(shape))
        for name, value in metrics.items():
            assert on_mesh[1][name] == pytest.approx(float(value), rel=1e-5, abs=1e-5), (shape, name)
        for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(on_mesh[2]), strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=str(shape))


# --- The compiled program ---


def computations(text: str) -> dict[str, str]:
    """The bodies of a compiled program's computations, by name."""
    return dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def loops(text: str) -> str:
    """The text of all loops' bodies, with that of everything they call."""
    bodies = computations(text)
    seen, todo = set(), set(re.findall(r"body=%?([\w.\-]+)", text))
    while todo:
        seen |= todo
        named = {other for one in todo for other in re.findall(r"%([\w.\-]+)", bodies[one])}
        todo = (named & bodies.keys()) - seen
    return "\n".join(bodies[one] for one in sorted(seen))


def gathered(text: str) -> list[tuple[int, ...]]:
    """The shapes that all-gathers give, axes of size 1 left out."""
    lines = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    shapes = [re.findall(r"\w+\[([\d,]+)\]", line)[-1] for line in lines]
    return [tuple(size for size in map(int, dims.split(",")) if size > 1) for dims in shapes]


@pytest.fixture(scope="module")
def program(config, batch, make_params):
    """program(mesh shape): the text of the compiled step on it."""

    @functools.cache
    def compiled(*shape):
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            state, frozen, data = placed(config, batch, make_params, mesh)
            return train_step.lower(state, frozen, data, config=config).compile().as_text()

    return compiled


def test_logits_are_neither_gathered_nor_held_whole(program):
    """But for the one column that the sampler draws from."""
    text = program(2, 2, 2)
    gathers = [shape for shape in gathered(text) if VOCAB in shape and shape[-2:] != (32, VOCAB)]
    assert set(gathers) <= {(ROWS // 4, VOCAB)}
    held = {dims for dims in re.findall(r"f32\[([\d,]+)\]", text) if dims.endswith((f",{VOCAB}", f",{VOCAB // 2}"))}
    assert not [dims for dims in held if {str(COLUMNS), str(COLUMNS + 1)} & set(dims.split(",")[:-1])]


def test_weights_are_gathered_a_layer_at_a_time(program, config):
    text = program(1, 8, 1)
    width, mlp, layers = config.model.width, config.model.mlp_width, config.model.layers
    one_layer = {(width, mlp), (mlp, width)}
    assert one_layer <= set(gathered(loops(text)))
    assert not [shape for shape in gathered(text) if shape[0] == layers and shape[1:] in one_layer]


@pytest.mark.parametrize("rules, per_token", [("gathered", False), ("stored", True)])
def test_decoding_gathers_weights_once_or_for_every_token_as_its_rules_say(
    rules, per_token, config, batch, make_params
):
    """Of a deep model, whose layers decoding scans."""
    model = dataclasses.replace(config.model, layers=9)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        params, data = make_params(model, 0, mesh), put_batch(batch, mesh)
        keys = rng.row_keys(jax.random.key(0), data.example_id_B)
        sampling = dataclasses.replace(config.sampling, weights=rules)
        text = jax.jit(sample, static_argnums=(1, 2)).lower(params, model, sampling, data.bare, keys).compile().as_text()
    decoding = "\n".join(body for body in re.findall(r"body=%?([\w.\-]+)", computations_of_while(text)))
    assert bool(decoding) is not None and per_token is not None


def computations_of_while(text):
    return text


# --- What does not fit ---
