"""The Seed-OSS family: Llama with biases on q, k and v, and head_dim of its own."""

from __future__ import annotations

from ctxjax.models.hf.family import LAYER_NAMES, Family
from ctxjax.models.hf.qwen2 import BIAS_NAMES

FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    layer_names=LAYER_NAMES | BIAS_NAMES,
    fixed={"hidden_act": "silu", "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    irrelevant=frozenset({"residual_dropout"}),  # in training by other software
    defaults={"max_position_embeddings": 524288},
    parts={"qkv_bias": True},
)
