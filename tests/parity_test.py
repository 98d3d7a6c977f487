"""The models of transformers, in torch, beside ours: the same logits and the same greedy continuations.

Checkpoints are transformers' own, with weights large enough for peaked outputs and with norms and biases that do
something, which fresh ones (1 and 0) do not.
"""

import dataclasses
import functools
import itertools
import json
import random
import sys

import jax
import numpy as np
import pytest

from ctxjax.data.prompts import left_pad
from ctxjax.models import transformer
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.sharding import put_batch

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
import transformers  # noqa: E402

from benchmarks import parity  # noqa: E402

pytestmark = pytest.mark.slow

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "seed_oss": (transformers.SeedOssConfig, transformers.SeedOssForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
# What a family's layers have of their own: windows short of the sequences here, and layers of several kinds.
KINDS = {
    "mistral": {"sliding_window": 24},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1], "pad_token_id": 0},
    "gemma3_text": {
        "num_hidden_layers": 5,
        "sliding_window": 24,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
    },
}
VOCAB = 97
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write(folder, family: str, seed: int = 0, dtype=torch.float32, **fields):
    """Writes a checkpoint; returns transformers' model of it, in float32 (read anew: its ``to`` rounds more than
    weights)."""
    config_class, model_class = CLASSES[family]
    heads = fields.get("num_attention_heads", 4)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 8 * heads, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    model = model_class(config_class(**sizes | fields))
    parity.set_peaked_weights(model, seed)
    model.to(dtype).save_pretrained(folder)
    return parity.read_theirs(folder)


@functools.partial(jax.jit, static_argnums=(1, 4))
def logits_of(params, config, tokens, mask, last):
    hidden = transformer.forward(params, config, tokens, mask)[:, -last:]
    return transformer.apply_head(hidden, transformer.head_weights(params, config))


def assert_same_logits(folder, theirs, mesh, length: int, last: int):
    config = hf_load.read_config(folder)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, length), dtype=np.int32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens, dtype=torch.long), logits_to_keep=last).logits.numpy()
    ours = logits_of(hf_load.load(folder, config, mesh), config, tokens, np.ones(tokens.shape, bool), last)
    scale = np.abs(expected).max()
    assert scale > 1
    assert np.abs(np.asarray(ours) - expected).max() <= 2e-4 * scale


def random_cases() -> list:
    """Twenty configurations of plain layers; family and ratio of query to key heads go round, the rest is drawn."""
    draw, cases = random.Random(0), []
    plain = ("llama", "qwen2", "qwen3")
    for (family, ratio), number in zip(itertools.cycle(itertools.product(plain, (1, 3, 4, 8))), range(20)):
        kv_heads = draw.choice((1, 2))
        rope = {"rope_type": "default"}
        if family == "llama" and draw.random() < 0.5:
            rope = SCALED | {"original_max_position_embeddings": 32}
        fields = {
            "num_key_value_heads": kv_heads,
            "num_attention_heads": ratio * kv_heads,
            "head_dim": draw.choice((8, 24, 80)),
            "hidden_size": ratio * kv_heads * draw.choice((8, 12)),
            "tie_word_embeddings": draw.random() < 0.5,
            "rope_parameters": rope | {"rope_theta": draw.choice((1e4, 5e5, 1e6))},
            "rms_norm_eps": draw.choice((1e-5, 1e-6)),
            "num_hidden_layers": draw.choice((1, 3)),
        }
        dtype = draw.choice((torch.float32, torch.bfloat16))
        cases.append(pytest.param(family, fields, dtype, number, id=f"{number}-{family}-{ratio}"))
    return cases


@pytest.mark.parametrize("family, fields, dtype, seed", random_cases())
def test_logits_are_those_of_transformers(family, fields, dtype, seed, tmp_path, mesh):
    theirs = write(tmp_path, family, seed, dtype, max_position_embeddings=256, **fields)
    assert_same_logits(tmp_path, theirs, mesh, length=96, last=96)


