"""Hugging Face folders: the same logits as transformers, both ways, and errors that name what is wrong."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax.models import transformer
from ctxjax.models.hf import load as hf_load, safetensors_files, save as hf_save
from ctxjax.models.rope import Llama3Scaling

STRETCHED = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
VARIANTS = {"untied": {}, "tied": {"tied_embeddings": True}, "llama3_rope": {"rope_scaling": STRETCHED}}
LENGTH = 96  # three times the positions that the scaled variant was "trained" on


class NoTokenizer:
    """What ``save`` asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@functools.partial(jax.jit, static_argnums=1)
def forward(params, model, tokens):
    hidden = transformer.forward(params, model, tokens, np.ones(tokens.shape, bool))
    return transformer.apply_head(hidden, transformer.head_weights(params, model))


def write(folder, params, model):
    hf_save.save(folder, params, model, NoTokenizer(), (2, 7), "llama")
    return folder


@pytest.fixture
def folder(tmp_path, params, tiny_model):
    return write(tmp_path / "model", params, tiny_model)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 40, (2, LENGTH), dtype=np.int32)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="parity with transformers needs torch")


def assert_same_logits(ours, theirs):
    scale = np.abs(theirs).max()
    assert scale > 1 and np.abs(np.asarray(ours) - theirs).max() <= 2e-4 * scale


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load(folder, model, mesh):
    return hf_load.load(folder, model, mesh)


# --- Parity ---


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_opens_what_is_saved_and_computes_the_same_logits(
    variant, tmp_path, tiny_model, make_params, tokens, mesh, torch
):
    from transformers import AutoModelForCausalLM

    model = dataclasses.replace(tiny_model, **VARIANTS[variant])
    params = make_params(model, 0, mesh)
    theirs = AutoModelForCausalLM.from_pretrained(write(tmp_path / "model", params, model)).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert_same_logits(forward(params, model, tokens), logits)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_writes_loads_and_computes_the_same_logits(variant, dtype, tmp_path, tokens, mesh, torch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "default"} if variant != "llama3_rope" else scaling | {"original_max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.3,
        rope_parameters=rope | {"rope_theta": 500.0}, tie_word_embeddings=variant == "tied",
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model = hf_load.read_config(tmp_path / "model")
    assert (model.head_dim, model.rope_theta, model.tied_embeddings) == (16, 500.0, variant == "tied")
    assert_same_logits(forward(load(tmp_path / "model", model, mesh), model, tokens), logits)


def test_weights_in_several_files_load_like_one(tmp_path, mesh, torch):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes))
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="10KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    model = hf_load.read_config(tmp_path / "one")
    one, several = (load(tmp_path / name, model, mesh) for name in ("one", "several"))
    jax.tree.map(np.testing.assert_array_equal, one, several)


def test_rotary_frequencies_of_llama31_are_those_of_transformers_beyond_8192_positions(tmp_path, torch):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope, max_position_embeddings=131072)
    config.save_pretrained(tmp_path)
    theirs = LlamaRotaryEmbedding(config)
    frequencies = np.asarray(transformer.rope_frequencies(hf_load.read_config(tmp_path)), np.float64)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=2e-6)
    places = np.array([0, 1, 8191, 8192, 20000, 100000])
    cos, _ = theirs(torch.zeros(1), torch.tensor(places)[None])
    np.testing.assert_allclose(np.cos(places[:, None] * frequencies), cos[0, :, :64].numpy(), atol=2e-2)


# --- Round trip ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_bit_for_bit_onto_any_mesh(variant, tmp_path, tiny_model, make_params, mesh8):
    model = dataclasses.replace(tiny_model, norm_eps=3e-6, **VARIANTS[variant])
    params = make_params(model, 0, mesh8)
    folder = write(tmp_path / "new" / "model", params, model)
    assert hf_load.read_config(folder) == model
    loaded = load(folder, model, mesh8)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail("moved"), loaded, params)


def test_a_folder_is_loaded_in_the_precision_that_is_asked_for(folder, tiny_model, mesh):
    assert {leaf.dtype.name for leaf in jax.tree.leaves(hf_load.load(folder, tiny_model, mesh, "bfloat16"))} == {
        "bfloat16"
    }
    assert hf_load.read_config(folder, dtype="bfloat16", remat="full") == dataclasses.replace(
        tiny_model, dtype="bfloat16", remat="full"
    )


def test_a_saved_folder_names_its_end_tokens_and_holds_the_tokenizer(folder):
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [2, 7]
    assert (folder / "tokenizer.json").exists()


def test_saving_leaves_nothing_half_written_beside_the_folder(folder):
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_saved_folder_is_as_readable_for_others_as_any_new_folder(folder):
    other = folder.parent / "other"
    other.mkdir()
    assert folder.stat().st_mode == other.stat().st_mode


