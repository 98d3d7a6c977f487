"""Hugging Face folders, written: weights in safetensors shards, their index, and PEFT adapters.

Weights leave the device one tensor at a time and a shard is written before the next one is made, so that the host
holds one shard beside what the device holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import functools
import json
import os
from pathlib import Path
import shutil
import uuid

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ctxjax.models import hf, lora
from ctxjax.models.lora import LoraConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

MAX_SHARD_BYTES = 2_000_000_000
METADATA = {"format": "pt"}  # transformers refuses files without it


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
    family = hf.FAMILIES[model_type]
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
    sizes, readers = {}, {}
    for (*_, name), (tensors, flip, stacked) in hf.tensor_names(family, config).items():
        tree = params["layers"] if stacked else params
        kind = jnp.dtype(dtype or tree[name].dtype)
        size = tree[name].size * kind.itemsize // len(tensors)
        for layer, tensor in enumerate(tensors):
            sizes[tensor] = size
            readers[tensor] = functools.partial(_fetched, tree, name, layer if stacked else None, flip, kind)
    total = sum(sizes.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(errno.ENOSPC, f"the weights need {total / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free", folder)
    shards = _shards(sizes, max_shard_bytes)
    if len(shards) == 1:
        _write(folder / "model.safetensors", readers)
        return
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, {tensor: readers[tensor] for tensor in tensors})
        weight_map |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_adapter(
    folder: Path, adapter: Params, model: ModelConfig, config: LoraConfig, family, base: str, dtype: str | None = None
) -> None:
    """Writes an adapter as PEFT reads it, to be put onto the model folder or Hub id ``base``."""
    names, readers = hf.tensor_names(family, model), {}
    for target in config.targets:
        for part in "ab":
            name = f"{target}_lora_{part}"
            kind = jnp.dtype(dtype or adapter["layers"][name].dtype)
            for layer, tensor in enumerate(names["layers", target][0]):
                theirs = f"base_model.model.{tensor.removesuffix('.weight')}.lora_{part.upper()}.weight"
                readers[theirs] = functools.partial(_fetched, adapter["layers"], name, layer, True, kind)
    _write(folder / "adapter_model.safetensors", readers)
    modules = [family.LAYER_NAMES[target][0].removesuffix(".weight").rsplit(".", 1)[-1] for target in config.targets]
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


def _shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """The tensors' names in groups of at most ``most`` bytes, in order."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write(path: Path, readers: dict[str, Callable[[], np.ndarray]]) -> None:
    """One file of the tensors that ``readers`` make. Raises OSError where it cannot be written."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        tensors = dict(zip(readers, pool.map(lambda read: read(), readers.values())))
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, METADATA)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(mode)  # safetensors makes files that only their owner may read


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def _tensor(tree: dict, name: str, layer: jax.Array | None, dtype) -> jax.Array:
    """A tensor as it is saved, on the device: one layer of a stack, its adapter merged in, cast."""
    if layer is not None:
        tree = {key: lax.dynamic_index_in_dim(leaf, layer, keepdims=False) for key, leaf in tree.items()}
    return lora.merged_weight(tree, name, dtype)


def _fetched(tree: dict, name: str, layer: int | None, flip: bool, dtype) -> np.ndarray:
    parts = {key: tree[key] for key in (name, f"{name}_lora_a", f"{name}_lora_b") if key in tree}
    value = np.asarray(_tensor(parts, name, layer, dtype))
    return transposed(value) if flip else np.ascontiguousarray(value)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A matrix's transpose, contiguous, ten times as fast as numpy makes it for large ones.

    Rows go through a strip whose rows are a little longer than the matrix's: widths are powers of two, and then
    numpy's way down a column meets one and the same set of the cache over and over.
    """
    rows, columns = matrix.shape
    height, padding = 128, 64 // matrix.itemsize
    words = matrix.view(f"u{matrix.itemsize}")  # numpy is slow with types that it does not know, as bfloat16
    out = np.empty((columns, rows), words.dtype)
    strip = np.empty((height, columns + padding), words.dtype)
    for start in range(0, rows, height):
        part = words[start : start + height]
        strip[: len(part), :columns] = part
        out[:, start : start + len(part)] = strip[: len(part), :columns].T
    return out.view(matrix.dtype)
