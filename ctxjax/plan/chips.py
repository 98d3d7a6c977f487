"""Accelerators by their published figures, and compile-only devices of TPU slices that nobody has to own."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import jax
import numpy as np


class Chip(NamedTuple):
    """Of one chip: ``tflops`` of bfloat16 products, ``hbm_gib`` of memory, ``hbm_gbps`` GB/s to it, and ``ici_gbps``
    GB/s that all its links to other chips send together, one way."""

    tflops: float
    hbm_gib: float
    hbm_gbps: float
    ici_gbps: float


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read 2026-11-24.
CHIPS = {
    "v4": Chip(275, 32, 1228, 300),
    "v5e": Chip(197, 16, 819, 200),
    "v5p": Chip(459, 95, 2765, 600),
    "v6e": Chip(918, 32, 1638, 400),
}
SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": SHAPES_3D, "v5e": SHAPES_2D, "v5p": SHAPES_3D, "v6e": SHAPES_2D}
# The share of a chip's memory that a plan may use: the rest is the runtime's, the evaluation's and the unforeseen.
USABLE = 0.92


def generation(topology: str) -> str:
    """The generation in "v5e:4x4". Raises ValueError that names the nearest topologies that are offered."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in CHIPS:
        raise ValueError(
            f"--topology={topology!r} is not known; it is a generation ({', '.join(CHIPS)}) and a shape of chips, such "
            "as v5e:4x4 or v5p:2x2x4"
        )
    name, shape = match.groups()
    if shape not in SHAPES[name]:
        raise ValueError(f"--topology={topology!r}: {name} has no slice of that shape; the nearest are "
                         + " and ".join(f"{name}:{near}" for near in _nearest(shape, SHAPES[name])))  # fmt: skip
    return name


def chips(shape: str) -> int:
    """How many chips "4x8" or "v5e:4x8" has."""
    return int(np.prod([int(size) for size in shape.split(":")[-1].split("x")]))


def _nearest(shape: str, shapes: tuple[str, ...]) -> list[str]:
    """The largest that is no larger, and the smallest that is no smaller."""
    below = [other for other in shapes if chips(other) <= chips(shape)][-1:]
    above = [other for other in shapes if chips(other) >= chips(shape)][:1]
    return list(dict.fromkeys(below + above))


def next_larger(topology: str) -> str | None:
    """The next slice of the same generation with more chips, or None."""
    name, shape = topology.split(":")
    return next((f"{name}:{other}" for other in SHAPES[name] if chips(other) > chips(shape)), None)


def tpu_devices(topology: str) -> list:
    """Compile-only devices of a slice; no TPU is needed.

    Raises ValueError where the topology is not known, or where libtpu, whose compiler does the work, is missing.
    """
    name = generation(topology)
    # Neither a TPU's lock nor a TPU machine's metadata server is any business of a compiler.
    for variable, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
                            "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies  # loads what only planning needs

    options = {"chip_config_name": "megacore"} if name == "v4" else {}  # one device a chip, as on later generations
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (ImportError, RuntimeError, NotImplementedError, FileNotFoundError) as error:
        if not has_libtpu():
            raise ValueError(
                f"--topology={topology} is compiled for by libtpu, which is not installed; "
                f'pip install "jax[tpu]=={jax.__version__}", or plan for local devices with --devices=N'
            ) from None
        raise ValueError(f"libtpu makes no {topology}: {error}") from None


def has_libtpu() -> bool:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


def local_devices(count: int) -> list:
    """The first ``count`` devices of the local backend. Raises ValueError where there are fewer."""
    devices = jax.devices()
    if count > len(devices):
        raise ValueError(f"--devices={count}: there are {len(devices)} {devices[0].platform} devices here")
    return devices[:count]
