"""Kernels of accelerators give what the reference path gives, in the interpreter or on XLA's own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.models import kernels
from ctxjax.models.attention import attention, kernel_for
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


def test_a_kernel_that_these_devices_cannot_run_is_an_error_and_auto_takes_none(mesh):
    q = inputs(mesh, 2, 256, 0)[0].astype(jnp.bfloat16)
    assert kernel_for("auto", q, None) is None and kernel_for("reference", q, None) is None
    for name in ("splash", "cudnn"):
        with pytest.raises(
            ValueError, match=f"model.attention = '{name}' runs on .*, and the devices are cpu; use 'auto'"
        ):
            kernel_for(name, q, None)


@pytest.mark.slow
def test_the_scores_of_a_long_sequence_are_never_in_memory_at_once(mesh):
    """At 8,192 columns they would take 1 GiB, and their gradient as much again."""
    heads, rows = (jax.NamedSharding(mesh, spec) for spec in (batch_spec("heads", None, None), batch_spec(None)))
    q, k = (jax.ShapeDtypeStruct((1, count, 8192, DH), jnp.float32, sharding=heads) for count in (H, K))
    real = jax.ShapeDtypeStruct((1, 8192), bool, sharding=rows)
    gradient = jax.grad(lambda q, k, v, real: reference(q, k, v, None, real).sum(), argnums=(0, 1, 2))
    memory = jax.jit(gradient).lower(q, k, k, real).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < H * 8192**2 * 4 / 16
