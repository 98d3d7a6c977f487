"""The OLMo 2 family: norms after attention and MLP instead of before, and norms over all heads of q and of k."""

from __future__ import annotations

from ctxjax.models.hf.family import LAYER_NAMES, Family

_NAMES = {
    "attention_post_norm": ("post_attention_layernorm.weight", False),
    "mlp_post_norm": ("post_feedforward_layernorm.weight", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
}

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    layer_names=LAYER_NAMES | _NAMES,
    fixed={"hidden_act": "silu", "attention_bias": False},
    inferred=frozenset({"num_key_value_heads", "head_dim"}),
    defaults={"rms_norm_eps": 1e-5},
    parts={"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True},
)
