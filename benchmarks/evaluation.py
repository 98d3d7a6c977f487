"""Measure the tokens per second of evaluation, compared with training rollouts.

    python -m benchmarks.evaluation [--quick]

A random 4-layer model answers 1,000 questions of 64 tokens, without a context and with a shared context of 512 tokens:
greedily, with 64 tokens (no end token), as ``ctxjax.evaluation.evaluator`` does, from host arrays to host arrays in
batches of at most 256. Each view is compared with a rollout: only the sampler, at temperature 1, on a batch of the same
prompts that is already on the device. One more rollout reads the context in every row, to show what sharing saves. Runs
alternate, since the machine may be shared; the fastest of each counts. Prints one JSON object as the last line.
Recorded numbers: benchmarks/README.md.
"""

import argparse
import json
import os

import jax
import numpy as np

from benchmarks.sampler import best_of
from ctxjax import rng, sharding
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.inputs import decoding
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Prompts, map_rows

MODEL = ModelConfig(1024, 128, 4, 4, 2, 32, 352)
QUESTIONS, BATCH, QUESTION, CONTEXT, RESPONSE = 1000, 256, 64, 512, 64


def measure(questions: int, runs: int) -> dict:
    mesh = sharding.make_mesh(data=jax.device_count())
    params = params_lib.init(transformer.param_specs(MODEL), jax.random.key(0), mesh)
    draw = np.random.default_rng(0).integers
    tokens = draw(0, MODEL.vocab_size, (questions, QUESTION), dtype=np.int32)
    context = draw(0, MODEL.vocab_size, CONTEXT, dtype=np.int32)
    bare = Prompts(tokens, np.ones(tokens.shape, bool))
    prompts = {"bare": bare, "context": bare.replace(prefix_C=context)}
    unshared = np.concatenate([np.tile(context, (questions, 1)), tokens], axis=1)
    prompts["context_in_every_row"] = Prompts(unshared, np.ones(unshared.shape, bool))
    greedy, sampled = (SamplingConfig(RESPONSE, (), 0, temperature) for temperature in (0.0, 1.0))
    key, size = jax.random.key(0), decoding.batch_size(questions, BATCH, mesh)

    @jax.jit
    def rollout(params, prompts, ids):
        return sample(params, MODEL, sampled, prompts, rng.row_keys(key, ids))

    def make_rollout(view):
        first = map_rows(lambda rows: rows[:size], prompts[view])
        batch, ids = sharding.put_batch((first, np.arange(size, dtype=np.int32)), mesh)
        return lambda: jax.block_until_ready(rollout(params, batch, ids))

    with jax.set_mesh(mesh):
        evaluated = {
            f"{view}_evaluation": lambda view=view: decoding.decode(
                params, MODEL, greedy, prompts[view], key, size, mesh
            )
            for view in ("bare", "context")
        }
        seconds = best_of(runs, evaluated | {f"{view}_rollout": make_rollout(view) for view in prompts})
    made = {name: (questions if name in evaluated else size) * RESPONSE for name in seconds}
    rates = {name: made[name] / value for name, value in seconds.items()}
    result = {f"{name}_tokens_per_second": round(value) for name, value in rates.items()}
    for view in ("bare", "context"):
        result[f"{view}_to_rollout"] = round(rates[f"{view}_evaluation"] / rates[f"{view}_rollout"], 3)
    return result | {"batch": size, "questions": questions, "devices": jax.device_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="64 questions, one counted run of each")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    result = measure(64, 1) if options.quick else measure(QUESTIONS, 3)
    print(json.dumps({"benchmark": "evaluation", **result, "versions": {"jax": jax.__version__}}))


if __name__ == "__main__":
    main()
