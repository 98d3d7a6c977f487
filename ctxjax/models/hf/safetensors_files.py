"""The safetensors files of a model folder: which tensor lies where, views of its bytes, and how they are moved.

safetensors' own ``get_slice`` copies what it reads and keeps every page that it has touched in the process. Here the
files are mapped: a view costs nothing until its bytes are read, and ``release`` hands the pages back.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STRIP_ROWS, CACHE_LINE = 64, 64  # rows, bytes
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype(jnp.bfloat16)}


class Stored(NamedTuple):
    """Where a tensor lies: its file, its first byte there, its shape, and its dtype as safetensors names it."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError or ValueError that names the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a model folder has config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def _header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file. safetensors checks the header, and that the file is as long as it says."""
    try:
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return {
        name: Stored(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _indexed_files(index: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index says. A file is named without a folder, or the index could point anywhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} says that {name} is in {file!r}; it must name a *.safetensors file beside it")
    files = {name: index.parent / file for name, file in weight_map.items()}
    missing = sorted({str(path) for path in files.values() if not path.exists()})
    if missing:
        raise FileNotFoundError(f"{index} names files that do not exist: {', '.join(missing)}; download them again")
    return files


def find(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """(tensors by name, complaints about tensors that the index names and its file lacks).

    Raises FileNotFoundError or ValueError that names the file.
    """
    if (folder / INDEX).exists():
        files = _indexed_files(folder / INDEX)
        headers = {file: _header(file) for file in sorted(set(files.values()))}
        stored = {name: headers[file][name] for name, file in files.items() if name in headers[file]}
        return stored, [f"missing: {name} (the index says {files[name].name})" for name in files.keys() - stored]
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE), []
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = f"; it has {', '.join(found)}, but pickled weights are not read: convert them to safetensors"
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor its index{hint if found else ''}")


class Views:
    """Read-only arrays over the files' bytes. Not thread-safe; the files must not change while they are used."""

    def __init__(self, tensors: dict[str, Stored]):
        self._tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, name: str) -> np.ndarray:
        """The tensor as it is stored; its bytes are read when they are used."""
        stored = self._tensors[name]
        if stored.file not in self._maps:
            with open(stored.file, "rb") as file:
                self._maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(stored.shape)
        flat = np.frombuffer(self._maps[stored.file], DTYPES[stored.dtype], count, stored.start)
        return flat.reshape(stored.shape)

    def release(self, name: str) -> None:
        """Takes the tensor's pages out of this process; a later read brings them back."""
        stored = self._tensors[name]
        if hasattr(mmap, "MADV_DONTNEED"):
            first = stored.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[stored.file].madvise(mmap.MADV_DONTNEED, first, stored.start + stored.nbytes - first)


def fill(target: np.ndarray, source: np.ndarray, flip: bool) -> None:
    """target = source, or its transpose, cast.

    A transpose goes in strips of a few rows, whose lines of ``target`` stay in the cache, and by way of a copy whose
    rows are one line longer than a power of two: 3 to 4.5 GB/s on one core, where numpy by itself makes 0.3.
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
