"""Run google-tunix's sampler on the folder of benchmarks/sampler.py.

Its Sampler takes texts. Here lists of tokens are passed in their place, so that no tokenizer is measured. The rest of a
call is measured: the empty cache, two compiled programs, and the transfer of the tokens to the host. It returns no
log-probabilities here, but ctxjax always does. It runs on one device, since its models ignore a mesh on CPUs. It uses
the same weights. Its Llama has a fixed rotary base of 1e6, which costs the same.

Its package requires an older safetensors than ctxjax, but works with the newer one. So install it without its
dependencies (0.1.7, with jax 0.10.2):

    pip install datasets google-metrax jaxtyping kagglehub perfetto pylatexenc qwix sentencepiece
    pip install --no-deps google-tunix==0.1.7
"""

from pathlib import Path

import jax
from jax.sharding import AxisType
import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3, params as llama3_params

from ctxjax.models.transformer import ModelConfig

NO_TOKEN = -1  # pad and end id: it is never in a prompt and never sampled


class Tokens:
    """A stand-in for a tokenizer: its texts are lists of tokens."""

    def encode(self, tokens: list[int]) -> list[int]:
        return tokens

    def decode(self, tokens: list[int]) -> list[int]:
        return tokens

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return NO_TOKEN


def tunix_generate(path: Path, model: ModelConfig, prompts_BxP: np.ndarray, new: int):
    """Return a function that samples ``new`` tokens for every prompt, with the weights in ``path``."""
    batch, prompt = prompts_BxP.shape
    config = llama3.ModelConfig(
        num_layers=model.layers, vocab_size=model.vocab_size, embed_dim=model.width, hidden_dim=model.mlp_width,
        num_heads=model.query_heads, head_dim=model.head_dim, num_kv_heads=model.kv_heads, rope_theta=model.rope_theta,
        norm_eps=model.norm_eps, weight_tying=model.tied_embeddings,
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = llama3_params.create_model_from_safe_tensors(str(path), config, mesh)
        sampler = Sampler(weights, Tokens(), CacheConfig(prompt + new, model.layers, model.kv_heads, model.head_dim))
    texts = prompts_BxP.tolist()

    def run():
        with jax.set_mesh(mesh):
            out = sampler(texts, new, max_prompt_length=prompt, temperature=1.0, top_p=1.0)
        if [len(tokens) for tokens in out.tokens] != [new] * batch:
            raise RuntimeError(f"tunix made {sorted({len(tokens) for tokens in out.tokens})} tokens instead of {new}")

    return run
