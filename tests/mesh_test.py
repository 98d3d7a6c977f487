"""The same step on every mesh: its numbers, and what its compiled program moves between devices."""

from collections.abc import Iterable
import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ctxjax import rng, sharding
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step, update_step
from ctxjax.models import mesh_check
from ctxjax.models.lora import TARGETS, LoraConfig
from ctxjax.sharding import make_mesh, put_batch
from ctxjax.types import Batch, Frozen, Prompts

ROWS, COLUMNS, VOCAB = 8, 9, 88
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
ADAPTER = LoraConfig(2, 4.0, TARGETS)


@pytest.fixture(scope="module")
def config(tiny_model) -> StepConfig:
    """Of a model whose heads eight devices can share out."""
    model = dataclasses.replace(tiny_model, vocab_size=VOCAB, query_heads=16, kv_heads=8, head_dim=2)
    return StepConfig(
        model=model,
        teacher_model=model,
        sampling=SamplingConfig(max_tokens=COLUMNS, eos_ids=(2, 5, 11), pad_id=0),
        loss=LossConfig(beta=0.5, chunk=2),
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
    state = init_state(base, config, jax.random.key(2))
    if config.lora:  # a new adapter does nothing, and half of its gradient is 0
        noise = np.random.default_rng(3)
        moved = jax.tree.map(lambda x: jax.device_put(0.2 * noise.normal(size=x.shape), x.sharding), state.params)
        state = state.replace(params=jax.tree.map(lambda x, old: x.astype(old.dtype), moved, state.params))
    return state, frozen, put_batch(batch, mesh)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def tokens_state_and_metrics(state, frozen, batch, config):
    """The whole step, and what it sampled. Adam's first moments are the gradient, times a constant."""
    rollout, _ = rollout_step(state, frozen, batch, config)
    return rollout.tokens_BxT, *update_step(state, frozen, batch, rollout, None, config)


@pytest.fixture(scope="module")
def on(config, batch, make_params):
    """on(mesh shape, adapter or None): (tokens, gradient, metrics) of a step, and the text of its compiled program."""

    @functools.cache
    def run(shape, lora=None):
        own = dataclasses.replace(config, lora=lora)
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(*shape, devices=devices)
        with jax.set_mesh(mesh):
            inputs = placed(own, batch, make_params, mesh)
            program = tokens_state_and_metrics.lower(*inputs, own).compile()
            tokens, state, metrics = program(*inputs)
            return jax.device_get((tokens, state.opt_state[1][0].mu, metrics)), program.as_text()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "lora"),
    [*((shape, None) for shape in MESHES), ((2, 2, 2), ADAPTER)],
    ids=lambda value: "full" if value is None else "lora" if value is ADAPTER else str(value),
)
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
def test_every_mesh_samples_the_tokens_and_takes_the_gradient_of_one_device(shape, lora, on):
    (tokens, gradient, metrics), _ = on((1, 1, 1), lora)
    (tokens_on_mesh, gradient_on_mesh, metrics_on_mesh), _ = on(shape, lora)
    assert len(np.unique(tokens)) > 8 and metrics["distill"] > 0.1 and metrics["anchor"] > 0.1
    np.testing.assert_array_equal(tokens_on_mesh, tokens)
    for name, value in metrics.items():
        assert metrics_on_mesh[name] == pytest.approx(float(value), rel=1e-5, abs=2e-5), name
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_on_mesh), strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=5e-5 * max(np.abs(one).max(), 1e-3))


# --- The compiled program ---


def computations(text: str) -> dict[str, str]:
    """The bodies of a compiled program's computations, by name."""
    return dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def reached(text: str, names: Iterable[str]) -> str:
    """The text of the named computations, with that of everything they call."""
    bodies = computations(text)
    seen, todo = set(), set(names)
    while todo:
        seen |= todo
        called = {other for one in todo for other in re.findall(r"%([\w.\-]+)", bodies[one])}
        todo = (called & bodies.keys()) - seen
    return "\n".join(bodies[one] for one in sorted(seen))


def loops(text: str) -> set[str]:
    """The names of all loops' bodies."""
    return set(re.findall(r"body=%?([\w.\-]+)", text))


def all_gather_shapes(text: str) -> set[tuple[int, ...]]:
    """The shapes that all-gathers give, axes of size 1 left out."""
    lines = re.findall(r"= (.*?) all-gather\(", text)
    shapes = [dims for line in lines for dims in re.findall(r"\w+\[([\d,]+)\]", line)]
    return {tuple(size for size in map(int, dims.split(",")) if size > 1) for dims in shapes}


