"""One step of a tiny model; golden_step.json holds its numbers. ``python -m tests.golden_step`` prints them.

Weights and prompts come from fixed random streams, so the step is a pure function of the code. If its numbers change,
so do those of every run. ``python -m tests.golden_step --write="why they change"`` writes new ones after a change that
is meant to move them; the commit says why, too.
"""

import argparse
import json
from pathlib import Path
import zlib

import jax
import numpy as np

from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step, update_step
from ctxjax.models.params import ParamSpec, shardings
from ctxjax.models.transformer import ModelConfig, param_specs
from ctxjax.sharding import make_mesh, put_batch
from ctxjax.types import Batch, Frozen, Prompts

FILE = Path(__file__).with_suffix(".json")
ROWS, VOCABULARY = 8, 40


def config() -> StepConfig:
    """All three terms, grouped heads, several end tokens, a temperature and two chunks of the head."""
    model = ModelConfig(
        vocab_size=VOCABULARY, width=16, layers=2, query_heads=4, kv_heads=2, head_dim=8, mlp_width=24, rope_theta=1e3
    )
    return StepConfig(
        model=model,
        teacher_model=model,
        sampling=SamplingConfig(max_tokens=6, eos_ids=(2, 5), pad_id=0, temperature=0.8),
        loss=LossConfig(beta=0.5, mu=1.0, temperature=0.8, chunk=3),
        optim=OptimConfig(lr=1e-3, steps=10),
    )


def weights(seed: int, mesh):
    """Weights that give peaked distributions. NumPy has frozen the stream of RandomState."""
    rng = np.random.RandomState(seed)
    specs = param_specs(config().model)

    def values(spec, sharding):
        noise = rng.normal(size=spec.shape)
        return jax.device_put(np.float32(1 + 0.2 * noise if spec.stddev is None else 0.3 * noise), sharding)

    return jax.tree.map(values, specs, shardings(specs, mesh), is_leaf=lambda node: isinstance(node, ParamSpec))


def batch() -> Batch:
    """Three views of left-padded prompts; the context view starts with a prefix that all rows share."""
    rng = np.random.RandomState(2)

    def prompts(rows: int, columns: int, prefix=None) -> Prompts:
        lengths = rng.randint(2, columns + 1, rows)
        tokens = rng.randint(0, VOCABULARY, (rows, columns)).astype(np.int32)
        return Prompts(tokens, np.arange(columns) >= columns - lengths[:, None], prefix)

    prefix = rng.randint(0, VOCABULARY, 5).astype(np.int32)
    return Batch(prompts(ROWS, 5), prompts(ROWS, 6, prefix), prompts(ROWS // 2, 7), np.arange(ROWS, dtype=np.int32))


def checksum(*rollouts) -> int:
    """CRC-32 of the sampled tokens and of where each response ends."""
    return zlib.crc32(b"".join(np.asarray(r.tokens_BxT * r.mask_BxT, np.int32).tobytes() for r in rollouts))


def numbers() -> dict[str, float | int]:
    """Take a step; return its numbers, float32, and the loss of the same responses after it, which shows the update."""
    mesh = make_mesh(devices=jax.devices()[:1])
    rollouts_of, update = (jax.jit(half, static_argnames="config") for half in (rollout_step, update_step))
    with jax.set_mesh(mesh):
        frozen, data = Frozen(weights(1, mesh)), put_batch(batch(), mesh)
        state = init_state(weights(0, mesh), config(), jax.random.key(3))
        rollouts = rollouts_of(state, frozen, data, config=config())
        after, metrics = update(state, frozen, data, *rollouts, config=config())
        _, metrics_after = update(after, frozen, data, *rollouts, config=config())
        found = {name: float(metrics[name]) for name in ("loss", "distill", "anchor", "retain", "grad_norm")}
        return found | {"loss_after": float(metrics_after["loss"]), "tokens_crc": checksum(*rollouts)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", metavar="WHY", help="write the numbers down, and why they change")
    why = parser.parse_args().write
    found = numbers()
    print(json.dumps(found, indent=2))
    if why:
        FILE.write_text(json.dumps({"why": why} | found, indent=2) + "\n")
