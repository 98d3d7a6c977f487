"""The Qwen3 family, dense: norms on the heads of q and k, head_dim of its own, no biases."""

from __future__ import annotations

from ctxjax.models.hf.family import LAYER_NAMES, Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer_names=LAYER_NAMES
    | {"q_norm": ("self_attn.q_norm.weight", False), "k_norm": ("self_attn.k_norm.weight", False)},
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    irrelevant=frozenset({"sliding_window", "max_window_layers"}),  # windows, which are off
    defaults={"max_position_embeddings": 32768},
    parts={"qk_norm": True},
)
