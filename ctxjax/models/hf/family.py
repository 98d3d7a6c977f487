"""What the supported Hugging Face families share: config.json's fields in and out, and the tensors' names.

A family is data: which parts its attention has, what its tensors are called, and which values of its other fields
are the ones that transformer.py computes. Every field of a config.json is read, known to be irrelevant, or refused.
"""

from __future__ import annotations

import dataclasses

from ctxjax.models.transformer import ModelConfig, RopeScaling

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
# Tensors of old checkpoints that repeat what config.json says.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"

# Facts of training, of other software, or of generation (read from generation_config.json).
IRRELEVANT = {
    "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp",
    "initializer_range", "attention_dropout", "is_llama_config", "rope_interleaved", "transformers.js_config",
    "tokenizer_class", "unsloth_fixed", "unsloth_version", "_name_or_path", "_attn_implementation_autoset",
    "bos_token_id", "eos_token_id", "pad_token_id", "ctxjax",
}  # fmt: skip
# Our name -> config.json's.
SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
}
ROPE_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One ``model_type``.

    ``fixed`` are fields that change the computation, each with the only value that is implemented. ``irrelevant`` are
    fields without effect in this family, once ``fixed`` holds. ``inferred`` are sizes that may be absent, where
    transformers derives them from the others; elsewhere its defaults are those of one particular model.
    """

    model_type: str
    architecture: str
    layer_names: dict[str, tuple[str, bool]]
    fixed: dict[str, object]
    irrelevant: frozenset[str] = frozenset()
    inferred: frozenset[str] = frozenset()
    qkv_bias: bool = False
    qk_norm: bool = False

    def config_from_hf(self, fields: dict) -> ModelConfig:
        """The architecture that config.json describes.

        Raises ValueError that names a field and its value, KeyError that names a field that is missing.
        """
        fields = dict(fields)
        self._check_fixed(fields)
        theta, scaling = _rope_from_hf(fields)
        width, heads = _size(fields.pop("hidden_size"), "hidden_size"), fields.pop("num_attention_heads")
        derived = {"num_key_value_heads": heads, "head_dim": width // _size(heads, "num_attention_heads")}
        for name in self.inferred:
            fields[name] = derived[name] if fields.get(name) is None else fields[name]
        config = ModelConfig(
            width=width,
            query_heads=heads,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_number(fields.pop("rms_norm_eps", 1e-6), "rms_norm_eps"),
            max_positions=_size(fields.pop("max_position_embeddings", 2048), "max_position_embeddings"),
            tied_embeddings=_boolean(fields.pop("tie_word_embeddings", False), "tie_word_embeddings"),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            **{ours: _size(fields.pop(theirs), theirs) for ours, theirs in SIZES.items()},
        )
        if config.query_heads % config.kv_heads:
            raise ValueError(f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {config.kv_heads}")
        if config.head_dim % 2:
            raise ValueError(f"head_dim = {config.head_dim} is odd, and rotary positions turn pairs")
        unknown = {name: fields[name] for name in fields.keys() - IRRELEVANT - self.irrelevant}
        unknown = {name: value for name, value in sorted(unknown.items()) if value is not None}
        if unknown:
            raise ValueError(f"fields that this code does not know, and so may not ignore: {unknown}")
        return config

    def _check_fixed(self, fields: dict) -> None:
        """Takes out the fields that may have one value only. Raises ValueError at any other."""
        fixed = {"architectures": [self.architecture], "use_mrope": False} | self.fixed
        for name, value in fixed.items():
            found = fields.pop(name, None)
            if found is not None and found != value:
                raise ValueError(f"{name} = {found!r} is not implemented; it must be {value!r}")
        layer_types = fields.pop("layer_types", None) or []
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f'layer_types = {layer_types} is not implemented; all must be "full_attention"')

    def config_to_hf(self, config: ModelConfig) -> dict:
        """config.json's fields for an architecture of this family, in the layout that old and new readers know.

        Raises ValueError where the family has no such attention.
        """
        if (config.qkv_bias, config.qk_norm) != (self.qkv_bias, self.qk_norm):
            raise ValueError(
                f"a {self.model_type} model has qkv_bias = {self.qkv_bias} and qk_norm = {self.qk_norm}, "
                f"not {config.qkv_bias} and {config.qk_norm}"
            )
        scaling = config.rope_scaling
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": config.width,
            "num_attention_heads": config.query_heads,
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in ROPE_FIELDS.items()},
            "max_position_embeddings": config.max_positions,
            "tie_word_embeddings": config.tied_embeddings,
            **self.fixed,
        }


def _rope_from_hf(fields: dict) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), taken out of either layout: ``rope_theta`` + ``rope_scaling``, or ``rope_parameters``."""
    old, new = (fields.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters"))
    for name, rope in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(rope, dict):
            raise ValueError(f"{name} = {rope!r} must be an object")
    thetas = [fields.pop("rope_theta", None), old.get("rope_theta"), new.get("rope_theta")]
    thetas = {_number(theta, "rope_theta") for theta in thetas if theta is not None} or {10000.0}
    scalings = {_scaling(rope) for rope in (old, new) if rope} or {None}
    if len(thetas) > 1 or len(scalings) > 1:
        raise ValueError("rope_theta, rope_scaling and rope_parameters contradict each other; keep rope_parameters")
    return thetas.pop(), scalings.pop()


def _scaling(rope: dict) -> RopeScaling | None:
    rest = {name: value for name, value in rope.items() if name != "rope_theta" and value is not None}
    kind = rest.pop("rope_type", None) or rest.get("type") or "default"
    rest.pop("type", None)
    if kind not in ("default", "llama3"):
        raise ValueError(f'rope_type = {kind!r} is not implemented; known are "default" and "llama3"')
    scaling = None
    if kind == "llama3":
        values = {ours: _number(rest.pop(theirs), theirs) for ours, theirs in ROPE_FIELDS.items()}
        scaling = RopeScaling(**values | {"original_max_positions": int(values["original_max_positions"])})
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            raise ValueError(f"low_freq_factor = {low} must be below high_freq_factor = {high}")
    if rest:
        raise ValueError(f"rotary positions with {rest} are not implemented for rope_type = {kind!r}")
    return scaling


def _size(value, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r} must be a whole number above 0")
    return value


def _number(value, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} = {value!r} must be a number above 0")
    return float(value)


def _boolean(value, name: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} = {value!r} must be true or false")
    return value
