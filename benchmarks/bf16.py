"""Compare losses and gradients in bfloat16 with float32.

    python benchmarks/bf16.py [--quick]

The student is a random model of 4 layers and width 256 of each family, with weights that give peaked outputs. The
teacher is the student with 5 % noise on every weight, as after some training. Two losses on 1,024 random tokens: the
reverse KL to the teacher, and next-token cross-entropy. "compute": model.dtype = "bfloat16" with float32 weights.
"compute and weights": model.param_dtype = "bfloat16" too. Reported in comparison with float32: the relative difference
of the losses, and the relative distance and cosine of the gradients with respect to all weights. Prints one JSON object
as the last line. Recorded numbers: benchmarks/README.md.
"""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from ctxjax import sharding
from ctxjax.distill import divergences
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig

BASE = ModelConfig(
    vocab_size=1024, width=256, layers=4, query_heads=8, kv_heads=2, head_dim=32, mlp_width=704, rope_theta=500000.0
)
FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


def loss_of(params, teacher, config, tokens_BxL, kind):
    mask_BxL = jnp.ones_like(tokens_BxL, bool)

    def logits_of(weights):
        hidden = transformer.forward(weights, config, tokens_BxL, mask_BxL)
        return transformer.apply_head(hidden, transformer.head_weights(weights, config))

    if kind == "reverse_kl":
        return jnp.mean(divergences.kl(logits_of(params), logits_of(teacher)))
    return -jnp.mean(divergences.token_logprob(logits_of(params)[:, :-1], tokens_BxL[:, 1:]))


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def loss_and_gradient(params, teacher, config, tokens_BxL, kind):
    return jax.value_and_grad(loss_of)(params, teacher, config, tokens_BxL, kind)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def models(config, mesh):
    """Return (student, teacher) in float32. Biases are random, since an initial bias is 0."""
    student = params_lib.init(transformer.param_specs(config), jax.random.key(0), mesh)
    noise = jax.tree.map(
        lambda w: jnp.asarray(np.random.default_rng(w.size).normal(size=w.shape), jnp.float32), student
    )
    student["layers"] = {
        name: 0.5 * noise["layers"][name] if name.endswith("bias") else weights
        for name, weights in student["layers"].items()
    }
    spread = jax.tree.map(lambda w: 0.05 * jnp.std(w) + 0.05 * (jnp.std(w) == 0), student)
    return student, jax.tree.map(lambda w, n, s: w + s * n, student, noise, spread)


def measure(config: ModelConfig, kind: str, mesh) -> dict:
    student, teacher = models(config, mesh)
    tokens = sharding.put_batch(np.random.default_rng(0).integers(0, config.vocab_size, (8, 128), np.int32), mesh)
    loss, gradient = loss_and_gradient(student, teacher, config, tokens, kind)
    expected = flat(gradient)
    low = dataclasses.replace(config, dtype="bfloat16")
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (student, teacher))
    result = {"loss_float32": float(f"{loss:.5g}")}
    for name, weights in {"compute": (student, teacher), "compute and weights": rounded}.items():
        low_loss, low_gradient = loss_and_gradient(*weights, low, tokens, kind)
        found = flat(low_gradient)
        distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
        result[name] = {
            "loss_relative_difference": float(f"{(low_loss - loss) / loss:.2g}"),
            "gradient_relative_distance": float(f"{distance:.2g}"),
            "gradient_cosine": round(float(cosine), 5),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one family")
    options = parser.parse_args()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    result = {"benchmark": "bf16"}
    with jax.set_mesh(mesh):
        for family in list(FAMILIES)[: 1 if options.quick else None]:
            config = dataclasses.replace(BASE, **FAMILIES[family])
            result[family] = {kind: measure(config, kind, mesh) for kind in ("reverse_kl", "cross_entropy")}
            print(family, result[family], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
