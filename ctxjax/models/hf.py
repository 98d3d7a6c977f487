"""Hugging Face folders, read: config.json and safetensors. No pickle, no remote code.

A tensor is read slice by slice, straight into the shards that live on this process's devices, so the host
never holds more than the shard being placed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from safetensors import SafetensorError, safe_open

from ctxjax.models import llama, params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

FAMILIES = {"llama": llama}


def _read_json(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a model folder has config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def family_of(fields: dict, folder: Path):
    """The family module of a config.json's ``model_type``."""
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"{folder}/config.json: model_type = {name!r} is not supported; known: {sorted(FAMILIES)}")
    return FAMILIES[name]


def read_config(folder: Path, dtype: str = "float32", remat: bool = False) -> ModelConfig:
    """The architecture in a folder's config.json, to be computed in ``dtype``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    fields = _read_json(folder / "config.json")
    try:
        config = family_of(fields, folder).config_from_hf(fields)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json has no field {error}") from None
    return dataclasses.replace(config, dtype=dtype, remat=remat)


def _files_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map from tensor names to files")
        files = {name: folder / file for name, file in weight_map.items()}
        missing = sorted({str(path) for path in files.values() if not path.exists()})
        if missing:
            raise FileNotFoundError(f"{index} names files that do not exist: {', '.join(missing)}")
        return files
    single = folder / "model.safetensors"
    if not single.exists():
        found = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"; it has {', '.join(found)}, but pickled weights are not read: convert them to safetensors"
            if found
            else ""
        )
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor its index{hint}")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _opened(path: Path):
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def tensor_names(family, config: ModelConfig) -> dict[tuple[str, ...], tuple[list[str], bool, bool]]:
    """Parameter path -> (tensor names, stored transposed, stacked over layers)."""
    specs = transformer.param_specs(config)
    names = {(ours,): ([theirs], flip, False) for ours, (theirs, flip) in family.TOP_NAMES.items() if ours in specs}
    for ours in specs["layers"]:
        theirs, flip = family.LAYER_NAMES[ours]
        stacked = [family.LAYER_PREFIX.format(layer=layer) + theirs for layer in range(config.layers)]
        names["layers", ours] = (stacked, flip, True)
    return names


def _check(folder: Path, config: ModelConfig, names: dict, specs: dict, files: dict[str, Path]) -> None:
    """Raises one ValueError that lists every missing, unexpected and wrongly shaped tensor."""
    expected = {}
    for path, (tensors, flip, stacked) in names.items():
        shape = _leaf(specs, path).shape
        shape = shape[1:] if stacked else shape
        expected |= dict.fromkeys(tensors, tuple(reversed(shape)) if flip else shape)
    tied_copy = {"lm_head.weight"} if config.tied_embeddings else set()
    problems = [f"missing: {name}" for name in expected if name not in files]
    problems += [f"unexpected: {name}" for name in files if name not in expected and name not in tied_copy]
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            stored = set(tensors.keys())
            for name in (n for n, f in files.items() if f == file and n in expected):
                if name not in stored:
                    problems.append(f"missing: {name} (the index says {file.name})")
                    continue
                found = tuple(tensors.get_slice(name).get_shape())
                if found != expected[name]:
                    problems.append(f"wrong shape: {name} is {list(found)}, config.json implies {list(expected[name])}")
    if problems:
        raise ValueError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(problems))


def _leaf(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """The folder's weights as a parameter tree in ``dtype``, sharded over ``mesh``.

    Raises ValueError or FileNotFoundError, with every problem in one message.
    """
    folder = Path(folder)
    family = family_of(_read_json(folder / "config.json"), folder)
    specs = transformer.param_specs(config)
    names, files = tensor_names(family, config), _files_of(folder)
    _check(folder, config, names, specs, files)
    shardings = params_lib.shardings(specs, mesh)
    opened = {file: _opened(file) for file in set(files.values())}

    def read(name: str, index: tuple[slice, ...], flip: bool) -> np.ndarray:
        stored = opened[files[name]].get_slice(name)
        part = stored[tuple(reversed(index)) if flip else index]
        return (part.T if flip else part).astype(jnp.dtype(dtype))

    params: dict = {"layers": {}}
    for path, (tensors, flip, stacked) in names.items():
        shape, sharding = _leaf(specs, path).shape, _leaf(shardings, path)

        def shard(index, tensors=tensors, flip=flip, stacked=stacked):
            if not stacked:
                return np.ascontiguousarray(read(tensors[0], index, flip))
            return np.stack([read(name, index[1:], flip) for name in tensors[index[0]]])

        _leaf(params, path[:-1])[path[-1]] = jax.make_array_from_callback(shape, sharding, shard)
    return params
