"""Model folders as others write them: fields of transformers' base class, left-over files, heads and pad tokens."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax.data import prompts
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.inputs.model_folder import open_folder
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.hf import load as hf_load, save as hf_save

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 8,
}  # fmt: skip
# PretrainedConfig().to_dict() of transformers 4.57, as merges and fine-tunes write all of it.
BASE_CLASS = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "torch_dtype": None, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
    "tie_word_embeddings": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "architectures": ["LlamaForCausalLM"], "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "tokenizer_class": None, "prefix": None, "bos_token_id": 1,
    "pad_token_id": 0, "eos_token_id": 2, "sep_token_id": None, "decoder_start_token_id": None,
    "task_specific_params": None, "problem_type": None, "_name_or_path": "", "_attn_implementation_autoset": False,
    "transformers_version": "4.57.0", "unk_token_id": 0,
}  # fmt: skip


def parsed(fields):
    return hf_load.FAMILIES[fields["model_type"]].config_from_hf(fields)


def test_the_fields_of_the_base_class_change_nothing():
    assert parsed(LLAMA | BASE_CLASS) == parsed(LLAMA)
    assert parsed(LLAMA | {"id2label": {"0": "good"}, "label2id": {"good": 0}, "num_labels": 1}) == parsed(LLAMA)


@pytest.mark.parametrize("family", hf_load.FAMILIES)
def test_every_field_that_this_transformers_writes_is_known(family, tiny_model):
    transformers = pytest.importorskip("transformers")
    known = hf_load.FAMILIES[family]
    fields = transformers.AutoConfig.for_model(family, architectures=[known.architecture]).to_dict()
    known.config_from_hf(json.loads(json.dumps(fields)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_encoder_decoder", True), ("add_cross_attention", True), ("tie_encoder_decoder", True),
        ("chunk_size_feed_forward", 64), ("pruned_heads", {"0": [1]}), ("torchscript", True), ("use_bfloat16", True),
        ("cross_attention_hidden_size", 32), ("min_length", 5), ("num_beams", 4), ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3), ("bad_words_ids", [[3]]), ("forced_eos_token_id", 2), ("prefix", "Hi "),
        ("output_attentions", "yes"), ("suppress_tokens", [1]),
    ],
)  # fmt: skip
def test_and_at_other_values_they_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} = .* is not implemented; it must be "):
        parsed(LLAMA | BASE_CLASS | {field: value})


# --- A folder that opens ---


@pytest.fixture
def folder(tmp_path, mesh):
    """A random model of one layer with the tokenizer of a world."""
    tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    model = transformer.ModelConfig(len(tokenizer), 8, 1, query_heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    params = params_lib.init(transformer.param_specs(model), jax.random.key(0), mesh)
    hf_save.save(tmp_path / "model", params, model, tokenizer, (tokenizer.eos_token_id,), "llama")
    return tmp_path / "model"


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_unknown_model_type_names_its_file_once(folder):
    edit(folder / "config.json", model_type="mamba")
    with pytest.raises(ValueError, match="model_type = 'mamba'") as error:
        hf_load.read_config(folder)
    assert str(error.value).count("config.json") == 1


def test_an_old_index_is_not_read_in_place_of_newer_weights(folder, mesh):
    tensors = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    open_folder(folder, mesh)  # the index of one file: nothing to choose
    save_file(tensors, folder / "old.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))
    with pytest.raises(ValueError, match=r"has model\.safetensors and also .*index\.json.*old\.safetensors.*delete"):
        open_folder(folder, mesh)


def test_an_adapter_in_the_folder_is_not_ignored(folder, mesh):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json.*merge"):
        open_folder(folder, mesh)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json.*merge"):
        open_folder(folder, mesh)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_tied_head_that_differs_from_the_embedding_is_refused(stored, folder, mesh):
    path = folder / "model.safetensors"
    edit(folder / "config.json", tie_word_embeddings=True)
    tensors = {name: value.astype(stored) for name, value in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path)
    assert "head" not in open_folder(folder, mesh).params
    tensors["lm_head.weight"][-1, 2] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"tie_word_embeddings = true, but lm_head.weight differs .* in 1 of"):
        open_folder(folder, mesh)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"tie_word_embeddings = true, but lm_head.weight is \["):
        open_folder(folder, mesh)


def add_pad(folder, identifier: int) -> None:
    """Give the tokenizer a pad token of its own, as fine-tunes do without a new row in the embedding."""
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    token = {"id": identifier, "content": "[PAD]", "special": True, "single_word": False, "lstrip": False}
    fields["added_tokens"].append(token | {"rstrip": False, "normalized": False})
    path.write_text(json.dumps(fields))
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")


def test_a_pad_token_without_a_row_is_never_read(folder, mesh):
    size = hf_load.read_config(folder).vocab_size
    add_pad(folder, size)
    model = open_folder(folder, mesh)
    assert model.tokenizer.pad_token_id == size and model.pad_id < size
    assert model.config.vocab_size == size and model.config.tokens == 0


def test_but_it_may_not_stand_in_a_prompt(folder, mesh):
    add_pad(folder, hf_load.read_config(folder).vocab_size)
    model = open_folder(folder, mesh)
    typed = prompts.encode(model.tokenizer, [Row("7", "#1:a[PAD]", None, "")], PromptConfig())
    assert model.tokenizer.pad_token_id not in typed[0]  # what a user types is text, not a control token
    with pytest.raises(ValueError, match=r"a prompt has the token '\[PAD\]' with the id \d+, and the model has only"):
        model.check_prompts([[*typed[0], model.tokenizer.pad_token_id]], 4)


def test_other_tokens_without_a_row_are_refused(folder, mesh):
    add_pad(folder, hf_load.read_config(folder).vocab_size)
    edit(folder / "tokenizer_config.json", pad_token="<pad>")
    with pytest.raises(ValueError, match="but the head only"):
        open_folder(folder, mesh)


# --- The positions that a model was made for ---


def test_a_prompt_and_its_response_have_as_many_positions_as_the_model(folder, mesh):
    edit(folder / "config.json", max_position_embeddings=24)
    model = open_folder(folder, mesh)
    model.check_prompts([[3] * 14, [3] * 20], 4)
    with pytest.raises(ValueError, match=r"20 tokens and rollout\.max_tokens = 5 .* 24 positions \(max_position"):
        model.check_prompts([[3] * 14, [3] * 20], 5)
    assert np.isfinite(model.params["final_norm"]).all()
