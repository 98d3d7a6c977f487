"""config.json in and out: published architectures come out right, every field counts, and what is not computed is
refused."""

import dataclasses
import math

import pytest
from transformers import AutoConfig

from ctxjax.models import params as params_lib, transformer
from ctxjax.models.architecture import LayerKind
from ctxjax.models.hf import load as hf_load
from ctxjax.models.hf.family import DEFAULTS
from ctxjax.models.rope import LinearScaling, Llama3Scaling, YarnScaling

LLAMA31 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA32_1B = LLAMA31 | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True, "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True,
    "vocab_size": 49152, "rope_interleaved": False, "is_llama_config": True, "hidden_act": "silu",
}  # fmt: skip
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "use_mrope": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_7B = QWEN25 | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_V03 = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "rms_norm_eps": 1e-05, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_V01 = MISTRAL_V03 | {"vocab_size": 32000, "sliding_window": 4096, "rope_theta": 10000.0}
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
    "hidden_act": "silu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0,
    "rope_scaling": None, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "mlp_bias": False,
    "attention_bias": False, "layer_types": ["full_attention"] * 36, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 28, "pretraining_tp": 2, "tie_word_embeddings": True,
}  # fmt: skip
SEED_OSS = {
    "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "attention_bias": True,
    "attention_dropout": 0.1, "attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 27648, "max_position_embeddings": 524288,
    "mlp_bias": False, "num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 155136,
}  # fmt: skip
OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
PUBLISHED = {  # with the number of scalars in the published files
    "Llama-3.1-8B": (LLAMA31, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA32_1B, 1_235_814_400),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Qwen2.5-0.5B": (QWEN25, 494_032_768),
    "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
    "Qwen3-0.6B": (QWEN3, 596_049_920),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
    "Mistral-7B-v0.1": (MISTRAL_V01, 7_241_732_096),
    "Mistral-7B-v0.3": (MISTRAL_V03, 7_248_023_552),
    "SmolLM3-3B": (SMOLLM3, 3_075_098_624),
    "Seed-OSS-36B": (SEED_OSS, 36_151_104_512),
    "OLMo-2-1124-7B": (OLMO2, 7_298_617_344),
    "gemma-3-1b": (GEMMA3, 999_885_952),
}


