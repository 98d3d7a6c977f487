"""Check that a mesh divides a model's dimensions."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from ctxjax.models.architecture import ModelConfig

# Mesh axis -> the dimensions sharded over it, by their names in ModelConfig. A head is never split.
DIMENSIONS = {"fsdp": ("width",), "tensor": ("query_heads", "kv_heads", "mlp_width", "vocab_size")}


def check_model_fits_mesh(config: ModelConfig, mesh: Mesh, model: str) -> None:
    """Raise ValueError if a dimension is not divisible by its mesh axis, naming the nearest sizes of the axis that
    divide them all. ``model`` is the model's name in the message."""
    for axis, names in DIMENSIONS.items():
        ways, sizes = mesh.shape[axis], {name: getattr(config, name) for name in names}
        bad = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % ways)
        if bad:
            common = math.gcd(*sizes.values())
            fitting = [n for n in range(1, common + 1) if common % n == 0]
            near = [n for n in fitting if n < ways][-1:] + [n for n in fitting if n > ways][:1]
            raise ValueError(
                f"{model}: {bad} not divisible by mesh.{axis} = {ways}; use mesh.{axis} = {' or '.join(map(str, near))}"
            )
