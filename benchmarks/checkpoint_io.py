"""Seconds and memory of reading a model folder, beside a plain copy of its files.

    python benchmarks/checkpoint_io.py [--load] [--quick]

Each measurement runs in a process of its own, so that its peak memory is its own: the peak resident size above that
of a process that has imported the package, whose mesh is made and whose programs are compiled. On CPUs the loaded
model is part of it; ``overhead`` is the rest, to be compared with ``largest_tensor`` and a tenth of the model. Copy
and load take turns, files cached (warm) or dropped from the cache before each (cold); the medians are reported. Prints
one JSON object as the last line; the numbers of record stand in benchmarks/README.md.
"""

import argparse
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import statistics
import tempfile
import threading
import time

import numpy as np

GIB = 2**30
# hidden_size, layers, intermediate_size, vocab_size: 2.2 GiB and 0.1 GiB in bfloat16.
SIZES = {"full": (2048, 16, 8192, 65536), "quick": (512, 8, 2048, 32768)}


def write_checkpoint(folder: Path, size: tuple[int, int, int, int], dtype: str) -> None:
    """A Llama folder of random weights in files of at most 512 MiB, written without the code that is measured."""
    import ml_dtypes
    from safetensors.numpy import save_file

    width, layers, mlp, vocab = size
    fields = {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 256, "vocab_size": vocab,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(layers):
        names = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 4, width), "self_attn.v_proj": (width // 4, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    noise = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)
    noise = noise.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    files, waiting = {}, {}
    for place, (name, shape) in enumerate(shapes.items()):
        waiting[name] = np.resize(noise, shape)
        files[name] = f"model-{len(set(files.values())) + 0:05d}.safetensors" if len(waiting) == 1 else files[last]  # noqa: F821
        last = name  # noqa: F841
        if sum(tensor.nbytes for tensor in waiting.values()) > GIB // 2 or place == len(shapes) - 1:
            save_file(waiting, folder / files[name])
            waiting = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
