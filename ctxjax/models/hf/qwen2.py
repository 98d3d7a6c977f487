"""The Qwen2 and Qwen2.5 family: Llama with biases on q, k and v."""

from __future__ import annotations

from ctxjax.models.hf.family import LAYER_NAMES, Family

BIAS_NAMES = {
    "q_bias": ("self_attn.q_proj.bias", False),
    "k_bias": ("self_attn.k_proj.bias", False),
    "v_bias": ("self_attn.v_proj.bias", False),
}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer_names=LAYER_NAMES | BIAS_NAMES,
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    irrelevant=frozenset({"sliding_window", "max_window_layers"}),  # windows, which are off
    inferred=frozenset({"head_dim"}),
    defaults={"max_position_embeddings": 32768},
    parts={"qkv_bias": True},
)
