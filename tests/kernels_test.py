"""Kernels of accelerators give what the reference path gives, in the interpreter or on XLA's own attention."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.models import kernels
from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.attention import Window, attention, choose_kind, kernel_for
from ctxjax.sharding import batch_spec, put_batch, weight_spec
from ctxjax.types import PrefixKV

H, K, DH = 4, 2, 16


def inputs(mesh, B, L, C):
    """Queries, keys and values, a mask with padding on the left and behind the end, a prefix or None, a cotangent that
    is 0 in columns of padding."""
    random = np.random.default_rng(L + C)
    columns, start = np.arange(L), random.integers(0, L // 3, (B, 1))
    real = (columns >= start) & (columns < random.integers(L // 2, L, (B, 1)))
    real[-1] = True

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    rows = put_batch((normal(B, H, L, DH), normal(B, K, L, DH), normal(B, K, L, DH)), mesh)
    q, k, v = (jax.device_put(x, jax.NamedSharding(mesh, batch_spec("heads", None, None))) for x in rows)
    prefix = None
    if C:
        place = jax.NamedSharding(mesh, weight_spec(("kv_heads", None, None)))
        prefix = PrefixKV(*(jax.device_put(normal(K, C, DH), place) for _ in range(2)))
    d_out = np.where(real[:, None, :, None], normal(B, H, L, DH), 0)
    return q, k, v, prefix, *put_batch((real, d_out), mesh)


def values_and_gradients(function, q, k, v, prefix, real, d_out):
    @jax.jit
    def both(d_out, real, *arguments):
        def masked(*arguments):
            return jnp.where(real[:, None, :, None], function(*arguments, real), 0)

        out, back = jax.vjp(masked, *arguments)
        return out, back(jax.reshard(d_out, jax.typeof(out).sharding.spec))

    return jax.device_get(both(d_out, real, q, k, v, prefix))


def reference(q, k, v, prefix, real):
    return attention(q, k, v, real, jnp.arange(q.shape[2])[None], prefix)


def in_order(kernel):
    return lambda q, k, v, prefix, real: kernel(q, k, v, real, prefix)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("length, prefix", [(130, 0), (70, 150), (256, 128)])
def test_splash_is_the_reference_path(mesh8, length, prefix):
    arguments = inputs(mesh8, 4, length, prefix)
    expected = values_and_gradients(reference, *arguments)
    assert_same(values_and_gradients(in_order(kernels.splash), *arguments), expected)


@pytest.mark.parametrize("length", [33, 40])
def test_cudnn_is_called_so_that_its_causal_mask_is_ours(mesh8, length, monkeypatch):
    """And with an even number of columns: it refuses an odd one."""
    plain, seen = jax.nn.dot_product_attention, []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **how: seen.append(q.shape[1]) or plain(q, k, v, **how)
    )
    arguments = inputs(mesh8, 4, length, 0)
    turned = functools.partial(kernels.cudnn, implementation="xla")
    expected = values_and_gradients(reference, *arguments)
    assert_same(values_and_gradients(in_order(turned), *arguments), expected)
    assert set(seen) == {length + length % 2}


CPU, TPU = (SimpleNamespace(platform=name) for name in ("cpu", "tpu"))
T4, H100, MI300 = (SimpleNamespace(platform="gpu", compute_capability=version) for version in ("7.5", "9.0", "gfx942"))
LLAMA = ModelConfig(512, 256, 2, 4, 2, 64, 512, dtype="bfloat16")
GEMMA = dataclasses.replace(LLAMA, layer_kinds=(LayerKind(window=4), LayerKind()))
EXACT, WIDE, ODD = (
    dataclasses.replace(LLAMA, **change) for change in ({"dtype": "float32"}, {"head_dim": 256}, {"head_dim": 36})
)


@pytest.mark.parametrize(
    ("device", "model", "kind"),
    [
        (CPU, LLAMA, "reference"), (CPU, EXACT, "reference"), (TPU, LLAMA, "splash"), (TPU, WIDE, "splash"),
        (TPU, ODD, "splash"), (TPU, EXACT, "reference"), (TPU, GEMMA, "reference"), (H100, LLAMA, "cudnn"),
        (H100, EXACT, "reference"), (H100, GEMMA, "reference"), (H100, WIDE, "reference"), (H100, ODD, "reference"),
        (T4, LLAMA, "reference"), (MI300, LLAMA, "reference"),
    ],
)  # fmt: skip
def test_auto_takes_the_kernel_of_the_devices_if_it_can_run_the_model(device, model, kind):
    assert choose_kind("auto", model, device) == kind
    assert choose_kind("reference", model, device) == "reference"
    if kind != "reference":
        assert choose_kind(kind, model, device) == kind


@pytest.mark.parametrize(
    ("kind", "device", "model", "message"),
    [
        ("splash", CPU, LLAMA, "'splash' runs on tpu, and the devices are cpu; use 'auto'"),
        ("cudnn", CPU, LLAMA, "'cudnn' runs on gpu, and the devices are cpu; use 'auto'"),
        ("splash", TPU, GEMMA, "'splash' has no windows, and layers of the model have; use 'auto'"),
        ("cudnn", H100, EXACT, "'cudnn' has no float32, and model.dtype is float32; use 'auto'"),
        ("cudnn", H100, WIDE, "'cudnn' takes a head_dim of at most 128 that 8 divides, and the model's is 256; use"),
        ("cudnn", H100, ODD, "that 8 divides, and the model's is 36; use 'auto'"),
        ("cudnn", T4, LLAMA, "needs a compute capability of 8.0 or more, and the devices have 7.5; use 'auto'"),
    ],
)
def test_a_kernel_that_cannot_run_the_model_on_the_devices_is_an_error(kind, device, model, message):
    with pytest.raises(ValueError, match=f"model.attention = .*{message}"):
        choose_kind(kind, model, device)
    if (kind, model) != ("cudnn", EXACT):
        return
    assert choose_kind("splash", EXACT, TPU) == "splash"  # by name at any precision


def test_passes_that_a_kernel_does_not_know_take_the_reference_path():
    q, short = (jnp.zeros((1, 4, columns, 64), jnp.bfloat16) for columns in (128, 127))
    prefix, window = PrefixKV(q[0], q[0]), Window(4, jnp.arange(128)[None])
    assert kernel_for("splash", q, prefix) is kernels.splash and kernel_for("cudnn", q, None) is kernels.cudnn
    for kind, shape, before, seen in [
        ("splash", short, None, None), ("cudnn", short, None, None), ("splash", q, None, window),
        ("cudnn", q, None, window), ("cudnn", q, prefix, None), ("reference", q, None, None),
    ]:  # fmt: skip
        assert kernel_for(kind, shape, before, seen) is None


def test_the_library_takes_what_splash_gives_its_private_function(monkeypatch):
    """Fails if a new JAX has another one: then read its backward pass again, and mend ``_run_backward``."""
    kernels.check_splash()
    monkeypatch.setattr(kernels.kernel_lib, "_splash_attention_bwd", lambda save_residuals, res, do: None)
    for kind in ("auto", "splash"):
        with pytest.raises(ValueError, match=f"JAX {jax.__version__}, .*model.attention=reference"):
            choose_kind(kind, LLAMA, TPU)
    monkeypatch.setattr(kernels, "kernel_lib", None)  # a JAX without splash: only who wants it needs it
    with pytest.raises(ValueError, match=f"JAX {jax.__version__}, .*model.attention=reference"):
        choose_kind("auto", LLAMA, TPU)
    assert choose_kind("auto", LLAMA, H100) == "cudnn" and choose_kind("reference", LLAMA, TPU) == "reference"


@pytest.mark.slow
def test_the_scores_of_a_long_sequence_are_never_in_memory_at_once(mesh):
    """At 8,192 columns they would take 1 GiB, and their gradient as much again."""
    heads, rows = (jax.NamedSharding(mesh, spec) for spec in (batch_spec("heads", None, None), batch_spec(None)))
    q, k = (jax.ShapeDtypeStruct((1, count, 8192, DH), jnp.float32, sharding=heads) for count in (H, K))
    real = jax.ShapeDtypeStruct((1, 8192), bool, sharding=rows)
    gradient = jax.grad(lambda q, k, v, real: reference(q, k, v, None, real).sum(), argnums=(0, 1, 2))
    memory = jax.jit(gradient).lower(q, k, k, real).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < H * 8192**2 * 4 / 16
