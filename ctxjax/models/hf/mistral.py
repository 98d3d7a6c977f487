"""The Mistral family: 7B v0.1 with a window in every layer, later models without."""

from __future__ import annotations

from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.hf.family import LAYER_NAMES, Family, join_kinds, read_size


def _read(fields: dict) -> dict:
    window = fields.pop("sliding_window")  # transformers' default is a window of 4,096, so the field may not be absent
    window = 0 if window is None else read_size(window, "sliding_window")
    layers = read_size(fields["num_hidden_layers"], "num_hidden_layers")
    return {"layer_kinds": join_kinds([LayerKind(window=window)] * layers)}


def _write(config: ModelConfig) -> dict:
    return {"sliding_window": config.kinds[0].window or None}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer_names=LAYER_NAMES,
    fixed={"hidden_act": "silu"},
    inferred=frozenset({"head_dim"}),
    defaults={"max_position_embeddings": 131072},
    read=_read,
    write=_write,
)
