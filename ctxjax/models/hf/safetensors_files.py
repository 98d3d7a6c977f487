"""The safetensors files of a model folder: find the tensors, read parts of them, transpose them quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

ADAPTER = "adapter_config.json"  # of PEFT
INDEX, SINGLE = constants.SAFETENSORS_INDEX_FILE, constants.SAFETENSORS_SINGLE_FILE
STRIP_ROWS, CACHE_LINE = 64, 64  # rows, bytes
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype(jnp.bfloat16)}


class Stored(NamedTuple):
    """A tensor in a file: its name there, its shape, and its dtype as safetensors names it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return a copy of the part ``index``. The file is opened anew, since it keeps the pages read until closed."""
        with safe_open(self.file, framework="np") as file:
            return file.get_slice(self.name)[index]


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises FileNotFoundError or ValueError that names the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a model folder has config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def read_header(path: Path) -> dict[str, Stored]:
    """Return every tensor of one file by name. safetensors checks the header and the file's length."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _indexed_files(index: Path) -> dict[str, Path]:
    """Return tensor name -> file as the index says. File names have no folder, or the index could point anywhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index} says that {name} is in {file!r}; it must name a *.safetensors file in its folder"
            )
    files = {name: index.parent / file for name, file in weight_map.items()}
    missing = sorted({str(path) for path in files.values() if not path.exists()})
    if missing:
        raise FileNotFoundError(f"{index} names files that do not exist: {', '.join(missing)}; download them again")
    return files


def find(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Return (tensors by name, complaints about tensors that the index names and its file lacks).

    Raises FileNotFoundError or ValueError that names the file.
    """
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder} has {ADAPTER}: it is an adapter, or a model that transformers would open with an adapter on "
            "top. To go on with it, give its base as model.path and this folder as lora.init; or merge it into the "
            "weights (PEFT's merge_and_unload), or move it away"
        )
    if (folder / INDEX).exists():
        files = _indexed_files(folder / INDEX)
        others = sorted({path.name for path in files.values()} - {SINGLE})
        if (folder / SINGLE).exists() and others:
            raise ValueError(
                f"{folder} has {SINGLE} and also {INDEX}, which names {', '.join(others)}: one of the two is left over "
                "from an earlier save; delete the older one"
            )
        headers = {file: read_header(file) for file in sorted(set(files.values()))}
        stored = {name: headers[file][name] for name, file in files.items() if name in headers[file]}
        return stored, [f"missing: {name} (the index says {files[name].name})" for name in files.keys() - stored]
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE), []
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = f"; it has {', '.join(found)}, but pickled weights are not read: convert them to safetensors"
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor its index{hint if found else ''}")


def copy(target: np.ndarray, source: np.ndarray, flip: bool) -> None:
    """Copy ``source``, or its transpose if ``flip``, into ``target`` with a cast.

    A transpose goes in strips of a few rows, whose lines of ``target`` stay in the cache, through a buffer whose
    rows are one cache line longer than a power of two, since lines at such distances evict each other.
    """
    if source.dtype == target.dtype:  # as plain integers, since numpy is slow with bfloat16
        source, target = (array.view(f"u{array.itemsize}") for array in (source, target))
    if not flip:
        target[...] = source
        return
    width = source.shape[1]
    strip = np.empty((STRIP_ROWS, width + CACHE_LINE // target.itemsize), target.dtype)[:, :width]
    for first in range(0, len(source), STRIP_ROWS):
        rows = source[first : first + STRIP_ROWS]
        strip[: len(rows)] = rows
        target[:, first : first + STRIP_ROWS] = strip[: len(rows)].T


def transpose(source: np.ndarray) -> np.ndarray:
    """Return the transpose of a matrix as a contiguous array."""
    target = np.empty(source.shape[::-1], source.dtype)
    copy(target, source, flip=True)
    return target
