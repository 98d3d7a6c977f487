"""The SmolLM3 family: Llama, but every fourth layer has no rotary positions."""

from __future__ import annotations

from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.hf.family import LAYER_NAMES, Family, join_kinds, read_plain_layers, read_size


def _read(fields: dict) -> dict:
    read_plain_layers(fields)
    layers = read_size(fields["num_hidden_layers"], "num_hidden_layers")
    every = read_size(fields.pop("no_rope_layer_interval", 4), "no_rope_layer_interval")
    rotary = fields.pop("no_rope_layers", None)  # 1: with rotary positions, in spite of the name
    rotary = [int((layer + 1) % every != 0) for layer in range(layers)] if rotary is None else rotary
    if not isinstance(rotary, list) or len(rotary) != layers or any(flag not in (0, 1) for flag in rotary):
        raise ValueError(f"no_rope_layers = {rotary!r} must have a 0 or 1 for each of {layers} layers")
    return {"layer_kinds": join_kinds([LayerKind(rotary=bool(flag)) for flag in rotary])}


def _write(config: ModelConfig) -> dict:
    return {"no_rope_layers": [int(kind.rotary) for kind in config.kinds]}


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    layer_names=LAYER_NAMES,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    irrelevant=frozenset({"sliding_window", "max_window_layers"}),  # windows, which are off
    inferred=frozenset({"head_dim"}),
    defaults={"rope_theta": 2000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    read=_read,
    write=_write,
)
