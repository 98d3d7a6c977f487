"""The Llama family (Llama 2, 3, 3.1, 3.2, SmolLM2): config.json in and out, and the names of its tensors."""

from __future__ import annotations

from ctxjax.models.transformer import ModelConfig, RopeScaling

ARCHITECTURE = "LlamaForCausalLM"

# Our name -> (name in the checkpoint, whether it is stored transposed). Hugging Face stores [out, in].
TOP_NAMES = {
    "embedding": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
LAYER_PREFIX = "model.layers.{layer}."
LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", False),
    "q": ("self_attn.q_proj.weight", True),
    "k": ("self_attn.k_proj.weight", True),
    "v": ("self_attn.v_proj.weight", True),
    "o": ("self_attn.o_proj.weight", True),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "gate": ("mlp.gate_proj.weight", True),
    "up": ("mlp.up_proj.weight", True),
    "down": ("mlp.down_proj.weight", True),
}

# Values that change the computation and that this code does not implement, beside those in config_from_hf.
REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# Facts of training, of other software, or of generation (read from generation_config.json).
IRRELEVANT = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp",
    "initializer_range", "attention_dropout", "max_position_embeddings", "is_llama_config", "rope_interleaved",
    "transformers.js_config", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "ctxjax",
}  # fmt: skip


def rope_from_hf(fields: dict) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either layout: ``rope_theta`` + ``rope_scaling``, or ``rope_parameters``."""
    rope = dict(fields.pop("rope_scaling", None) or {})
    rope |= fields.pop("rope_parameters", None) or {}
    theta = fields.pop("rope_theta", None) or rope.pop("rope_theta", None) or 10000.0
    rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f'config.json: rope_scaling has rope_type = {kind!r}; known are "default" and "llama3"')
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )
    return float(theta), scaling


def config_from_hf(fields: dict) -> ModelConfig:
    """The architecture that config.json describes.

    Every field is used, known to be irrelevant, or refused: raises ValueError naming the field and its value.
    KeyError names a field that is missing.
    """
    fields = {name: value for name, value in fields.items() if name not in IRRELEVANT}
    for name, value in REQUIRED.items():
        if fields.pop(name, value) != value:
            raise ValueError(f"config.json: {name} is not {value!r}, the only value that is implemented")
    theta, scaling = rope_from_hf(fields)
    width, heads = fields.pop("hidden_size"), fields.pop("num_attention_heads")
    config = ModelConfig(
        vocab_size=fields.pop("vocab_size"),
        width=width,
        layers=fields.pop("num_hidden_layers"),
        query_heads=heads,
        kv_heads=fields.pop("num_key_value_heads", None) or heads,
        head_dim=fields.pop("head_dim", None) or width // heads,
        mlp_width=fields.pop("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.pop("rms_norm_eps", 1e-6),
        tied_embeddings=fields.pop("tie_word_embeddings", False),
    )
    unknown = {name: value for name, value in fields.items() if value not in (None, False)}
    if unknown:
        raise ValueError(f"config.json: fields that this code does not know, and so may not ignore: {unknown}")
    return config


def config_to_hf(config: ModelConfig) -> dict:
    """config.json's fields for an architecture of this family."""
    fields = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    return fields