def parsed(fields):
    return hf_load.FAMILIES[fields["model_type"]].config_from_hf(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_absent_field_is_what_transformers_takes_for_it(name):
    fields = {field: value for field, value in PUBLISHED[name][0].items() if field not in DEFAULTS}
    config, theirs = parsed(fields), AutoConfig.for_model(fields["model_type"]).to_dict()
    rope = theirs.get("rope_parameters") or theirs  # of transformers 5; before it, among the fields
    theirs["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    ours = (config.norm_eps, config.max_positions, config.tied_embeddings, config.rope_theta)
    assert dict(zip(DEFAULTS, ours, strict=True)) == {field: theirs[field] for field in DEFAULTS}


def new_layout(fields):
    """The same as transformers 5 writes it."""
    rest = {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = (fields["rope_scaling"] if fields.get("rope_scaling") else {"rope_type": "default"}) | {
        "rope_theta": fields["rope_theta"]
    }
    types = {"layer_types": ["full_attention"] * fields["num_hidden_layers"]}
    if fields["model_type"] == "gemma3_text":
        types = {"layer_types": ([*["sliding_attention"] * 5, "full_attention"] * 5)[: fields["num_hidden_layers"]]}
        local = {"rope_type": "default", "rope_theta": rest.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
    has_types = "sliding_window" in fields and fields["model_type"] != "mistral"
    return rest | {"rope_parameters": rope, "dtype": "bfloat16"} | (types if has_types else {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_number_of_parameters(name):
    fields, parameters = PUBLISHED[name]
    assert params_lib.count(transformer.param_specs(parsed(fields))) == parameters


def test_the_fields_land_where_they_belong():
    config = parsed(LLAMA31)
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.norm_eps, config.max_positions) == (500000.0, 1e-5, 131072)
    assert (config.head_dim, config.kv_heads, config.tied_embeddings) == (128, 8, False)
    assert (config.qkv_bias, config.qk_norm) == (False, False)
    assert (parsed(QWEN25).qkv_bias, parsed(QWEN25).qk_norm) == (True, False)
    assert (parsed(QWEN3).qkv_bias, parsed(QWEN3).qk_norm, parsed(QWEN3).head_dim) == (False, True, 128)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_layouts_mean_the_same_and_a_written_config_reads_back(name):
    fields, _ = PUBLISHED[name]
    config, family = parsed(fields), hf_load.FAMILIES[fields["model_type"]]
    assert parsed(new_layout(fields)) == config
    written = family.config_to_hf(config)
    assert family.config_from_hf(written) == config
    for field in written.keys() & fields.keys() - {"rope_scaling"}:
        assert written[field] == fields[field], field
    assert (written["rope_scaling"] or None) == fields.get("rope_scaling")


def test_the_kinds_of_layers_are_read():
    local = LayerKind(window=512, rope_theta=10000.0)
    assert parsed(GEMMA3).layer_kinds == ((*[local] * 5, LayerKind()) * 5)[:26]
    assert parsed(MISTRAL_V01).layer_kinds == (LayerKind(window=4096),) * 32
    assert parsed(MISTRAL_V03).layer_kinds == parsed(LLAMA31).layer_kinds == ()
    with_and_without = (*[LayerKind()] * 3, LayerKind(rotary=False)) * 9
    assert parsed(SMOLLM3).layer_kinds == parsed(without(SMOLLM3, "no_rope_layers")).layer_kinds == with_and_without
    gemma = parsed(GEMMA3 | {"query_pre_attn_scalar": 168, "final_logit_softcapping": 30.0})
    assert (gemma.query_scale, gemma.logit_softcap, gemma.embedding_scale) == (168**-0.5, 30.0, 1152**0.5)
    assert parsed(GEMMA3).query_scale == 0 and parsed(GEMMA3).tied_embeddings


OWN = {  # what else a family has, for two layers
    "mistral": {"layer_kinds": (LayerKind(window=7),) * 2},
    "smollm3": {"layer_kinds": (LayerKind(rotary=False), LayerKind())},
    "gemma3_text": {
        "layer_kinds": (LayerKind(), LayerKind(window=9, rope_theta=77.0)),
        "embedding_scale": 32**0.5, "query_scale": 24**-0.5, "logit_softcap": 30.0,
    },
}  # fmt: skip


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_scalings_of_rotary_positions_are_read_in_every_layout_and_written_without_defaults():
    expected = YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1)
    for fields in ({"rope_scaling": YARN}, {"rope_parameters": YARN | {"rope_theta": 1e6, "truncate": True}}):
        config = parsed(QWEN25 | fields)
        assert config.rope_scaling == expected
        assert hf_load.FAMILIES["qwen2"].config_to_hf(config)["rope_scaling"] == YARN
    sharp = parsed(QWEN25 | {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16}})
    assert (sharp.rope_scaling.amplitude, sharp.rope_scaling.beta_fast) == (1.5, 16)
    written = hf_load.FAMILIES["qwen2"].config_to_hf(sharp)["rope_scaling"]
    assert written == YARN | {"attention_factor": 1.5, "beta_fast": 16}
    linear = parsed(GEMMA3 | {"rope_scaling": {"type": "linear", "factor": 8}})
    assert linear.rope_scaling == LinearScaling(8.0)
    assert hf_load.FAMILIES["gemma3_text"].config_to_hf(linear)["rope_scaling"]["factor"] == 8.0


SCALED = (Llama3Scaling(4.0, 1.0, 2.0, 16), LinearScaling(8.0), YarnScaling(4.0, 32, 1.25), None)


@pytest.mark.parametrize("scaling", SCALED, ids=lambda scaling: type(scaling).__name__)
@pytest.mark.parametrize("family", hf_load.FAMILIES)
def test_transformers_reads_a_written_config_as_it_was_meant(family, scaling, tiny_model):
    transformers = pytest.importorskip("transformers")
    known = hf_load.FAMILIES[family]
    config = dataclasses.replace(
        tiny_model, max_positions=77, **known.parts | OWN.get(family, {}),
        rope_scaling=scaling,
    )  # fmt: skip
    theirs = transformers.AutoConfig.for_model(**known.config_to_hf(config)).to_diff_dict()
    assert known.config_from_hf(theirs) == config


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            QWEN3 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            'known are "default", "llama3", "linear" and',
        ),
        (QWEN3 | {"rope_scaling": YARN | {"truncate": False}}, "truncate = False is not implemented"),
        (QWEN3 | {"rope_scaling": YARN | {"mscale": 0.7}}, "{'mscale': 0.7} are not implemented"),
        (QWEN3 | {"rope_scaling": YARN | {"beta_slow": 64}}, "beta_slow = 64.0 must be below beta_fast = 32.0"),
        (QWEN3 | {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor = 0 must be a number above 0"),
        (QWEN3 | {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, r"'mrope_section': \[1\]"),
        (QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention.* not implemented"),
        (LLAMA31 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradict each other"),
        (QWEN3 | {"rope_parameters": "yarn"}, "rope_parameters = 'yarn' must be an object"),
        (QWEN25 | {"use_sliding_window": True}, "use_sliding_window = True is not implemented; it must be False"),
        (LLAMA31 | {"sliding_window": 4096}, "{'sliding_window': 4096}"),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = .*'sliding_attention'"),
        (QWEN3 | {"attention_bias": True}, "attention_bias = True is not implemented"),
        (LLAMA31 | {"attention_bias": True}, "attention_bias = True is not implemented"),
        (LLAMA31 | {"mlp_bias": True}, "mlp_bias = True is not implemented"),
        (QWEN25 | {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; it must be 'silu'"),
        (QWEN25 | {"use_mrope": True}, "use_mrope = True is not implemented"),
        (LLAMA31 | {"quantization_config": {"bits": 4}}, "may not ignore: {'quantization_config': {'bits': 4}}"),
        (LLAMA31 | {"use_unheard_of": False}, "may not ignore: {'use_unheard_of': False}"),
        (LLAMA31 | {"architectures": ["LlamaForSequenceClassification"]}, "architectures = .*Classification"),
        (LLAMA31 | {"hidden_size": "4096"}, "hidden_size = '4096' must be a whole number above 0"),
        (LLAMA31 | {"vocab_size": True}, "vocab_size = True must be a whole number"),
        (LLAMA31 | {"num_hidden_layers": 0}, "num_hidden_layers = 0 must be"),
        (LLAMA31 | {"rope_theta": -1}, "rope_theta = -1 must be a number above 0"),
        (LLAMA31 | {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' must be true or false"),
        (LLAMA31 | {"num_key_value_heads": 5}, "num_attention_heads = 32 is no multiple of num_key_value_heads = 5"),
        (LLAMA31 | {"head_dim": 25}, "head_dim = 25 is odd"),
        (MISTRAL_V01 | {"sliding_window": 0}, "sliding_window = 0 must be a whole number above 0"),
        (MISTRAL_V01 | {"layer_types": ["full_attention"] * 32}, "may not ignore: {'layer_types'"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\] must have a 0 or 1 for each of 36 layers"),
        (SMOLLM3 | {"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        (
            GEMMA3 | {"layer_types": ["chunked_attention"] * 26},
            'layer_types = .*chunked.* must have "sliding',
        ),
        (SEED_OSS | {"attention_bias": False}, "attention_bias = False is not implemented; it must be True"),
        (SEED_OSS | {"attention_out_bias": True}, "attention_out_bias = True is not implemented"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not implemented"),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            'of "sliding_attention" must',
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 8.0}}},
            'of "sliding_attention" must',
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "rotary positions with .*partial_rotary_factor.* not implemented",
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": "yarn"}},
            "of sliding_attention = 'yarn' must be an object",
        ),
        (
            GEMMA3 | {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            'its names must be "sliding_attention", "full_attention"',
        ),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not implemented"),
    ],
)
def test_what_is_not_computed_is_refused_by_name_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        parsed(fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (without(LLAMA31, "hidden_size"), "hidden_size"),
        (without(QWEN3, "head_dim"), "head_dim"),
        (without(QWEN25, "num_key_value_heads"), "num_key_value_heads"),
        (without(SEED_OSS, "head_dim"), "head_dim"),
        (without(MISTRAL_V01, "sliding_window"), "sliding_window"),
        (without(GEMMA3, "query_pre_attn_scalar"), "query_pre_attn_scalar"),
        (LLAMA31 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_a_field_that_may_not_be_guessed_is_named(fields, name):
    with pytest.raises(KeyError, match=name):
        parsed(fields)


def test_old_llama_configs_leave_out_what_follows_from_the_rest():
    config = parsed(without(LLAMA31, "num_key_value_heads", "head_dim", "rope_scaling", "rope_theta"))
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"qkv_bias": True}, "a llama model has qkv_bias = False, not True"),
        ("llama", {"layer_kinds": (LayerKind(window=4),) * 2}, "a llama model has layer_kinds = "),
        ("llama", {"logit_softcap": 30.0}, "a llama model has logit_softcap = 0.0, not 30.0"),
        ("mistral", {"layer_kinds": (LayerKind(window=4), LayerKind())}, "a mistral model has layer_kinds = "),
        (
            "smollm3",
            {"layer_kinds": (LayerKind(window=4), LayerKind())},
            r"smollm3 model has layer_kinds = \(\), not",
        ),
        ("olmo2", {}, "a olmo2 model has qk_norm = True, not False"),
    ],
)
def test_a_family_does_not_write_what_it_cannot_hold(family, change, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        hf_load.FAMILIES[family].config_to_hf(dataclasses.replace(tiny_model, **change))
