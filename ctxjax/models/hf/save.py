"""Hugging Face folders, written: weights in safetensors shards, their index, and PEFT adapters.

A tensor leaves the device and is written while the next one is made, so that the host holds two tensors beside what
the device holds. For that the files are written here: safetensors' own function takes all tensors of a file at once,
and filling fresh memory with a whole shard took longer than writing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import functools
import json
import math
from pathlib import Path
import shutil
from typing import NamedTuple
import uuid

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from ctxjax.models import lora
from ctxjax.models.hf import load as hf_load, safetensors_files
from ctxjax.models.lora import LoraConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

MAX_SHARD_BYTES = 5_000_000_000
# At a time, and past Python's own buffer: on a virtual machine 4 GB/s, and larger or buffered writes at times below 1.
WRITE_BYTES = 2**20
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # numpy's name -> safetensors'


class _Tensor(NamedTuple):
    """A tensor to be written; ``fill`` puts its values into a host array of this shape and type."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[np.ndarray], None]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which gets its name when the block ends, and is removed where it fails.

    Raises FileExistsError where ``folder`` exists: nothing is overwritten.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; nothing was written. Choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save(
    folder: Path, params: Params, config: ModelConfig, tokenizer, stop_ids: tuple[int, ...], model_type: str
) -> None:
    """Writes a new model's folder that transformers opens: weights, config, tokenizer with chat template, generation
    config. It appears under its name only when it is complete; raises FileExistsError where the name is taken."""
    family = hf_load.FAMILIES[model_type]
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    dtype = params["embedding"].dtype.name
    with new_folder(Path(folder)) as partial:
        save_weights(partial, params, config, family)
        write_json(partial / "config.json", with_dtype(family.config_to_hf(config) | generation, dtype))
        write_json(partial / "generation_config.json", generation)
        tokenizer.save_pretrained(partial)


def write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def with_dtype(fields: dict, dtype: str) -> dict:
    """A config.json's fields with the weights' type where they name it: ``dtype``, or ``torch_dtype`` of old."""
    names = [name for name in ("dtype", "torch_dtype") if name in fields] or ["torch_dtype"]
    return fields | dict.fromkeys(names, dtype)


def save_weights(
    folder: Path,
    params: Params,
    config: ModelConfig,
    family,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a parameter tree, an adapter joined to it merged in, under the family's names, in ``dtype`` or as it is.

    One file, or several of at most ``max_shard_bytes`` (more where a single tensor is larger) and their index. Raises
    OSError where the disk is too small, before anything is written where that can be known.
    """
    tensors = {}
    for (*_, name), (theirs, flip, stacked) in hf_load.tensor_names(family, config).items():
        tree = params["layers"] if stacked else params
        for layer, tensor in enumerate(theirs):
            tensors[tensor] = _tensor(tree, name, layer if stacked else None, flip, dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(errno.ENOSPC, f"the weights need {total / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free", folder)
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write(folder / "model.safetensors", tensors)
        return
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}
    for file, shard in files.items():
        _write(folder / file, {name: tensors[name] for name in shard})
    weight_map = {name: file for file, shard in files.items() for name in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_adapter(
    folder: Path, adapter: Params, model: ModelConfig, config: LoraConfig, family, base: str, dtype: str | None = None
) -> None:
    """Writes an adapter as PEFT reads it, to be put onto the model folder or Hub id ``base``."""
    names, tensors = hf_load.tensor_names(family, model), {}
    for target in config.targets:
        for part in "ab":
            for layer, name in enumerate(names["layers", target][0]):
                theirs = f"base_model.model.{name.removesuffix('.weight')}.lora_{part.upper()}.weight"
                tensors[theirs] = _tensor(adapter["layers"], f"{target}_lora_{part}", layer, True, dtype)
    _write(folder / "adapter_model.safetensors", tensors)
    modules = [family.layer_names[target][0].removesuffix(".weight").rsplit(".", 1)[-1] for target in config.targets]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", fields)


def _shards(tensors: dict[str, _Tensor], most: int) -> list[list[str]]:
    """The tensors' names in groups of at most ``most`` bytes, in order."""
    shards, filled = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write(path: Path, tensors: dict[str, _Tensor]) -> None:
    """A safetensors file: the header's length in 8 bytes, the header in JSON, and the tensors without gaps."""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # without it transformers refuses the file
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = DTYPES[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    queue = list(tensors.values())
    buffers = np.empty((2, max(tensor.nbytes for tensor in queue)), np.uint8)

    def made(place: int) -> np.ndarray:
        tensor = queue[place]
        part = buffers[place % 2, : tensor.nbytes]
        tensor.fill(part.view(tensor.dtype).reshape(tensor.shape))
        return part

    def write(data) -> None:
        rest = memoryview(data)
        while rest:  # a disk that fills up takes a part, and then raises
            rest = rest[file.write(rest[:WRITE_BYTES]) :]

    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as maker:
        write(len(text).to_bytes(8, "little") + text)
        coming = maker.submit(made, 0)
        for place in range(len(queue)):
            part = coming.result()
            if place + 1 < len(queue):
                coming = maker.submit(made, place + 1)
            write(part)


def _tensor(tree: dict, name: str, layer: int | None, flip: bool, dtype: str | None) -> _Tensor:
    """The parameter ``name``, or one layer of it, with its adapter merged in, transposed if ``flip``, cast."""
    parts = {key: tree[key] for key in (name, f"{name}_lora_a", f"{name}_lora_b") if key in tree}
    dtype = jnp.dtype(dtype or tree[name].dtype)
    shape = tree[name].shape if layer is None else tree[name].shape[1:]
    as_it_is = len(parts) == 1 and tree[name].dtype == dtype

    def fill(out: np.ndarray) -> None:
        if as_it_is and _in_host_memory(tree[name]):
            value = np.asarray(tree[name])  # a view
            value = value if layer is None else value[layer]
        else:
            value = np.asarray(_prepared(parts, name, layer, dtype))
        safetensors_files.fill(out, value, flip)

    return _Tensor(shape[::-1] if flip else shape, dtype, fill)


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def _prepared(parts: dict, name: str, layer: jax.Array | None, dtype) -> jax.Array:
    """What is done on the device: one layer is taken from the stack, its adapter merged in, the sum cast."""
    if layer is not None:
        parts = {key: lax.dynamic_index_in_dim(leaf, layer, keepdims=False) for key, leaf in parts.items()}
    return lora.merged_weight(parts, name, dtype)


def _in_host_memory(array: jax.Array | np.ndarray) -> bool:
    return isinstance(array, np.ndarray) or [device.platform for device in array.devices()] == ["cpu"]
