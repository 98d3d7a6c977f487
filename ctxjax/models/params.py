"""Parameters as plain nested dicts, declared once as a tree of ParamSpec.

Abstract shapes (``eval_shape`` of a 70B model on a laptop), shardings and initial values are three maps over the same
declaration, so they cannot disagree.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from ctxjax import sharding
from ctxjax.types import Params


class ParamSpec(NamedTuple):
    """One array: its shape, the logical name of every axis, and the standard deviation of its initial values (0: zeros,
    None: ones)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float | None


def _is_spec(node) -> bool:
    return isinstance(node, ParamSpec)


def shardings(specs, mesh: Mesh):
    """Return the tree of NamedShardings of the parameters on ``mesh``."""
    return jax.tree.map(lambda s: NamedSharding(mesh, sharding.weight_spec(s.axes)), specs, is_leaf=_is_spec)


def abstract(specs, mesh: Mesh, dtype=jnp.float32):
    """Return the tree of ShapeDtypeStructs, with shardings; nothing is allocated."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=NamedSharding(mesh, sharding.weight_spec(s.axes))),
        specs,
        is_leaf=_is_spec,
    )


def init(specs, key: jax.Array, mesh: Mesh, dtype=jnp.float32) -> Params:
    """Draw initial values: normal with each spec's stddev. Each leaf's key follows from its index in the tree's order.

    Leaf by leaf, so that equal specs share one compiled program, in later trees too, and memory holds the temporaries
    of one leaf only.
    """
    leaves, tree = jax.tree.flatten(specs, is_leaf=_is_spec)
    with jax.set_mesh(mesh):
        return jax.tree.unflatten(tree, [_draw(key, index, spec, dtype) for index, spec in enumerate(leaves)])


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def _draw(key: jax.Array, index: jax.Array, spec: ParamSpec, dtype) -> jax.Array:
    if spec.stddev is None:
        value = jnp.ones(spec.shape, dtype)
    elif spec.stddev == 0:
        value = jnp.zeros(spec.shape, dtype)
    else:
        value = spec.stddev * jax.random.normal(jax.random.fold_in(key, index), spec.shape, dtype)
    return jax.reshard(value, sharding.weight_spec(spec.axes))


def count(specs) -> int:
    """Return the number of scalars."""
    return sum(int(np.prod(s.shape)) for s in jax.tree.leaves(specs, is_leaf=_is_spec))
