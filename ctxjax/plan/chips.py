"""Published figures of accelerators, and compile-only devices of TPU slices."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import jax
import numpy as np


class Chip(NamedTuple):
    """Figures of one chip. ``tflops``: TFLOP/s of bfloat16 products. ``hbm_gib``: GiB of memory. ``hbm_gbps``: GB/s of
    its memory. ``ici_gbps``: GB/s that all its links to other chips send together, in one direction."""

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
# Largest share of a chip's memory that a plan may use. The rest is for the runtime, for evaluation and as a reserve.
USABLE = 0.92


def parse_generation(topology: str) -> str:
    """Return the generation of a topology such as "v5e:4x4". Raises ValueError that names the nearest valid ones."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in CHIPS:
        raise ValueError(
            f"--topology={topology!r} is not known; give a generation ({', '.join(CHIPS)}) and a shape of chips, such "
            "as v5e:4x4 or v5p:2x2x4"
        )
    name, shape = match.groups()
    if shape not in SHAPES[name]:
        raise ValueError(f"--topology={topology!r}: {name} has no slice of that shape; the nearest are "
                         + " and ".join(f"{name}:{near}" for near in _find_nearest(shape, SHAPES[name])))  # fmt: skip
    return name


def count_chips(shape: str) -> int:
    """Return the number of chips of "4x8" or "v5e:4x8"."""
    return int(np.prod([int(size) for size in shape.split(":")[-1].split("x")]))


def _find_nearest(shape: str, shapes: tuple[str, ...]) -> list[str]:
    """Return the largest shape that is not larger and the smallest that is not smaller, by number of chips."""
    below = [other for other in shapes if count_chips(other) <= count_chips(shape)][-1:]
    above = [other for other in shapes if count_chips(other) >= count_chips(shape)][:1]
    return list(dict.fromkeys(below + above))


def find_next_larger(topology: str) -> str | None:
    """Return the next slice of the same generation with more chips, or None."""
    name, shape = topology.split(":")
    return next((f"{name}:{other}" for other in SHAPES[name] if count_chips(other) > count_chips(shape)), None)


def make_tpu_devices(topology: str) -> list:
    """Return compile-only devices of a slice; no TPU is needed.

    Raises ValueError if the topology is not known or libtpu, which has the compiler, is not installed.
    """
    name = parse_generation(topology)
    # Compiling needs neither the lock of a TPU nor the metadata server of a TPU machine.
    for variable, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
                            "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies  # slow to import, needed only here

    options = {"chip_config_name": "megacore"} if name == "v4" else {}  # one device per chip, as on later generations
    if count_chips(topology) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default is a host of four chips
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (ImportError, RuntimeError, NotImplementedError, FileNotFoundError) as error:
        if not has_libtpu():
            raise ValueError(
                f"--topology={topology} needs the compiler of libtpu, which is not installed; "
                f'pip install "jax[tpu]=={jax.__version__}", or plan for local devices with --devices=N'
            ) from None
        raise ValueError(f"libtpu does not support --topology={topology}: {error}") from None


def has_libtpu() -> bool:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


def get_local_devices(count: int) -> list:
    """Return the first ``count`` devices of the local backend. Raises ValueError if there are fewer."""
    devices = jax.devices()
    if count > len(devices):
        raise ValueError(f"--devices={count}, but there are only {len(devices)} {devices[0].platform} devices here")
    return devices[:count]
