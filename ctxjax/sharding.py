"""The device mesh and the rules that map the model's logical axes onto it.

A mesh always exists and always has the axes ("data", "fsdp", "tensor"), on one CPU as on a pod, in
*explicit* mode: every array's type carries its sharding, so a wrong layout fails while tracing, by
name, and does not just run slowly.

    data    rows of the batch; weights replicated
    fsdp    rows of the batch, and the storage of weights along their ``embed`` axis
    tensor  heads, mlp and vocabulary
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax import lax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from ctxjax.types import bounded, map_rows

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# How weights are stored. The "embed" axis is all-gathered just before use (see ``all_gather_embed``).
WEIGHT_RULES = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}

# Sharding of weights during decoding. "gathered": all-gather ``embed`` once before the first token; every device then
# holds its ``tensor`` shard of a whole copy of the model. "stored": all-gather for every token.
DECODE_RULES = {"gathered": WEIGHT_RULES | {"embed": None}, "stored": WEIGHT_RULES}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis, and of slices that the first axis spans; see ``make_mesh``."""

    data: int = bounded(negative=True)
    fsdp: int = bounded(negative=True)
    tensor: int = bounded(negative=True)
    slices: int = bounded(0, zero=True)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list | None = None, slices: int = 0) -> Mesh:
    """Make a mesh of data x fsdp x tensor devices, in explicit mode.

    ``slices``: groups of devices with fast links inside and a slower network between them; only ``data`` is spread
    over several. 0: take the slices that the devices name; if they name none, all are in one. If they name none or one,
    ``slices`` may be the number of processes: then every process is one.
    Raises ValueError if the sizes do not fit the devices, naming sizes that work.
    """
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data*fsdp*tensor = {data}*{fsdp}*{tensor} = {data * fsdp * tensor}, but there are {len(devices)} "
            f"devices; for example data=1, fsdp={len(devices)}, tensor=1 uses all of them"
        )
    grid = arrange_devices(devices, (data, fsdp, tensor), slices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def arrange_devices(devices: list, shape: tuple[int, int, int], slices: int = 0) -> np.ndarray:
    """Arrange the devices in an array of this shape, neighbours on the network next to each other (``make_mesh``)."""
    by_slice = {getattr(device, "slice_index", None) or 0 for device in devices}
    by_process = {device.process_index for device in devices}
    slices = slices or len(by_slice)
    # On TPUs a ring of the mesh may have to bend around the torus of the chips.
    bend = {"allow_split_physical_axes": devices[0].platform == "tpu"}
    if slices == 1 and len(by_slice) == 1:
        return mesh_utils.create_device_mesh(shape, devices, **bend)
    if slices not in (len(by_slice), len(by_process)) or (slices != len(by_slice) > 1):
        there = len(by_slice) if len(by_slice) > 1 else len(by_process)
        kind = "slices" if len(by_slice) > 1 else "processes, and the devices name no slices"
        raise ValueError(f"mesh.slices = {slices}, but the {len(devices)} devices are in {there} {kind}; use {there}")
    check_divisible("mesh.data", shape[0], slices, "mesh.slices")
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]), (slices, 1, 1), devices, process_is_granule=len(by_slice) == 1, **bend
    )


def weight_spec(axes: tuple[str | None, ...]) -> P:
    """Return the spec by which a weight with these logical axes is stored."""
    return P(*(None if axis is None else WEIGHT_RULES[axis] for axis in axes))


def all_gather_embed(weight: jax.Array, *axes: str | None) -> jax.Array:
    """All-gather a weight along ``embed`` for a matrix product; its other axes stay sharded.

    Call it on one layer's weights inside the scan over layers, so that at most one layer is gathered at a time. With
    model.remat = "none" a pass that is differentiated keeps them all for its backward pass.
    """
    return jax.reshard(weight, P(*(None if axis in (None, "embed") else WEIGHT_RULES[axis] for axis in axes)))


def reshard_for_decoding(weight: jax.Array, rules: str) -> jax.Array:
    """Reshard a weight, or the stack of a weight of every layer, by ``DECODE_RULES[rules]``."""
    kept = {axis for axis in DECODE_RULES[rules].values() if axis is not None}
    return jax.reshard(weight, P(*(axis if axis in kept else None for axis in jax.typeof(weight).sharding.spec)))


