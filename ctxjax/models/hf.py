"""Hugging Face folders: config.json and safetensors, in and out. No pickle, no remote code.

Weights stream: every tensor goes in pieces of a few MB from the mapped file to the devices, which turn it, cast it and
put it in its place. The host never holds more than the piece (on CPUs it also holds the model), and each process
reads only what its own devices keep.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
import uuid

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from safetensors.numpy import save_file

from ctxjax.models import llama, params as params_lib, qwen2, qwen3, transformer, weights
from ctxjax.models.family import DERIVED_SUFFIX, LAYER_PREFIX, TOP_NAMES, Family
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (llama, qwen2, qwen3)}

# Bytes of one piece, as stored, on each device. On one core, pieces that fit its cache load twice as fast as whole
# matrices; smaller ones cost dispatches.
PIECE_BYTES = 4 * 2**20


def family_of(fields: dict, folder: Path) -> Family:
    """The family of a config.json's ``model_type``."""
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"{folder}/config.json: model_type = {name!r} is not supported; known: {sorted(FAMILIES)}")
    return FAMILIES[name]


def read_fields(folder: Path) -> dict:
    """The folder's config.json as it is. Raises FileNotFoundError or ValueError that names what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    return weights.read_json(folder / "config.json")


def read_config(folder: Path, dtype: str = "float32", remat: bool = False) -> ModelConfig:
    """The architecture in a folder's config.json, to be computed in ``dtype``."""
    fields = read_fields(folder)
    try:
        config = family_of(fields, folder).config_from_hf(fields)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json has no field {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    return dataclasses.replace(config, dtype=dtype, remat=remat)


def names(family: Family, config: ModelConfig) -> dict[tuple[str, ...], tuple[list[str], bool, bool]]:
    """Parameter path -> (tensor names, stored transposed, stacked over layers)."""
    specs = transformer.param_specs(config)
    paths = {(ours,): ([theirs], flip, False) for ours, (theirs, flip) in TOP_NAMES.items() if ours in specs}
    for ours in specs["layers"]:
        theirs, flip = family.layer_names[ours]
        stacked = [LAYER_PREFIX.format(layer=layer) + theirs for layer in range(config.layers)]
        paths["layers", ours] = (stacked, flip, True)
    return paths


def _check(folder: Path, config: ModelConfig, paths: dict, specs: dict) -> dict[str, weights.Stored]:
    """The folder's tensors. Raises one ValueError that lists every missing, unexpected or unusable one."""
    found, problems = weights.find(folder)
    expected = {}
    for path, (tensors, flip, stacked) in paths.items():
        shape = leaf(specs, path).shape
        shape = shape[1:] if stacked else shape
        expected |= dict.fromkeys(tensors, tuple(reversed(shape)) if flip else shape)
    repeated = {"lm_head.weight"} if config.tied_embeddings else set()
    named = {complaint.split()[1] for complaint in problems}
    problems += [f"missing: {name}" for name in expected if name not in found and name not in named]
    for name, stored in found.items():
        if name not in expected:
            if name not in repeated and not name.endswith(DERIVED_SUFFIX):
                problems.append(f"unexpected: {name}")
        elif stored.shape != expected[name]:
            shapes = f"{list(stored.shape)}, config.json implies {list(expected[name])}"
            problems.append(f"wrong shape: {name} is {shapes}")
        elif stored.dtype not in weights.DTYPES:
            problems.append(f"wrong dtype: {name} is {stored.dtype}, known are {', '.join(weights.DTYPES)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(problems))
    return found


def leaf(tree: dict, path: tuple[str, ...]):
    """What lies at ``path`` in a nested dict."""
    for name in path:
        tree = tree[name]
    return tree


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """The folder's weights as a parameter tree in ``dtype``, sharded over ``mesh``.

    Raises ValueError or FileNotFoundError, with every problem in one message.
    """
    folder = Path(folder)
    family = family_of(read_fields(folder), folder)
    specs = transformer.param_specs(config)
    paths = names(family, config)
    views = weights.Views(_check(folder, config, paths, specs))
    shardings = params_lib.shardings(specs, mesh)
    params: dict = {"layers": {}}
    with jax.set_mesh(mesh):
        for path, (tensors, flip, stacked) in paths.items():
            shape, sharding = leaf(specs, path).shape, leaf(shardings, path)
            array = jnp.zeros(shape, _carrier(dtype), device=sharding)
            for layer, name in enumerate(tensors):
                view = views.view(name)
                array = _place(array, view.T if flip else view, flip, layer if stacked else None, sharding, dtype)
                array.block_until_ready()  # or pieces of later tensors would queue up in memory
                del view
                views.release(name)
            leaf(params, path[:-1])[path[-1]] = _from_carrier(array, dtype)
    return params


def _carrier(dtype: str) -> str:
    """What an array is filled as: XLA's CPU backend fills bfloat16 by way of a float32 copy of the whole array."""
    return "uint16" if dtype == "bfloat16" else dtype


@functools.partial(jax.jit, static_argnames="dtype", donate_argnames="array")
def _from_carrier(array: jax.Array, dtype: str) -> jax.Array:
    return lax.bitcast_convert_type(array, dtype)


def _place(
    array: jax.Array, value: np.ndarray, flip: bool, layer: int | None, sharding: NamedSharding, dtype: str
) -> jax.Array:
    """``array`` with ``value`` as its whole, or as one layer of it.

    ``value`` is cut along the axis that is contiguous in the file, and on each device a piece of its own shard is
    placed. All devices go in step: piece i is one array of which each device holds the i-th part of its shard.
    """
    axis = value.ndim - 1 if flip else 0
    spec = P(*sharding.spec[array.ndim - value.ndim :])
    per_layer = NamedSharding(sharding.mesh, spec)
    local = per_layer.shard_shape(value.shape)
    row_bytes = value.itemsize * int(np.prod(local)) // local[axis]
    rows = min(max(PIECE_BYTES // row_bytes, 1), local[axis])
    piece_shape = list(value.shape)
    piece_shape[axis] = value.shape[axis] // local[axis] * rows
    starts = np.zeros(array.ndim, np.int32)
    if layer is not None:
        starts[0] = layer
    for first in range(0, local[axis], rows):
        first = min(first, local[axis] - rows)  # the last piece is as long as the others, and overlaps

        def part(index, first=first):
            shard = (index[axis].start or 0) // rows
            source = list(index)
            source[axis] = slice(shard * local[axis] + first, shard * local[axis] + first + rows)
            return value[tuple(source)]

        piece = jax.make_array_from_callback(tuple(piece_shape), per_layer, part)
        starts = starts.copy()  # an earlier call may still read it
        starts[array.ndim - value.ndim + axis] = first
        array = _update(array, piece, starts, spec=sharding.spec, dtype=dtype)
    return array


@functools.partial(jax.jit, static_argnames=("spec", "dtype"), donate_argnames="array")
def _update(array: jax.Array, piece: jax.Array, starts: np.ndarray, *, spec: P, dtype: str) -> jax.Array:
    """Casts a piece and writes it into ``array``, shard by shard, at ``starts`` of every shard."""

    def local(array, piece, starts):
        piece = piece.astype(dtype)
        if array.dtype != piece.dtype:
            piece = lax.bitcast_convert_type(piece, array.dtype)
        piece = piece.reshape((1,) * (array.ndim - piece.ndim) + piece.shape)
        return lax.dynamic_update_slice(array, piece, tuple(starts))

    specs = (spec, P(*spec[array.ndim - piece.ndim :]), P())
    return jax.shard_map(local, in_specs=specs, out_specs=spec)(array, piece, starts)


def save(
    folder: Path, params: Params, config: ModelConfig, tokenizer, stop_ids: tuple[int, ...], model_type: str
) -> None:
    """Writes a folder that transformers opens: weights, config, tokenizer with chat template, generation config.

    The folder must not exist yet; it appears under its name only when it is complete.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    family = FAMILIES[model_type]
    tensors = {}
    for path, (tensor_names, flip, stacked) in names(family, config).items():
        value = np.asarray(jax.device_get(leaf(params, path)))
        for name, part in zip(tensor_names, value if stacked else [value]):
            tensors[name] = np.ascontiguousarray(part.T if flip else part)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    fields = family.config_to_hf(config) | {
        "torch_dtype": str(value.dtype),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    generation = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
