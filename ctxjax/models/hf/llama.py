"""The Llama family: Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama."""

from __future__ import annotations

from ctxjax.models.hf.family import LAYER_NAMES, Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer_names=LAYER_NAMES,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    inferred=frozenset({"num_key_value_heads", "head_dim"}),
)