def lookup(table_VxD: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
    """Return the rows [B, L, D] of a table whose V is sharded over ``tensor``: each device reads the rows it has."""
    vocab = WEIGHT_RULES["vocab"]

    def own(table_RxD, tokens_BxL):
        place = tokens_BxL - lax.axis_index(vocab) * table_RxD.shape[0]
        is_here = (place >= 0) & (place < table_RxD.shape[0])
        rows = table_RxD[jnp.where(is_here, place, 0)]
        return lax.psum(jnp.where(is_here[..., None], rows, 0), vocab)

    return jax.shard_map(own, out_specs=P(BATCH, None, None))(table_VxD, jax.reshard(tokens_BxL, P(BATCH, None)))


def offload_to_host(tree):
    """Move arrays to pinned host memory, every shard to its device's host."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), tree)


def bring_to_device(tree):
    """Move arrays from pinned host memory to the device; leave device arrays unchanged.

    In a traced function each moved array is copied just before its use and freed after it.
    """

    def bring(x):
        is_away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if is_away else x

    return jax.tree.map(bring, tree)


def batch_spec(*rest: str | None) -> P:
    """Return the spec of an activation: rows over data and fsdp, the other axes as named."""
    return P(BATCH, *(None if axis is None else WEIGHT_RULES[axis] for axis in rest))


def batch_ways(mesh: Mesh | None = None) -> int:
    """Return the number of devices over which ``mesh``, or the current one, spreads the rows of a batch."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape[axis] for axis in BATCH)


def platform() -> str:
    """Return the platform of the current mesh's devices, which need not be this machine's: programs are also compiled
    ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def repeat_rows(x: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """Repeat every row of x along ``axis`` ``count`` times, next to each other; nothing moves between devices."""
    shape = (*x.shape[: axis + 1], count, *x.shape[axis + 1 :])
    apart = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    whole = (*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :])
    return jnp.reshape(apart, whole, out_sharding=P(*jax.typeof(x).sharding.spec))


def split_devices(x: jax.Array) -> jax.Array:
    """Return x [B, ...] as [W, B / W, ...]: the rows of each of the W devices (``batch_ways``). Nothing moves."""
    ways, spec = batch_ways(), jax.typeof(x).sharding.spec[1:]
    return jnp.reshape(x, (ways, x.shape[0] // ways, *x.shape[1:]), out_sharding=P(BATCH, None, *spec))


def take_own_rows(x: jax.Array, place_WxR: jax.Array, axis: int = 0) -> jax.Array:
    """Return R rows of each device along ``axis``, by their places among the device's own rows. Nothing moves between
    devices. ``place_WxR`` is sharded as ``split_devices`` leaves it."""
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(lambda x, place_1xR: jnp.take(x, place_1xR[0], axis), out_specs=spec)(x, place_WxR)


def put_own_rows(x: jax.Array, place_WxR: jax.Array, rows: jax.Array) -> jax.Array:
    """Return x with ``rows`` in the places from which ``take_own_rows`` takes them along axis 0."""
    spec = jax.typeof(x).sharding.spec
    put = lambda x, place_1xR, rows: x.at[place_1xR[0]].set(rows)  # noqa: E731
    return jax.shard_map(put, out_specs=spec)(x, place_WxR, rows)


def split_micro_batches(x: jax.Array, count: int) -> jax.Array:
    """Split x [B, ...] into [count, B / count, ...]. Every part has rows of every device, so nothing moves between
    them."""
    ways = batch_ways()
    spec = jax.typeof(x).sharding.spec[1:]
    rows = x.shape[0] // ways // count
    apart = jnp.reshape(x, (ways, count, rows, *x.shape[1:]), out_sharding=P(BATCH, None, None, *spec))
    shape = (count, ways * rows, *x.shape[1:])
    return jnp.reshape(jnp.swapaxes(apart, 0, 1), shape, out_sharding=P(None, BATCH, *spec))


def put_batch(tree, mesh: Mesh):
    """Put host arrays [B, ...] on the mesh, rows over data and fsdp, shared prefixes replicated.

    Every process holds the same global batch and puts only its own rows. Raises ValueError if B is not divisible by
    data * fsdp.
    """
    ways = batch_ways(mesh)

    def put(array, spec):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    def put_rows(array):
        check_divisible("batch", np.shape(array)[0], ways)
        return put(array, P(BATCH))

    return map_rows(put_rows, tree, shared=lambda array: put(array, P()))


def replicate(tree):
    """Replicate arrays over all devices, so that every process can fetch them; call it in compiled functions."""
    return jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), tree)


def to_host(tree):
    """Fetch whole arrays to the host of every process; all processes must call it together."""
    return jax.device_get(tree if jax.process_count() == 1 else jax.jit(replicate)(tree))


def check_divisible(name: str, size: int, ways: int, axes: str = "mesh data*fsdp") -> None:
    """Raise ValueError if ``size`` is not a multiple of ``ways``, the number of devices along ``axes``.

    The message suggests sizes that work.
    """
    if size % ways:
        below = size // ways * ways
        near = f"{below} or {below + ways}" if below else str(ways)
        raise ValueError(f"{name} = {size} is not divisible by {axes} = {ways}; use {near}")


def suggest_mesh(sizes: dict[str, int], device_count: int) -> str:
    """Return the remedy of an error message for ``sizes`` by axis (-1: all devices that remain) that do not fit: the
    nearest sizes of one axis that do, the others unchanged; else a mesh that fits any number of devices."""
    is_open = -1 in sizes.values()
    for axis in sorted(("fsdp", "data", "tensor"), key=lambda axis: sizes[axis] <= 1):
        others = math.prod(size for name, size in sizes.items() if name != axis and size != -1)
        products = {n: others * n for n in range(1, device_count + 1)}
        fitting = [n for n, product in products.items() if device_count % product == 0]
        fitting = fitting if is_open else [n for n in fitting if products[n] == device_count]
        below, above = [n for n in fitting if n < sizes[axis]][-1:], [n for n in fitting if n > sizes[axis]][:1]
        if sizes[axis] != -1 and below + above:
            return f"use mesh.{axis} = {' or '.join(map(str, below + above))}"
    return "mesh.data=1, mesh.fsdp=-1, mesh.tensor=1 fits any number"


def fit_mesh(sizes: dict[str, int], device_count: int) -> MeshConfig:
    """Return the mesh of ``device_count`` devices with these ``sizes`` by field of MeshConfig, of which one may be -1:
    all devices that remain. Raises ValueError if they do not fit, with sizes that would."""
    sizes = dict(sizes)
    slices = sizes.pop("slices")
    given, open_axes = dict(sizes), [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh = {sizes}: sizes are positive, and at most one is -1 (all devices that remain)")
    if open_axes:
        sizes[open_axes[0]] = max(device_count // fixed, 1)
    if math.prod(sizes.values()) != device_count:
        raise ValueError(
            f"mesh = {sizes} needs {math.prod(sizes.values())} devices, and there are {device_count}; "
            f"{suggest_mesh(given, device_count)}"
        )
    check_divisible("mesh.data", sizes["data"], max(slices, 1), "mesh.slices")
    return MeshConfig(**sizes, slices=slices)
