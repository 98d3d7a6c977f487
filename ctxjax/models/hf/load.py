"""Read Hugging Face folders: config.json and safetensors. No pickle, no remote code.

Weights stream: each shard of each parameter is assembled in host memory and moved to its device before the next one. So
the host holds one shard (on a CPU it becomes the device's own memory, not a copy) and the tensor being read, and a
process reads only what its own devices keep.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from ctxjax.host import progress
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.hf import gemma3, llama, mistral, olmo2, qwen2, qwen3, safetensors_files, seed_oss, smollm3
from ctxjax.models.hf.family import DERIVED_SUFFIX, LAYER_PREFIX, TOP_NAMES, Family
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (llama, qwen2, qwen3, mistral, seed_oss, smollm3, olmo2, gemma3)
}

TIED_ROWS = 8192  # of a head that are compared with the embedding at a time
ALIGNMENT = 64  # bytes; a CPU device uses host memory without a copy if it starts at a multiple


def find_family(fields: dict, folder: Path) -> Family:
    """Return the family of a config.json's ``model_type``. Raises ValueError if it is not supported."""
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{folder}/config.json: model_type = {name!r} is not supported; known: {sorted(FAMILIES)}")
    return FAMILIES[name]


def read_fields(folder: Path) -> dict:
    """Read the folder's config.json. Raises FileNotFoundError or ValueError that names what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    return safetensors_files.read_json(folder / "config.json")


def read_config(folder: Path, dtype: str = "float32", remat: str = "none") -> ModelConfig:
    """Read the architecture from a folder's config.json; ``dtype`` is the one it computes in."""
    fields = read_fields(folder)
    family = find_family(fields, folder)
    try:
        config = family.config_from_hf(fields)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json has no field {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    return dataclasses.replace(config, dtype=dtype, remat=remat)


def list_tensor_names(family: Family, config: ModelConfig) -> dict[tuple[str, ...], tuple[list[str], bool, bool]]:
    """Return parameter path -> (tensor names, whether they are stored transposed, whether layers are stacked)."""
    specs = transformer.param_specs(config)
    paths = {(ours,): ([theirs], flip, False) for ours, (theirs, flip) in TOP_NAMES.items() if ours in specs}
    for ours in specs["layers"]:
        theirs, flip = family.layer_names[ours]
        stacked = [LAYER_PREFIX.format(layer=layer) + theirs for layer in range(config.layers)]
        paths["layers", ours] = (stacked, flip, True)
    return paths


def _check_tensors(folder: Path, config: ModelConfig, paths: dict, specs: dict) -> dict[str, safetensors_files.Stored]:
    """Return the folder's tensors. Raises one ValueError that lists every missing, unexpected or unusable one."""
    found, problems = safetensors_files.find(folder)
    expected = {}
    for path, (tensors, flip, stacked) in paths.items():
        shape = get_leaf(specs, path).shape
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
        elif stored.dtype not in safetensors_files.DTYPES:
            problems.append(f"wrong dtype: {name} is {stored.dtype}, known are {', '.join(safetensors_files.DTYPES)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(problems))
    if config.tied_embeddings and "lm_head.weight" in found:
        _check_tied_head(folder, found["lm_head.weight"], found["model.embed_tokens.weight"])
    return found


def _check_tied_head(folder: Path, head: safetensors_files.Stored, embedding: safetensors_files.Stored) -> None:
    """Raise ValueError if the stored head is not the embedding, which config.json says is the head."""
    problem = ""
    if head.shape != embedding.shape or head.dtype not in safetensors_files.DTYPES:
        problem = f"is {list(head.shape)} of {head.dtype}, and {embedding.name} is {list(embedding.shape)}"
    else:
        rows = head.shape[0]
        parts = [(slice(first, min(first + TIED_ROWS, rows)),) for first in range(0, rows, TIED_ROWS)]
        different = sum(int(np.any(head.read(part) != embedding.read(part), axis=1).sum()) for part in parts)
        if different:
            problem = f"differs from {embedding.name} in {different} of {rows} rows"
    if problem:
        raise ValueError(
            f"{folder}: config.json says tie_word_embeddings = true, but lm_head.weight {problem}; set it to false if "
            "the head was trained, or delete lm_head.weight if it is left over"
        )


def get_leaf(tree: dict, path: tuple[str, ...]):
    """Return the value at ``path`` in a nested dict."""
    for name in path:
        tree = tree[name]
    return tree


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """Load the folder's weights as a parameter tree in ``dtype``, sharded over ``mesh``.

    Raises ValueError or FileNotFoundError, with every problem in one message.
    """
    folder = Path(folder)
    family = find_family(read_fields(folder), folder)
    specs = transformer.param_specs(config)
    paths = list_tensor_names(family, config)
    stored = _check_tensors(folder, config, paths, specs)
    shardings = params_lib.shardings(specs, mesh)

    def make_shard(tensors, flip, stacked, index, shape):
        """Assemble one shard on the host: the part ``index`` of every tensor of ``tensors``."""
        part = _allocate(shape, dtype)
        layers, rest = (range(len(tensors))[index[0]], index[1:]) if stacked else ([0], index)
        for target, layer in zip(part if stacked else [part], layers):
            piece = stored[tensors[layer]].read(tuple(reversed(rest)) if flip else rest)
            safetensors_files.copy(target, piece, flip)
        return part

    params: dict = {"layers": {}}
    size = params_lib.count(specs) * jnp.dtype(dtype).itemsize
    with progress.Bar(f"loading {folder.name}", size, "B") as bar:
        for path, names_and_layout in paths.items():
            make = functools.partial(make_shard, *names_and_layout)
            array = _assemble(get_leaf(specs, path).shape, get_leaf(shardings, path), make)
            get_leaf(params, path[:-1])[path[-1]] = array
            bar.update(array.nbytes)
        _check_values(folder, params, paths)
    return params


def _check_values(folder: Path, params: Params, paths: dict) -> None:
    """Raise ValueError with the names of the tensors that have a value which is not finite.

    Such files were damaged, or saved by a run that diverged. Reads the weights once, on their devices.
    """
    bad = []
    for path, (tensors, _, stacked) in paths.items():
        finite = np.atleast_1d(jax.device_get(_is_finite(get_leaf(params, path), stacked)))
        bad += [tensor for tensor, is_good in zip(tensors, finite, strict=True) if not is_good]
    if bad:
        shown = "\n  ".join(bad[:8] + [f"and {len(bad) - 8} more"] * (len(bad) > 8))
        raise ValueError(f"{folder} has weights that are not finite numbers; fetch or export it again:\n  {shown}")


@functools.partial(jax.jit, static_argnames="stacked")
def _is_finite(array: jax.Array, stacked: bool) -> jax.Array:
    """Return whether all values are finite, bool []; of a stacked array, by layer, bool [N].

    0 times a value is 0 only if it is finite. This takes no memory, while all(isfinite(array)) takes a byte per value.
    """
    return jnp.sum(0 * array, axis=tuple(range(stacked, array.ndim))) == 0


def _assemble(shape: tuple[int, ...], sharding: NamedSharding, make: Callable) -> jax.Array:
    """Build the array whose shards are ``make(index, shard's shape)``, one after the other; replicas are made once."""
    replicas: dict[str, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        replicas.setdefault(str(index), []).append((device, index))
    arrays = []
    for group in replicas.values():
        part = make(group[0][1], sharding.shard_shape(shape))
        arrays += [jax.device_put(part, device) for device, _ in group]
        jax.block_until_ready(arrays)
        del part  # before the next is allocated
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _allocate(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Allocate an array that a CPU device uses without a copy."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(jnp.dtype(dtype)).reshape(shape)
