"""The sampler of google-tunix on the folder that benchmarks/sampler.py wrote: what one call gives to who has tokens.

Its Sampler takes texts; here lists of tokens stand in for them, so that no tokenizer is measured. All else of a call
is: the empty cache, its two compiled programs, the tokens back on the host. It returns no log-probabilities here,
which ctxjax always does. It runs on one device: on CPUs its models ignore a mesh.
Its weights are those of the others; its Llama turns positions by a base of its own, 1e6, which costs the same.

Its package asks for an older safetensors than ctxjax's, but runs with the newer, so it is installed beside the resolver
(0.1.7, with jax 0.10.2):

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

NO_TOKEN = -1  # for padding and the end: no prompt holds it and no draw gives it


class Tokens:
    """In the place of a tokenizer: a text is a list of tokens."""

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
    """A function of no arguments that makes ``new`` tokens behind every prompt, with the weights in ``path``."""
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
