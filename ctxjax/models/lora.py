"""Low-rank adapters (LoRA, arXiv 2106.09685): each target matrix becomes W + alpha / rank * A @ B, and only A and B
are trained. With ``rslora`` the factor is alpha / sqrt(rank) (arXiv 2312.03732).

An adapter is a parameter tree of its own. ``join`` makes one tree of the base and the adapter, which every pass of the
transformer runs. Decoding runs it too, without merging the products into W first. Merging would save only
rank * (1/in + 1/out) of the arithmetic and of the weights' traffic (0.8 % at rank 16 and width 4,096). It would need a
second copy of the base, and in bfloat16 it would round a young adapter away: rollouts would then come from a different
model than the one that is scored.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from ctxjax.models.architecture import ModelConfig, param_specs
from ctxjax.models.linear import find_precision
from ctxjax.models.params import ParamSpec
from ctxjax.types import Params, bounded

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """``rank`` is R, ``alpha`` / rank (``rslora``: / sqrt(rank)) multiplies A @ B, ``targets`` are the matrices that
    have an adapter."""

    rank: int = bounded(zero=True, at_most=65536)
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def specs(model: ModelConfig, config: LoraConfig) -> dict:
    """Declare an adapter: ``{t}_lora_a`` [N, in, R] and ``{t}_lora_b`` [N, R, out] for each target t.

    A starts with the standard deviation of PEFT's uniform values, 1 / sqrt(3 in), and B at zero, so that the student
    of step 0 is the base.
    """
    base, layers = param_specs(model)["layers"], {}
    for target in config.targets:
        (count, inputs, outputs), (_, in_axis, out_axis), _ = base[target]
        a_axes, b_axes = ("layers", in_axis, None), ("layers", None, out_axis)
        layers[f"{target}_lora_a"] = ParamSpec((count, inputs, config.rank), a_axes, (3 * inputs) ** -0.5)
        layers[f"{target}_lora_b"] = ParamSpec((count, config.rank, outputs), b_axes, 0.0)
    return {"layers": layers}


def join(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """Return the adapted model as one tree: the base's own arrays, A, and B times ``config.scale``. Nothing is copied.

    ``base`` may be a joined tree; this adapter is then in place of its own.
    """
    scaled = {name: w * config.scale if name.endswith("_lora_b") else w for name, w in adapter["layers"].items()}
    return base | {"layers": base["layers"] | scaled}


def merged_weight(weights: dict, name: str, dtype=None) -> jax.Array:
    """Return the matrix ``name`` of a joined tree's layers, or of one layer, with its adapter, if any, added in float32
    and then cast to ``dtype``, None: the matrix's own."""
    weight, dtype = weights[name], dtype or weights[name].dtype
    if f"{name}_lora_a" in weights:
        a, b = (weights[f"{name}_lora_{part}"].astype(jnp.float32) for part in "ab")
        weight = weight.astype(jnp.float32) + jnp.matmul(a, b, precision=find_precision(a))
    return weight.astype(dtype)


def merged(params: Params) -> Params:
    """Return a joined tree as plain weights, without adapters."""
    layers = params["layers"]
    return params | {"layers": {name: merged_weight(layers, name) for name in layers if "_lora_" not in name}}
