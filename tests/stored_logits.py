"""Logits of transformers and PEFT, written down. ``python -m tests.stored_logits --write`` computes them with torch.

Weights are drawn by numpy and written under Hugging Face's names, so the test that compares with stored_logits.json
needs no torch, and a matrix that loading and saving transpose alike does not go unnoticed.
"""

import argparse
import json
from pathlib import Path
import tempfile

import numpy as np
from reference import MATRICES, NORMS
from safetensors.numpy import save_file

FILE = Path(__file__).with_suffix(".json")
VOCABULARY, RANK, ALPHA = 33, 3, 7.0
TOKENS = [[3, 17, 31, 8, 8, 25, 1, 30, 12, 6], [9, 2, 14, 28, 5, 11, 19, 32, 0, 23]]
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Sizes: width, heads, heads of keys, width of the MLP. In "square" every matrix of a layer is square.
MODELS = {
    "llama": ("llama", (24, 4, 2, 40), {"rope_scaling": SCALED | {"original_max_position_embeddings": 8}}),
    "square": ("llama", (32, 4, 4, 32), {}),
    "qwen2": ("qwen2", (32, 4, 2, 40), {}),  # its heads are the width together
    "qwen3": ("qwen3", (24, 4, 2, 40), {"tie_word_embeddings": True}),
}
ADAPTED = ("llama", "square")  # the models that have an adapter too
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
HEAD_DIM, LAYERS = 8, 2


def shapes(name: str) -> dict[str, tuple[int, int]]:
    """The [out, in] of a layer's matrices."""
    width, heads, kv_heads, mlp = MODELS[name][1]
    q, kv = heads * HEAD_DIM, kv_heads * HEAD_DIM
    return {
        "q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q), "gate": (mlp, width), "up": (mlp, width),
        "down": (width, mlp),
    }  # fmt: skip


def tensors(name: str) -> dict[str, np.ndarray]:
    """The model's weights by Hugging Face's names. NumPy has frozen the stream of RandomState."""
    family, (width, *_), fields = MODELS[name]
    random, found = np.random.RandomState(0), {}

    def draw(key: str, *shape: int, about: float = 0.0, size: float = 1.0):
        found[key] = np.float32(about + size * random.normal(size=shape))

    draw("model.embed_tokens.weight", VOCABULARY, width)
    for layer in range(LAYERS):
        for ours, (rows, columns) in shapes(name).items():
            draw(f"model.layers.{layer}.{MATRICES[ours]}.weight", rows, columns, size=1.4 * columns**-0.5)
            if family == "qwen2" and ours in ("q", "k", "v"):
                draw(f"model.layers.{layer}.{MATRICES[ours]}.bias", rows, size=0.5)
        for theirs in NORMS.values():
            draw(f"model.layers.{layer}.{theirs}.weight", width, about=1.0, size=0.3)
        for theirs in ("q_norm", "k_norm") if family == "qwen3" else ():
            draw(f"model.layers.{layer}.self_attn.{theirs}.weight", HEAD_DIM, about=1.0, size=0.3)
    draw("model.norm.weight", width, about=1.0, size=0.3)
    if not fields.get("tie_word_embeddings"):
        draw("lm_head.weight", VOCABULARY, width, size=1.4 * width**-0.5)
    return found


def adapter_tensors(name: str) -> dict[str, np.ndarray]:
    """An adapter of every matrix by PEFT's names: A [rank, in], B [out, rank]."""
    random, found = np.random.RandomState(1), {}
    for layer in range(LAYERS):
        for ours, (rows, columns) in shapes(name).items():
            start = f"base_model.model.model.layers.{layer}.{MATRICES[ours]}"
            found[f"{start}.lora_A.weight"] = np.float32(random.normal(size=(RANK, columns)) * columns**-0.5)
            found[f"{start}.lora_B.weight"] = np.float32(random.normal(size=(rows, RANK)) * 0.3)
    return found


def write_model(folder: Path, name: str) -> None:
    """Write config.json and the weights."""
    family, (width, heads, kv_heads, mlp), fields = MODELS[name]
    folder.mkdir()
    save_file(tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": [CLASSES[family]], "model_type": family, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM, "intermediate_size": mlp, "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 100.0, "max_position_embeddings": 64,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1,
        "torch_dtype": "float32",
    } | fields  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))


def write_adapter(folder: Path, name: str, base: Path) -> None:
    folder.mkdir()
    save_file(adapter_tensors(name), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [theirs.split(".")[-1] for theirs in MATRICES.values()]
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": ALPHA, "target_modules": modules, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def compute() -> dict[str, list]:
    """The logits [2, 10, V] of every model and adapted model, in transformers and PEFT."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    found = {}
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        for name in MODELS:
            folder = Path(root) / name
            write_model(folder, name)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            found[name] = model(torch.tensor(TOKENS)).logits
            if name in ADAPTED:
                write_adapter(Path(root) / f"{name}_adapter", name, folder)
                adapted = peft.PeftModel.from_pretrained(model, Path(root) / f"{name}_adapter").eval()
                found[f"{name}, adapted"] = adapted(torch.tensor(TOKENS)).logits
    return {name: np.round(logits.numpy().astype(np.float64), 5).tolist() for name, logits in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the logits down; needs torch and peft")
    if parser.parse_args().write:
        FILE.write_text(json.dumps(compute(), separators=(",", ":")) + "\n")
