"""Write Hugging Face folders: weights in safetensors shards, their index, and PEFT adapters.

One tensor at a time is gathered from the mesh to the host, and one shard at a time is held there and written.
"""

from __future__ import annotations

from collections.abc import Callable
import errno
import functools
import json
import math
from pathlib import Path
import re
import shutil
from typing import NamedTuple

from huggingface_hub import constants, split_state_dict_into_shards_factory
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ctxjax.host import progress, workdir
from ctxjax.models import lora
from ctxjax.models.hf import adapters, load as hf_load, safetensors_files
from ctxjax.models.lora import LoraConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

MAX_SHARD_BYTES = 1_000_000_000  # of a file, and of extra host memory while it is written


class _Tensor(NamedTuple):
    """A tensor to be written; ``make`` returns it as a contiguous host array of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(
    folder: Path, params: Params, config: ModelConfig, tokenizer, stop_ids: tuple[int, ...], model_type: str
) -> None:
    """Write a model folder that transformers opens: weights, config, tokenizer with chat template, generation config.

    The folder appears under its name only when it is complete. Raises FileExistsError if the name is taken.
    """
    family = hf_load.FAMILIES[model_type]
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    dtype = params["embedding"].dtype.name
    with workdir.new_folder(Path(folder)) as partial:
        save_weights(partial, params, config, family)
        write_json(partial / "config.json", set_dtype(family.config_to_hf(config) | generation, dtype))
        write_json(partial / "generation_config.json", generation)
        tokenizer.save_pretrained(partial)


def write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def set_dtype(fields: dict, dtype: str) -> dict:
    """Return a config.json's fields with ``dtype`` in the field that names it, ``dtype`` or ``torch_dtype`` of old."""
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
    """Write a parameter tree under the family's tensor names: a joined adapter merged in, cast to ``dtype`` if given.

    Writes one file, or several of at most ``max_shard_bytes`` (more if a single tensor is larger) and their index.
    Raises OSError if the disk is too small, before anything is written if the free space shows it.
    """
    tensors = {}
    for (*_, name), (theirs, flip, stacked) in hf_load.list_tensor_names(family, config).items():
        tree = params["layers"] if stacked else params
        for layer, tensor in enumerate(theirs):
            tensors[tensor] = _tensor(tree, name, layer if stacked else None, flip, dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(errno.ENOSPC, f"the weights need {total / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free", folder)
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=constants.SAFETENSORS_WEIGHTS_FILE_PATTERN,
        max_shard_size=max_shard_bytes,
    )
    with progress.Bar("writing the weights", total, "B") as bar:
        for file, names in shards.filename_to_tensors.items():
            _write(folder / file, {name: tensors[name] for name in names})
            bar.update(sum(tensors[name].nbytes for name in names))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / safetensors_files.INDEX, index)


def save_adapter(
    folder: Path,
    adapter: Params,
    model: ModelConfig,
    config: LoraConfig,
    family,
    base: str,
    dtype: str | None = None,
    revision: str | None = None,
) -> None:
    """Write an adapter in PEFT's format, for the model folder ``base``, or for the Hub id and its ``revision``."""
    tensors = {
        theirs: _tensor(adapter["layers"], ours, layer, True, dtype)
        for theirs, (ours, layer) in adapters.list_tensor_names(family, model, config.targets).items()
    }
    _write(folder / adapters.WEIGHTS, tensors)
    modules = [family.layer_names[target][0].removesuffix(".weight").rsplit(".", 1)[-1] for target in config.targets]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / safetensors_files.ADAPTER, fields)


def _write(path: Path, tensors: dict[str, _Tensor]) -> None:
    """Write one safetensors file, readable by whom the umask allows. Raises OSError if the disk refuses."""
    arrays = {name: tensor.make() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # save_file writes another file, with mode 600, and renames it
    try:
        save_file(arrays, path, metadata={"format": "pt"})  # transformers refuses a file without it
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), path) from None
    path.chmod(mode)


def _tensor(tree: dict, name: str, layer: int | None, flip: bool, dtype: str | None) -> _Tensor:
    """Describe the parameter ``name``, or one layer of it, with its adapter merged in, transposed if ``flip``, cast."""
    parts = {key: tree[key] for key in (name, f"{name}_lora_a", f"{name}_lora_b") if key in tree}
    dtype = jnp.dtype(dtype or tree[name].dtype)
    shape = tree[name].shape if layer is None else tree[name].shape[1:]

    def make() -> np.ndarray:
        if len(parts) == 1 and isinstance(tree[name], np.ndarray):  # on the host already: no devices to wait for
            value = (tree[name] if layer is None else tree[name][layer]).astype(dtype, copy=False)
        else:
            value = np.asarray(_prepare(parts, name, layer, dtype))
        return safetensors_files.transpose(value) if flip else np.ascontiguousarray(value)

    return _Tensor(shape[::-1] if flip else shape, dtype, make)


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def _prepare(parts: dict, name: str, layer: jax.Array | None, dtype) -> jax.Array:
    """Take one layer from the stack, merge its adapter in and cast it, on the device."""
    if layer is not None:
        parts = {key: lax.dynamic_index_in_dim(leaf, layer, keepdims=False) for key, leaf in parts.items()}
    return lora.merged_weight(parts, name, dtype)