def test_an_existing_folder_is_never_overwritten(folder, params, tiny_model):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="model exists"):
        write(folder, params, tiny_model)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_stored_numbers_are_cast_as_jax_casts_them(stored, wanted, folder, tiny_model, mesh8):
    path = folder / "model.safetensors"
    tensors = {name: value.astype(stored) for name, value in load_file(path).items()}
    save_file(tensors, path)
    loaded = hf_load.load(folder, tiny_model, mesh8, wanted)
    assert {value.dtype.name for value in jax.tree.leaves(loaded)} == {wanted}
    expected = tensors["model.layers.1.mlp.up_proj.weight"].T.astype(wanted)
    np.testing.assert_array_equal(loaded["layers"]["up"][1], expected)
    np.testing.assert_array_equal(loaded["embedding"], tensors["model.embed_tokens.weight"].astype(wanted))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_a_transpose_in_strips_is_a_transpose(rows):
    source = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
    found = safetensors_files.transpose(source)
    np.testing.assert_array_equal(found, source.T)
    assert found.flags.c_contiguous


def test_a_loaded_model_is_the_devices_own_memory_and_survives_its_file(folder, tiny_model, params, mesh):
    loaded = load(folder, tiny_model, mesh)
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# --- Errors ---


def test_a_missing_folder_or_config_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        hf_load.read_config(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        hf_load.read_config(folder)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '{"model_type": "llama"'])
def test_a_corrupted_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        hf_load.read_config(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "mamba"}, r"config\.json: model_type = 'mamba' is not supported; known: \['gemma3_text'"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\]"),
        ({"hidden_act": "gelu"}, r"config\.json: hidden_act = 'gelu'"),
    ],
)
def test_an_architecture_that_is_not_implemented_is_refused_by_the_field_that_says_so(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        hf_load.read_config(folder)


def test_a_field_that_is_missing_is_named(folder):
    fields = json.loads((folder / "config.json").read_text())
    del fields["hidden_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="no field 'hidden_size'"):
        hf_load.read_config(folder)


def test_all_tensors_that_do_not_fit_are_listed_in_one_message(folder, tiny_model, mesh):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(16, np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((41, 32), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load(folder, tiny_model, mesh)
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: lm_head.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "wrong shape: model.norm.weight is [16], config.json implies [32]",
        "wrong shape: model.embed_tokens.weight is [41, 32], config.json implies [40, 32]",
    ):
        assert line in str(error.value)


def indexed(folder):
    """The folder with an index instead of the single file's name; returns the weights' file."""
    weights = (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = dict.fromkeys(load_file(weights), "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return weights


@pytest.mark.parametrize("split", [False, True], ids=["one_file", "index"])
def test_truncated_weights_are_named(split, folder, tiny_model, mesh):
    weights = indexed(folder) if split else folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=weights.name):
        load(folder, tiny_model, mesh)


def test_an_index_that_names_a_missing_file_says_which(folder, tiny_model, mesh):
    indexed(folder).unlink()
    with pytest.raises(FileNotFoundError, match=r"part\.safetensors"):
        load(folder, tiny_model, mesh)


@pytest.mark.parametrize("file", ["../part.safetensors", "/etc/passwd", "sub/part.safetensors", "part.bin", "..", 3])
def test_an_index_that_points_out_of_the_folder_or_at_a_pickle_is_refused(file, folder, tiny_model, mesh):
    part = indexed(folder)
    part.rename(folder.parent / part.name)  # where "../" would find it
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(ValueError, match="lm_head.weight is in .*; it must name a .*safetensors file in its folder"):
        load(folder, tiny_model, mesh)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": 3}', "{"])
def test_an_index_without_a_map_is_named(text, folder, tiny_model, mesh):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(folder, tiny_model, mesh)


def test_a_stored_dtype_that_is_not_known_is_named(folder, tiny_model, mesh):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="wrong dtype: model.norm.weight is I8, known are F32, F16, BF16"):
        load(folder, tiny_model, mesh)


def test_tensors_that_repeat_others_are_passed_over(folder, tiny_model, mesh):
    tensors = load_file(folder / "model.safetensors")
    expected = load(folder, tiny_model, mesh)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(folder, tiny_model, mesh), expected)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    tied = dataclasses.replace(tiny_model, tied_embeddings=True)
    assert "head" not in load(folder, tied, mesh)


def test_an_index_that_promises_a_tensor_which_its_file_lacks_says_which(folder, tiny_model, mesh):
    weights = indexed(folder)
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight .*part\.safetensors"):
        load(folder, tiny_model, mesh)


def test_pickled_weights_are_not_read_and_the_remedy_is_told(folder, tiny_model, mesh):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        load(folder, tiny_model, mesh)
