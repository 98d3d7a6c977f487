"""The Gemma 3 family, text models: most layers have a window and a rotary base of their own, norms before and after
attention and MLP multiply by 1 + scale, and embeddings are multiplied by the root of the width."""

from __future__ import annotations

from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.hf.family import LAYER_NAMES, Family, join_kinds, read_number, read_scaling, read_size

_NAMES = {
    "attention_post_norm": ("post_attention_layernorm.weight", False),
    "mlp_norm": ("pre_feedforward_layernorm.weight", False),
    "mlp_post_norm": ("post_feedforward_layernorm.weight", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _read(fields: dict) -> dict:
    layers = read_size(fields["num_hidden_layers"], "num_hidden_layers")
    every = read_size(fields.pop("sliding_window_pattern", None) or 6, "sliding_window_pattern")
    types = fields.pop("layer_types", None) or [LOCAL if (i + 1) % every else GLOBAL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (LOCAL, GLOBAL) for kind in types):
        raise ValueError(f'layer_types = {types} must have "{LOCAL}" or "{GLOBAL}" for each of {layers} layers')
    window, theta = fields.pop("sliding_window"), _take_local_theta(fields)
    local = LayerKind(read_size(window, "sliding_window"), rope_theta=theta) if LOCAL in types else None
    scalar = read_number(fields.pop("query_pre_attn_scalar"), "query_pre_attn_scalar")
    softcap = fields.pop("final_logit_softcapping", None)
    return {
        "layer_kinds": join_kinds([local if kind == LOCAL else LayerKind() for kind in types]),
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "query_scale": 0.0 if scalar == fields["head_dim"] else scalar**-0.5,
        "logit_softcap": 0.0 if softcap is None else read_number(softcap, "final_logit_softcapping"),
    }


def _take_local_theta(fields: dict) -> float:
    """Remove and return the rotary base of layers with a window, of either layout: ``rope_local_base_freq``, or
    ``rope_parameters`` by layer type, of which the global layers' are left."""
    theta, rope = fields.pop("rope_local_base_freq", None), fields.get("rope_parameters")
    if rope:
        if not isinstance(rope, dict) or rope.keys() - {LOCAL, GLOBAL}:  # transformers ignores other names
            raise ValueError(f'rope_parameters = {rope!r} is not implemented; its names must be "{LOCAL}", "{GLOBAL}"')
        fields["rope_parameters"], local = rope.get(GLOBAL), rope.get(LOCAL) or {}
        if read_scaling(local, f"rope_parameters of {LOCAL}") is not None:
            raise ValueError(f'rope_parameters = {rope} is not implemented; rope_type of "{LOCAL}" must be "default"')
        theta = local.get("rope_theta", theta)
    return read_number(10000.0 if theta is None else theta, "rope_local_base_freq")


def _write(config: ModelConfig) -> dict:
    kinds = config.kinds
    local = next((kind for kind in kinds if kind.window), LayerKind(window=4096, rope_theta=10000.0))
    return {
        "layer_types": [LOCAL if kind.window else GLOBAL for kind in kinds],
        "sliding_window": local.window,
        "rope_local_base_freq": local.rope_theta,
        "query_pre_attn_scalar": round(config.query_scale**-2) if config.query_scale else config.head_dim,
        "final_logit_softcapping": config.logit_softcap or None,
    }


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    layer_names=LAYER_NAMES | _NAMES,
    fixed={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    irrelevant=frozenset({"cache_implementation", "_sliding_window_pattern"}),
    defaults={"rope_theta": 1000000.0, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    parts={
        "pre_norms": True,
        "post_norms": True,
        "norm_plus_one": True,
        "qk_norm": True,
        "activation": "gelu_tanh",
    },
    read=_read,
    write=_write,
)
