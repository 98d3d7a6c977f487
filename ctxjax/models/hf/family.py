"""What the supported Hugging Face families share: config.json's fields in and out, and the tensors' names.

A family is data: which parts its layers have, what its tensors are called, and which values of its other fields are
the ones that models/layer.py computes. Every field of a config.json is read, known to be irrelevant, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import math

from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

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

# Fields about training, other software, or generation (which is read from generation_config.json).
IRRELEVANT = {
    "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp",
    "initializer_range", "attention_dropout", "is_llama_config", "rope_interleaved", "transformers.js_config",
    "tokenizer_class", "unsloth_fixed", "unsloth_version", "_name_or_path", "_attn_implementation_autoset",
    "bos_token_id", "eos_token_id", "pad_token_id", "ctxjax",
    # Of transformers' base class: other token ids, labels and losses of classifiers, settings of pipelines, and how
    # responses are decoded, which the run's configuration says.
    "unk_token_id", "sep_token_id", "decoder_start_token_id", "id2label", "label2id", "num_labels", "_num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "tf_legacy_loss", "_commit_hash", "max_length",
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_return_sequences", "early_stopping",
}  # fmt: skip
# The other fields of transformers' base class, from 4.0 to 5.24, with the values that change nothing. Merges and
# fine-tunes write all of them.
GENERIC = {
    **dict.fromkeys(
        (
            "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
            "is_decoder",
        ),
        (False, True),  # what transformers returns besides the logits; attention is causal in any case
    ),
    **dict.fromkeys(
        (
            "torchscript", "use_bfloat16", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder",
            "remove_invalid_values",
        ),
        (False,),
    ),
    **dict.fromkeys(
        ("chunk_size_feed_forward", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)
    ),
    **dict.fromkeys(("num_beams", "num_beam_groups", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(
        (
            "cross_attention_hidden_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "prefix",
            "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
        ),
        (None,),
    ),
    "diversity_penalty": (0,),
    "pruned_heads": ({},),
}  # fmt: skip
# What transformers takes for an absent field; a family may have other defaults.
DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
# Our name -> config.json's.
SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
}
# rope_type -> our class, and its fields' names in config.json.
SCALINGS = {
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_positions": "original_max_position_embeddings",
        },
    ),
    "linear": (LinearScaling, {"factor": "factor"}),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            "original_max_positions": "original_max_position_embeddings",
            "amplitude": "attention_factor",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
        },
    ),
}


# Fields of ModelConfig that no config.json holds.
OURS = frozenset({"tokens", "dtype", "remat", "attention"})


def read_plain_layers(fields: dict) -> dict:
    """The ``read`` of a family whose layers are all plain. Raises ValueError at a layer type that is not."""
    layer_types = fields.pop("layer_types", None) or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f'layer_types = {layer_types} is not implemented; all must be "full_attention"')
    return {}


def join_kinds(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """Return ``ModelConfig.layer_kinds``: empty if all layers are plain, so that equal architectures compare equal."""
    return tuple(kinds) if any(kind != LayerKind() for kind in kinds) else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One ``model_type``.

    ``fixed``: fields that change the computation, each with the only value that is implemented. ``irrelevant``: fields
    without effect in this family, once ``fixed`` holds. ``inferred``: sizes that may be absent because transformers
    derives them from others; no other size may, since transformers' defaults are those of one particular model.
    ``defaults``: this family's own values in DEFAULTS. ``parts``: fields of ModelConfig that all its models share.
    ``read(fields)`` takes what only this family has out of config.json's fields and returns fields of ModelConfig;
    ``write(config)`` is its inverse.
    """

    model_type: str
    architecture: str
    layer_names: dict[str, tuple[str, bool]]
    fixed: dict[str, object]
    irrelevant: frozenset[str] = frozenset()
    inferred: frozenset[str] = frozenset()
    defaults: dict[str, object] = dataclasses.field(default_factory=dict)
    parts: dict[str, object] = dataclasses.field(default_factory=dict)
    read: Callable[[dict], dict] = read_plain_layers
    write: Callable[[ModelConfig], dict] = lambda config: {}

    def config_from_hf(self, fields: dict) -> ModelConfig:
        """Return the architecture that config.json describes.

        Raises ValueError that names a field and its value, KeyError that names a field that is missing.
        """
        fields = dict(fields)
        self._take_fixed(fields)
        width, heads = read_size(fields["hidden_size"], "hidden_size"), fields["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": width // read_size(heads, "num_attention_heads")}
        for name in self.inferred:
            fields[name] = derived[name] if fields.get(name) is None else fields[name]
        own = self.parts | self.read(fields)
        defaults = DEFAULTS | self.defaults
        theta, scaling = _take_rope(fields, defaults.pop("rope_theta"))
        fields = defaults | fields
        config = ModelConfig(
            width=read_size(fields.pop("hidden_size"), "hidden_size"),
            query_heads=fields.pop("num_attention_heads"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=read_number(fields.pop("rms_norm_eps"), "rms_norm_eps"),
            max_positions=read_size(fields.pop("max_position_embeddings"), "max_position_embeddings"),
            tied_embeddings=read_boolean(fields.pop("tie_word_embeddings"), "tie_word_embeddings"),
            **{ours: read_size(fields.pop(theirs), theirs) for ours, theirs in SIZES.items()},
            **own,
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

    def _take_fixed(self, fields: dict) -> None:
        """Remove the fields that have one value, or few, that are implemented. Raises ValueError at any other."""
        fixed = {"architectures": [self.architecture], "use_mrope": False} | self.fixed
        for name, values in (GENERIC | {name: (value,) for name, value in fixed.items()}).items():
            found = fields.pop(name, None)
            if found is not None and found not in values:
                known = " or ".join(map(repr, values))
                raise ValueError(f"{name} = {found!r} is not implemented; it must be {known}")

    def config_to_hf(self, config: ModelConfig) -> dict:
        """Return config.json's fields for an architecture of this family, in the layout that old and new readers know.

        Raises ValueError if the family has no such architecture.
        """
        scaling = config.rope_scaling
        fields = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": config.width,
            "num_attention_heads": config.query_heads,
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": None if scaling is None else _write_scaling(scaling),
            "max_position_embeddings": config.max_positions,
            "tie_word_embeddings": config.tied_embeddings,
            **self.fixed,
            **self.write(config),
        }
        read = self.config_from_hf(fields)
        for name in (field.name for field in dataclasses.fields(config) if field.name not in OURS):
            held, wanted = getattr(read, name), getattr(config, name)
            if held != wanted:
                raise ValueError(f"a {self.model_type} model has {name} = {held}, not {wanted}")
        return fields


def _take_rope(fields: dict, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Take (theta, scaling) out of either layout: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``."""
    old, new = (fields.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters"))
    scalings = {read_scaling(rope, name) for name, rope in (("rope_scaling", old), ("rope_parameters", new)) if rope}
    thetas = [fields.pop("rope_theta", None), old.get("rope_theta"), new.get("rope_theta")]
    thetas = {read_number(theta, "rope_theta") for theta in thetas if theta is not None} or {default_theta}
    if len(thetas) > 1 or len(scalings) > 1:
        raise ValueError("rope_theta, rope_scaling and rope_parameters contradict each other; keep rope_parameters")
    return thetas.pop(), (scalings or {None}).pop()


def read_scaling(rope: dict, name: str) -> RopeScaling | None:
    """Read the object with ``rope_type``, its field named ``name``. Raises ValueError at what is not implemented."""
    if not isinstance(rope, dict):
        raise ValueError(f"{name} = {rope!r} must be an object")
    rest = {name: value for name, value in rope.items() if name != "rope_theta" and value is not None}
    kind = rest.pop("rope_type", None) or rest.get("type") or "default"
    rest.pop("type", None)
    scaling = None
    if kind in SCALINGS:
        made, names = SCALINGS[kind]
        rest = _yarn_defaults(rest) | rest if kind == "yarn" else rest
        values = {ours: read_number(rest.pop(theirs), theirs) for ours, theirs in names.items()}
        if "original_max_positions" in values:
            values["original_max_positions"] = int(values["original_max_positions"])
        scaling = made(**values)
    elif kind != "default":
        raise ValueError(f'rope_type = {kind!r} is not implemented; known are "default", ' + _quote(SCALINGS))
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if hasattr(scaling, low) and getattr(scaling, low) >= getattr(scaling, high):
            raise ValueError(f"{low} = {getattr(scaling, low)} must be below {high} = {getattr(scaling, high)}")
    if rest:
        raise ValueError(f"rotary positions with {rest} are not implemented for rope_type = {kind!r}")
    return scaling


def _write_scaling(scaling: RopeScaling) -> dict:
    kind = next(kind for kind, (made, _) in SCALINGS.items() if isinstance(scaling, made))
    fields = {theirs: getattr(scaling, ours) for ours, theirs in SCALINGS[kind][1].items()}
    if kind == "yarn":  # other readers know the defaults, and not all know every field
        defaults = _yarn_defaults(fields)
        fields = {name: value for name, value in fields.items() if defaults.get(name) != value}
    return {"rope_type": kind} | fields


def _yarn_defaults(fields: dict) -> dict:
    """What transformers takes for absent fields, and for the field ``truncate``, which has one implemented value."""
    if fields.pop("truncate", True) is not True:
        raise ValueError("truncate = False is not implemented for rope_type = 'yarn'; it must be True")
    factor = read_number(fields["factor"], "factor")
    return {"attention_factor": 0.1 * math.log(max(factor, 1.0)) + 1.0, "beta_fast": 32.0, "beta_slow": 1.0}


def _quote(names: Iterable[str]) -> str:
    *first, last = (f'"{name}"' for name in names)
    return f"{', '.join(first)} and {last}"


def read_size(value, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r} must be a whole number above 0")
    return value


def read_number(value, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} = {value!r} must be a number above 0")
    return float(value)


def read_boolean(value, name: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} = {value!r} must be true or false")
    return value
