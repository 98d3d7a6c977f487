"""The device mesh and the rules that map the model's logical axes onto it.

A mesh always exists and always has the axes ("data", "fsdp", "tensor"), on one CPU as on a pod, in
*explicit* mode: every array's type carries its sharding, so a wrong layout fails while tracing, by
name, instead of running slowly.

    data    rows of the batch; weights replicated
    fsdp    rows of the batch, and the storage of weights along their ``embed`` axis
    tensor  heads, mlp and vocabulary
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from ctxjax.types import map_rows

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# How weights are stored. At their use the "embed" axis is gathered (see ``gathered``).
WEIGHT_RULES = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of data x fsdp x tensor devices, in explicit mode.

    Raises ValueError where the product is not the number of devices, naming sizes that work.
    """
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data*fsdp*tensor = {data}*{fsdp}*{tensor} = {data * fsdp * tensor}, but there are {len(devices)} "
            f"devices; for example data=1, fsdp={len(devices)}, tensor=1 uses all of them"
        )
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def weight_spec(axes: tuple[str | None, ...]) -> P:
    """Where a weight with these logical axes is stored."""
    return P(*(None if axis is None else WEIGHT_RULES[axis] for axis in axes))


def gathered(weight: jax.Array, *axes: str | None) -> jax.Array:
    """A weight as a matrix product wants it: the shards along ``embed`` collected, the rest in place.

    Called on one layer's weights inside the scan over layers, so that at most one layer is whole.
    """
    return jax.reshard(weight, P(*(None if axis in (None, "embed") else WEIGHT_RULES[axis] for axis in axes)))


def batch_spec(*rest: str | None) -> P:
    """Spec of an activation: rows over data and fsdp, the other axes as named."""
    return P(BATCH, *(None if axis is None else WEIGHT_RULES[axis] for axis in rest))


def platform() -> str:
    """What the current mesh's devices are: "cpu", "gpu" or "tpu", also where a program is compiled for a mesh of
    devices that are elsewhere."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def batch_ways(mesh: Mesh | None = None) -> int:
    """Over how many devices a mesh, or the current one, spreads the rows of a batch."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape[axis] for axis in BATCH)


def first_rows(x: jax.Array, count: int) -> jax.Array:
    """The first ``count`` rows of every device's share of x [B, ...]: nothing moves between devices."""
    ways = batch_ways()
    spec = jax.typeof(x).sharding.spec[1:]
    apart = jnp.reshape(x, (ways, x.shape[0] // ways, *x.shape[1:]), out_sharding=P(BATCH, None, *spec))
    return jnp.reshape(apart[:, :count], (ways * count, *x.shape[1:]), out_sharding=P(BATCH, *spec))


def micro_batches(x: jax.Array, count: int) -> jax.Array:
    """x [B, ...] as [count, B / count, ...]; every part holds rows of every device, so nothing moves between them."""
    ways = batch_ways()
    spec = jax.typeof(x).sharding.spec[1:]
    rows = x.shape[0] // ways // count
    apart = jnp.reshape(x, (ways, count, rows, *x.shape[1:]), out_sharding=P(BATCH, None, None, *spec))
    shape = (count, ways * rows, *x.shape[1:])
    return jnp.reshape(jnp.swapaxes(apart, 0, 1), shape, out_sharding=P(None, BATCH, *spec))


def put_batch(tree, mesh: Mesh):
    """Places host arrays [B, ...] on the mesh, rows over data and fsdp, and shared prefixes whole on every device.

    Every process holds the same global batch and places only its own rows. Raises ValueError where B is
    not divisible by data * fsdp.
    """
    ways = batch_ways(mesh)

    def put(array, spec):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    def put_rows(array):
        check_divisible("batch", np.shape(array)[0], ways)
        return put(array, P(BATCH))

    return map_rows(put_rows, tree, shared=lambda array: put(array, P()))


def check_divisible(name: str, rows: int, ways: int) -> None:
    """Raises ValueError, with sizes that work, where ``rows`` cannot be spread over ``ways`` = data * fsdp."""
    if rows % ways:
        below = rows // ways * ways
        near = f"{below} or {below + ways}" if below else str(ways)
        raise ValueError(f"{name} = {rows} is not divisible by mesh data*fsdp = {ways}; use {near}")
