"""The change that training made to a model's weights: its size by layer and matrix, and models with part of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctxjax.types import Params


def scale(before: Params, after: Params, factor: float) -> Params:
    """Return before + factor * (after - before), in float32: ``before`` itself for 0, ``after`` for 1.

    Both are trees of the same weights; merge an adapter first (``lora.merged``).
    """

    def mix(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return (1 - factor) * a + factor * b

    return jax.tree.map(mix, before, after)


def measure(before: Params, after: Params) -> dict[str, dict[str, list[float]]]:
    """Return the size of the change by matrix, in the order of their names.

    Each has "norm", the Frobenius norm of after - before, and "relative", that divided by the norm of before: a number
    for each layer, or one for a matrix that the layers do not have.
    """
    found = {}
    stacked = {(name, True): w for name, w in before["layers"].items()}
    single = {(name, False): w for name, w in before.items() if name != "layers"}
    for (name, is_stacked), old in sorted((stacked | single).items()):
        new = (after["layers"] if is_stacked else after)[name]
        norms, sizes = (
            jnp.atleast_1d(_norm(x, is_stacked)) for x in (new.astype(jnp.float32) - old.astype(jnp.float32), old)
        )
        relative = jnp.where(sizes > 0, norms / jnp.where(sizes > 0, sizes, 1), 0.0)
        found[name] = {"norm": norms.tolist(), "relative": relative.tolist()}
    return found


def _norm(weight: jax.Array, is_stacked: bool) -> jax.Array:
    """Return the norm, or one of each layer [N] of a stack."""
    axes = tuple(range(int(is_stacked), weight.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=axes))