@pytest.mark.slow
def test_logits_are_neither_gathered_nor_held_whole(on, config):
    """But for the one column that the sampler draws from, and the head, which is no logits."""
    _, text = on((2, 2, 2))
    width, rows = config.model.width, ROWS // 4
    of_vocabulary = {
        shape for shape in all_gather_shapes(text) if {VOCAB, VOCAB // 2} & set(shape) and width not in shape
    }
    assert of_vocabulary == {(rows, VOCAB)}
    held = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    logits = {shape for shape in held if shape[-1] in (VOCAB, VOCAB // 2) and width not in shape}
    assert logits and max(np.prod(shape[:-1]) for shape in logits) < rows * COLUMNS


@pytest.mark.slow
def test_weights_are_gathered_a_layer_at_a_time(on, config):
    _, text = on((1, 8, 1))
    width, mlp, layers = config.model.width, config.model.mlp_width, config.model.layers
    one_layer = {(width, mlp), (mlp, width)}
    assert one_layer & all_gather_shapes(reached(text, loops(text)))
    stacks = {(layers, *shape) for shape in one_layer}
    in_training = {shape for name in loops(text) for shape in all_gather_shapes(reached(text, [name]))}
    assert not stacks & in_training


@pytest.mark.slow
@pytest.mark.parametrize("rules, per_token", [("gathered", False), ("stored", True)])
def test_decoding_gathers_weights_once_or_for_every_token_as_its_rules_say(
    rules, per_token, config, batch, make_params
):
    """Of a deep model, whose layers decoding scans: out of a loop that is unrolled XLA itself moves what it can."""
    mesh, model = make_mesh(2, 2, 2), dataclasses.replace(config.model, layers=9)
    with jax.set_mesh(mesh):
        params, data = make_params(model, 0, mesh), put_batch(batch, mesh)
        keys = rng.row_keys(jax.random.key(0), data.row_number_B)
        sampling = dataclasses.replace(config.sampling, weights=rules)
        text = jax.jit(sample, static_argnums=(1, 2)).lower(params, model, sampling, data.bare, keys)
        text = text.compile().as_text()
    decoding = [name for name in loops(text) if f"s32[{ROWS // 4},{COLUMNS}]" in computations(text)[name]]
    assert decoding
    width, mlp = config.model.width, config.model.mlp_width // 2
    weights = {(width, mlp), (mlp, width)} & all_gather_shapes(reached(text, decoding))
    assert bool(weights) == per_token


# --- What does not fit ---


def devices_of(slices: int, each: int) -> list:
    return [
        SimpleNamespace(id=i, slice_index=i // each, process_index=i // each, platform="cpu", device_kind="cpu")
        for i in range(slices * each)
    ]


def test_rows_alone_are_spread_over_slices():
    grid = sharding.arrange_devices(devices_of(2, 4), (4, 2, 1))
    for place, device in np.ndenumerate(grid):
        assert device.slice_index == place[0] // 2, place


def test_devices_that_name_no_slices_are_in_one_or_in_one_per_process():
    devices = devices_of(2, 4)
    for device in devices:
        device.slice_index = None
    assert sharding.arrange_devices(devices, (1, 8, 1)).shape == (1, 8, 1)  # two slices would not take data = 1
    for place, device in np.ndenumerate(sharding.arrange_devices(devices, (4, 2, 1), slices=2)):
        assert device.process_index == place[0] // 2, place


def test_slices_that_do_not_fit_are_named_with_what_would():
    with pytest.raises(ValueError, match="mesh.data = 1 is not divisible by mesh.slices = 2; use 2"):
        sharding.arrange_devices(devices_of(2, 4), (1, 8, 1))
    with pytest.raises(ValueError, match="mesh.slices = 4, but the 8 devices are in 2 slices; use 2"):
        sharding.arrange_devices(devices_of(2, 4), (4, 2, 1), slices=4)
    with pytest.raises(ValueError, match="mesh.slices = 2, but the 8 devices are in 1 processes"):
        sharding.arrange_devices(jax.devices(), (8, 1, 1), slices=2)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tensor": 4, "fsdp": 2}, "tiny: kv_heads = 2 not divisible by mesh.tensor = 4; use mesh.tensor = 2$"),
        ({"tensor": 2, "fsdp": 4}, "tiny: width = 18 not divisible by mesh.fsdp = 4; use mesh.fsdp = 3 or 6$"),
    ],
)
def test_a_dimension_that_does_not_fit_is_named_with_what_would(sizes, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        mesh_check.check_model_fits_mesh(dataclasses.replace(tiny_model, width=18), make_mesh(**sizes), "tiny")
