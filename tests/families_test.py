"""config.json in and out: published architectures come out right, every field counts, and what is not computed is
refused."""

import dataclasses

import pytest

from ctxjax.models import params as params_lib, transformer
from ctxjax.models.hf import load as hf_load
from ctxjax.models.transformer import RopeScaling

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
PUBLISHED = {  # with the number of scalars in the published files
    "Llama-3.1-8B": (LLAMA31, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA32_1B, 1_235_814_400),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Qwen2.5-0.5B": (QWEN25, 494_032_768),
    "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
    "Qwen3-0.6B": (QWEN3, 596_049_920),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
}


def parsed(fields):
    return hf_load.FAMILIES[fields["model_type"]].config_from_hf(fields)


def new_layout(fields):
    """The same as transformers 5 writes it."""
    rest = {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = (fields["rope_scaling"] if fields.get("rope_scaling") else {"rope_type": "default"}) | {
        "rope_theta": fields["rope_theta"]
    }
    windows = {"layer_types": ["full_attention"] * fields["num_hidden_layers"]} if "sliding_window" in fields else {}
    return rest | {"rope_parameters": rope, "dtype": "bfloat16"} | windows


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_number_of_parameters(name):
    fields, parameters = PUBLISHED[name]
    assert params_lib.count(transformer.param_specs(parsed(fields))) == parameters


def test_the_fields_land_where_they_belong():
    config = parsed(LLAMA31)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
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


@pytest.mark.parametrize("family", hf_load.FAMILIES)
def test_transformers_reads_a_written_config_as_it_was_meant(family, tiny_model):
    transformers = pytest.importorskip("transformers")
    known = hf_load.FAMILIES[family]
    config = dataclasses.replace(
        tiny_model, max_positions=77, qkv_bias=known.qkv_bias, qk_norm=known.qk_norm,
        rope_scaling=RopeScaling(4.0, 1.0, 2.0, 16) if family == "llama" else None,
    )  # fmt: skip
    theirs = transformers.AutoConfig.for_model(**known.config_to_hf(config)).to_diff_dict()
    assert known.config_from_hf(theirs) == config


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (QWEN3 | {"rope_scaling": YARN}, "rope_type = 'yarn' is not implemented"),
        (QWEN25 | {"rope_parameters": YARN | {"rope_theta": 1e6}}, "rope_type = 'yarn' is not implemented"),
        (LLAMA31 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not implemented"),
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
        (LLAMA31 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_a_field_that_may_not_be_guessed_is_named(fields, name):
    with pytest.raises(KeyError, match=name):
        parsed(fields)


def test_old_llama_configs_leave_out_what_follows_from_the_rest():
    config = parsed(without(LLAMA31, "num_key_value_heads", "head_dim", "rope_scaling", "rope_theta"))
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)


def test_a_family_does_not_write_what_it_cannot_hold(tiny_model):
    with pytest.raises(ValueError, match="a llama model has qkv_bias = False"):
        hf_load.FAMILIES["llama"].config_to_hf(dataclasses.replace(tiny_model, qkv_bias=True))
