"""Low-rank adapters (LoRA, arXiv 2106.09685): each target matrix becomes W + alpha / rank * A @ B, and only A and B
are trained.

An adapter is a parameter tree of its own. Joined to the base's, it makes a tree that every pass of the transformer
runs, decoding too: there the products are not merged into W beforehand. Merging would save rank * (1/in + 1/out) of
the arithmetic and of the weights' traffic (0.8 % at rank 16 and width 4,096), need a second copy of the base, and in
bfloat16 round a young adapter away: rollouts would then come from another model than the one that is scored.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ctxjax.models import transformer
from ctxjax.models.params import ParamSpec
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """``rank`` is R, ``alpha`` / rank the factor of A @ B, ``targets`` the matrices that have an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def specs(model: ModelConfig, config: LoraConfig) -> dict:
    """The declaration of an adapter: ``{t}_lora_a`` [N, in, R] and ``{t}_lora_b`` [N, R, out] for each target t.

    A starts with the standard deviation that PEFT's uniform values have, 1 / sqrt(3 in), B at zero: the student of
    step 0 is the base.
    """
    base, layers = transformer.param_specs(model)["layers"], {}
    for target in config.targets:
        (count, inputs, outputs), (_, in_axis, out_axis), _ = base[target]
        a_axes, b_axes = ("layers", in_axis, None), ("layers", None, out_axis)
        layers[f"{target}_lora_a"] = ParamSpec((count, inputs, config.rank), a_axes, (3 * inputs) ** -0.5)
        layers[f"{target}_lora_b"] = ParamSpec((count, config.rank, outputs), b_axes, 0.0)
    return {"layers": layers}


def join(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """The adapted model as one tree: the base's own arrays beside A and the scaled B. Nothing of the base is copied."""
    scaled = {name: w * config.scale if name.endswith("_lora_b") else w for name, w in adapter["layers"].items()}
    return base | {"layers": base["layers"] | scaled}


def merged_weight(weights: dict, name: str, dtype=None) -> jax.Array:
    """The matrix ``name`` of a joined tree's layers, or of one layer, with its adapter, if any, added in float32; in
    ``dtype`` or in its own."""
    weight, dtype = weights[name], dtype or weights[name].dtype
    if f"{name}_lora_a" in weights:
        a, b = (weights[f"{name}_lora_{part}"].astype(jnp.float32) for part in "ab")
        weight = weight.astype(jnp.float32) + a @ b
    return weight.astype(dtype)


def merged(params: Params) -> Params:
    """A joined tree as plain weights, without adapters."""
    layers = params["layers"]
    return params | {"layers": {name: merged_weight(layers, name) for name in layers if "_lora_" not in name}}
