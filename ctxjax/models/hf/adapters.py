"""Read adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import re

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax.models import lora, params as params_lib
from ctxjax.models.hf import load as hf_load, safetensors_files
from ctxjax.models.hf.family import Family
from ctxjax.models.lora import TARGETS, LoraConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

WEIGHTS = "adapter_model.safetensors"
# Fields of adapter_config.json that change what an adapter computes -> the values that change nothing.
PLAIN = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": (None, []),
    "layers_to_transform": (None,), "layer_replication": (None,), "trainable_token_indices": (None,),
    "target_parameters": (None, []), "use_qalora": (False,), "alora_invocation_tokens": (None,),
}  # fmt: skip
CHANGED_BASE = ("pissa", "olora", "corda")  # values of init_lora_weights whose adapters belong to other base weights


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """``init``: the folder of the adapter that the student starts from; "": a new one."""

    init: str = ""


def list_tensor_names(family: Family, model: ModelConfig, targets: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """Return PEFT's tensor name -> (our name of the stacked array, the layer)."""
    names, found = hf_load.list_tensor_names(family, model), {}
    for target in targets:
        for part in "ab":
            for layer, name in enumerate(names["layers", target][0]):
                theirs = f"base_model.model.{name.removesuffix('.weight')}.lora_{part.upper()}.weight"
                found[theirs] = f"{target}_lora_{part}", layer
    return found


def load(folder: Path, base: str, source: Path, config: LoraConfig, mesh: Mesh) -> Params:
    """Load an adapter in float32, sharded over ``mesh``, for ``base``, a folder or Hub id whose folder is ``source``.

    Raises FileNotFoundError or ValueError if it is not an adapter of ``config`` for this base.
    """
    model = hf_load.read_config(source)
    family = hf_load.find_family(hf_load.read_fields(source), source)
    fields = _read_fields(folder, base)
    stored = safetensors_files.read_header(folder / WEIGHTS)
    every = list_tensor_names(family, model, TARGETS)
    strange = sorted(stored.keys() - every.keys())
    if strange:
        raise ValueError(
            f"the adapter in {folder} has {strange[0]} and {len(strange) - 1} more tensors that no adapter of {base} "
            f"has; it belongs to another base, or trains other parts than {', '.join(TARGETS)}"
        )
    targets = tuple(t for t in TARGETS if any(every[name][0].startswith(f"{t}_lora_") for name in stored))
    _check_settings(folder, fields, config, targets)
    specs, names = lora.specs(model, config)["layers"], list_tensor_names(family, model, targets)
    for theirs, (ours, _) in names.items():
        expected, found = specs[ours].shape[:0:-1], stored[theirs].shape if theirs in stored else None
        if found != expected:
            has = "is missing" if found is None else f"is {list(found)}, not {list(expected)}"
            raise ValueError(f"the adapter in {folder} does not fit {base}: {theirs} {has}; it belongs to another base")
    arrays = {ours: np.zeros(specs[ours].shape, np.float32) for ours, _ in names.values()}
    for theirs, (ours, layer) in names.items():
        value = stored[theirs].read((slice(None), slice(None)))
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"the adapter in {folder} has values in {theirs} that are not finite numbers")
        safetensors_files.copy(arrays[ours][layer], value, flip=True)
    places = params_lib.shardings(lora.specs(model, config), mesh)["layers"]
    return {"layers": {name: _place(array, places[name]) for name, array in arrays.items()}}


def _place(array: np.ndarray, sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _read_fields(folder: Path, base: str) -> dict:
    """Return adapter_config.json. Raises ValueError if it is no plain adapter, or names another base."""
    for name in (safetensors_files.ADAPTER, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"lora.init = {folder} has no {name}; give a folder that PEFT's save_pretrained or ctxjax export "
                "--adapter wrote"
            )
    fields = safetensors_files.read_json(folder / safetensors_files.ADAPTER)
    for name, plain in PLAIN.items():
        if name in fields and fields[name] not in plain:
            raise ValueError(f"{folder}: adapters with {name} = {fields[name]!r} cannot be read; merge it (PEFT)")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASE):
        raise ValueError(f"{folder}: init_lora_weights = {start!r} changed the base's weights; merge it (PEFT)")
    named = fields.get("base_model_name_or_path")
    if named and _short_name(named) != _short_name(base):
        raise ValueError(
            f"the adapter in {folder} was trained on {named!r}, and model.path is {base!r}; give its base, or, if that "
            f"is the same model under another name, correct base_model_name_or_path in {safetensors_files.ADAPTER}"
        )
    return fields


def _short_name(base: str) -> str:
    """Return the last part of a folder or Hub id, without the revision; of a folder in the Hub's cache the id's."""
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots", base)
    return (cached[1] if cached else base.rstrip("/").rsplit("/", 1)[-1].split("@")[0]).lower()


def _check_settings(folder: Path, fields: dict, config: LoraConfig, targets: tuple[str, ...]) -> None:
    found = fields.get("r"), fields.get("lora_alpha"), set(targets), bool(fields.get("use_rslora"))
    if found != (config.rank, config.alpha, set(config.targets), config.rslora):
        raise ValueError(
            f"the adapter in {folder} has other settings than this run (rank {config.rank}, alpha {config.alpha:g}, "
            f"{', '.join(config.targets)}, rslora {config.rslora}); set lora.rank={found[0]} lora.alpha={found[1]} "
            f'lora.targets="{targets}" lora.rslora={found[3]}'
        )