@pytest.mark.parametrize("family", ["mistral", "seed_oss", "smollm3", "olmo2", "gemma3_text"])
def test_layers_of_other_kinds_are_those_of_transformers_and_go_back_to_them(family, tmp_path, mesh):
    """96 positions of windows of 24, and the written folder opened by transformers again."""
    tied = {"tie_word_embeddings": True} if family == "smollm3" else {}
    theirs = write(tmp_path / "theirs", family, **KINDS.get(family, {}) | tied)
    assert_same_logits(tmp_path / "theirs", theirs, mesh, length=96, last=96)
    config = hf_load.read_config(tmp_path / "theirs")
    params = hf_load.load(tmp_path / "theirs", config, mesh)
    hf_save.save(tmp_path / "ours", params, config, parity.NoTokenizer(), (2,), family)
    again = parity.read_theirs(tmp_path / "ours")
    for one, two in zip(theirs.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert_same_logits(tmp_path / "ours", again, mesh, length=96, last=96)


def test_logits_beyond_the_positions_of_llama_3s_training_are_those_of_transformers(tmp_path, mesh):
    rope = SCALED | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    theirs = write(
        tmp_path, "llama", rope_parameters=rope, max_position_embeddings=131072, head_dim=64, hidden_size=32,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    assert_same_logits(tmp_path, theirs, mesh, length=8300, last=128)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "seed_oss", "smollm3", "gemma3_text"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 48, "attention_factor": 1.7,
         "beta_fast": 12.0, "beta_slow": 2.0},
    ],
    ids=["linear", "yarn", "yarn_of_other_settings"],
)  # fmt: skip
def test_scaled_positions_are_those_of_transformers_past_the_original_ones(family, rope, tmp_path, mesh):
    """Gemma's global layers and SmolLM3's rotary ones are scaled; the others have an amplitude of 1."""
    rope = rope | {"rope_theta": 1e4}
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
    own = KINDS.get(family, {}) | ({"tie_word_embeddings": True} if family == "smollm3" else {})
    theirs = write(tmp_path, family, head_dim=24, max_position_embeddings=128, rope_parameters=rope, **own)
    assert_same_logits(tmp_path, theirs, mesh, length=96, last=96)


PROMPTS = 50


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(VOCAB) for _ in range(draw.choice((1, 2, 7, 20, 33)))] for _ in range(PROMPTS)]


@pytest.mark.parametrize("family", CLASSES)
def test_greedy_continuations_are_those_of_transformers_and_of_each_prompt_alone(family, tmp_path, prompts, mesh):
    theirs = write(tmp_path, family, tie_word_embeddings=family == "qwen2", **KINDS.get(family, {}))
    config = hf_load.read_config(tmp_path)
    params = hf_load.load(tmp_path, config, mesh)
    padded = left_pad(prompts, max(map(len, prompts)), 0)
    expected = parity.their_tokens(theirs, padded)
    ours = np.asarray(parity.our_tokens(params, config, *put_batch((padded, np.arange(PROMPTS)), mesh)))
    np.testing.assert_array_equal(ours, expected)
    for length in (1, 20):
        row = next(row for row, prompt in enumerate(prompts) if len(prompt) == length)
        alone = parity.our_tokens(
            params, config, *put_batch((left_pad([prompts[row]], length, 0), np.array([row])), mesh)
        )
        np.testing.assert_array_equal(alone[0], ours[row])


def run_script(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Run benchmarks/parity.py; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["parity", *arguments])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    return ended.value.code, capsys.readouterr().out


def test_the_script_draws_supported_configurations_of_every_family():
    assert parity.FOREIGN.keys() == hf_load.FAMILIES.keys()
    for model_type, family in hf_load.FAMILIES.items():
        drawn = [parity.draw_fields(model_type, 0, number)[0] for number in range(20)]
        assert len({family.config_from_hf(fields) for fields in drawn}) == 20
        assert drawn[7] == parity.draw_fields(model_type, 0, 7)[0]


def test_the_script_compares_a_random_configuration(monkeypatch, capsys, tmp_path):
    code, printed = run_script(monkeypatch, capsys, "--family=gemma3_text", "--quick", f"--json={tmp_path / 'all'}")
    assert code == 0
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert row["configurations"] == 1 and row["greedy tokens equal"] == "256 of 256"
    assert f"| gemma3_text | 1 | - | {row['largest relative error']} | 256 of 256 | 0 | 0 |" in printed
    (case,) = json.loads((tmp_path / "all").read_text())
    assert 0 < case["logits"] <= parity.TOLERANCE and case["export"] == 0


def test_the_script_names_what_to_repeat_if_a_number_is_wrong(monkeypatch, capsys):
    read = hf_load.read_config
    monkeypatch.setattr(hf_load, "read_config", lambda folder: dataclasses.replace(read(folder), rope_theta=9999.0))
    code, printed = run_script(monkeypatch, capsys, "--family=llama", "--seed=3", "--number=2")
    assert code == 1
    assert "python -m benchmarks.parity --family=llama --seed=3 --configurations=20 --number=2\n" in printed
