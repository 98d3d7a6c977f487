"""Models and adapters of Hugging Face's layout have the logits that transformers and PEFT gave them, before and after
they are written again. parity_test.py compares with torch itself, where it is installed."""

import json

import jax
import numpy as np
import pytest
from reference import MATRICES
from safetensors.numpy import load_file
import stored_logits
from stored_logits import ADAPTED, ALPHA, LAYERS, MODELS, RANK, TOKENS

from ctxjax.models import lora, transformer
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.models.lora import LoraConfig

STORED = json.loads(stored_logits.FILE.read_text())
LORA = LoraConfig(RANK, ALPHA, lora.TARGETS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        stored_logits.write_model(root / name, name)
    return root


def load(folder, mesh):
    config = hf_load.read_config(folder)
    return config, hf_load.load(folder, config, mesh)


def assert_logits(params, config, name: str) -> None:
    tokens = np.array(TOKENS, np.int32)

    @jax.jit
    def run(params):
        hidden = transformer.forward(params, config, tokens, np.ones(tokens.shape, bool))
        return transformer.apply_head(hidden, transformer.head_weights(params, config))

    expected = np.array(STORED[name])
    assert np.abs(expected).max() > 2
    assert np.abs(np.asarray(run(params)) - expected).max() < 1e-4 * np.abs(expected).max()


def adapter(name: str) -> dict:
    """PEFT's tensors as our tree: matrices [in, out], stacked by layer."""
    tensors = stored_logits.adapter_tensors(name)
    start = "base_model.model.model.layers"
    return {
        "layers": {
            f"{ours}_lora_{part}": np.stack(
                [tensors[f"{start}.{layer}.{theirs}.lora_{part.upper()}.weight"].T for layer in range(LAYERS)]
            )
            for ours, theirs in MATRICES.items()
            for part in "ab"
        }
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_has_the_logits_of_transformers_and_is_written_with_the_same_tensors(name, folders, tmp_path, mesh):
    config, params = load(folders / name, mesh)
    assert_logits(params, config, name)
    hf_save.save_weights(tmp_path, params, config, hf_load.FAMILIES[MODELS[name][0]])
    written, drawn = load_file(tmp_path / "model.safetensors"), stored_logits.tensors(name)
    assert written.keys() == drawn.keys()
    for tensor, value in drawn.items():
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.slow
def test_an_adapter_has_the_logits_of_peft_and_is_written_as_peft_reads_it(name, folders, tmp_path, mesh):
    config, params = load(folders / name, mesh)
    tree, family = jax.device_put(adapter(name)), hf_load.FAMILIES["llama"]
    joined = lora.join(params, tree, LORA)
    assert_logits(joined, config, f"{name}, adapted")

    (tmp_path / "adapter").mkdir()
    hf_save.save_adapter(tmp_path / "adapter", tree, config, LORA, family, "the base")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    drawn = stored_logits.adapter_tensors(name)
    assert written.keys() == drawn.keys()
    for tensor, value in drawn.items():
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (RANK, ALPHA, "the base")

    (tmp_path / "merged").mkdir()
    hf_save.save_weights(tmp_path / "merged", joined, config, family)
    (tmp_path / "merged" / "config.json").write_text((folders / name / "config.json").read_text())
    assert_logits(load(tmp_path / "merged", mesh)[1], config, f"{name}, adapted")
