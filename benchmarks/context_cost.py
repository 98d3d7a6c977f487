"""Measure the cost of a long context for an update: read in every row, or shared as one prefix.

    python benchmarks/context_cost.py [--quick]

It has two parts and prints one JSON object as the last line. Recorded numbers: benchmarks/README.md.

``cpu``: seconds of a whole update (the teacher's pass, both passes of the student, all gradients, the optimiser) for
contexts of several lengths, with a model that is small enough for a CPU. The teacher's keys and values of a shared
context are computed before, as in a run. Unshared updates with a context take minutes. So only ``ROWS_AT_A_TIME`` rows
are timed and the time is multiplied: all parts of an update except the optimiser are proportional to the rows.

``llama31_8b``: FLOPs of the same update at that model's sizes (batch 64, question 64, response 256), relative to the
update without a context. They are counted in the traced program, which allocates nothing: two for each multiply-add of
a matrix product, and loop bodies as often as they run. The compiler's own count takes a loop body once. For a program
whose loops run once, both counts must agree (``counted_over_compiled``).
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from ctxjax import sharding
from ctxjax.distill.flops import count_matmul_flops
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, init_state, update_step
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Batch, Frozen, Prompts, Rollout

SMALL = ModelConfig(512, 256, 2, 4, 2, 64, 704)
BATCH, QUESTION, RESPONSE, ROWS_AT_A_TIME = 32, 32, 64, 2
LLAMA31_8B = ModelConfig(
    128256, 4096, 32, 32, 8, 128, 14336, rope_theta=500000.0, dtype="bfloat16", remat="full"
)  # fmt: skip


def step_config(model: ModelConfig) -> StepConfig:
    """Return a step whose head chunks are longer than any response, so that the head's loop runs once."""
    optim = OptimConfig(lr=1e-5, steps=10)
    return StepConfig(model, model, SamplingConfig(RESPONSE, (), 0), LossConfig(beta=0.5, chunk=4096), optim)


def host_data(rows: int, question: int, response: int, context: int, shared: bool) -> tuple[Batch, Rollout]:
    """Make questions of equal length after the same context, which is a shared prefix or written into every row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (rows, question), dtype=np.int32)
    prefix_C = rng.integers(0, 512, context, dtype=np.int32)
    bare = Prompts(tokens, np.ones(tokens.shape, bool))
    with_context = bare
    if context and shared:
        with_context = bare.replace(prefix_C=prefix_C)
    elif context:
        all_tokens = np.concatenate([np.broadcast_to(prefix_C, (rows, context)), tokens], axis=1)
        with_context = Prompts(all_tokens, np.ones(all_tokens.shape, bool))
    answer = rng.integers(0, 512, (rows, response), dtype=np.int32)
    rollout = Rollout(answer, np.ones(answer.shape, bool), np.zeros(answer.shape, np.float32))
    return Batch(bare, with_context, None, np.arange(rows, dtype=np.int32)), rollout


def update(config: StepConfig):
    def run(state, teacher, batch, rollout, teacher_prefix):
        return update_step(state, Frozen(teacher, None, teacher_prefix), batch, rollout, None, config)

    return run


def seconds(context: int, shared: bool, runs: int, mesh) -> float:
    """Return the seconds of one update of BATCH rows, the fastest of several runs."""
    config = step_config(SMALL)
    params = params_lib.init(transformer.param_specs(SMALL), jax.random.key(0), mesh)
    rows = BATCH if shared or not context else ROWS_AT_A_TIME
    batch, rollout = sharding.put_batch(host_data(rows, QUESTION, RESPONSE, context, shared), mesh)
    state = init_state(params, config, jax.random.key(1))
    prefix = jax.jit(lambda p: transformer.prefix_kv(p, SMALL, batch.context.prefix_C))(params)
    program = jax.jit(update(config)).lower(state, params, batch, rollout, prefix).compile()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(state, params, batch, rollout, prefix))
        times.append(time.perf_counter() - start)
    return min(times) * BATCH / rows


def traced(model: ModelConfig, rows: int, question: int, response: int, context: int, shared: bool, mesh):
    """Trace the update from shapes."""
    config = step_config(model)
    params = params_lib.abstract(transformer.param_specs(model), mesh, jnp.float32)
    data = host_data(rows, question, response, context, shared)
    state = jax.eval_shape(lambda p: init_state(p, config, jax.random.key(1)), params)
    batch, rollout = jax.eval_shape(lambda: sharding.put_batch(data, mesh))
    prefix = jax.eval_shape(lambda p: transformer.prefix_kv(p, model, data[0].context.prefix_C), params)
    return jax.jit(update(config)).trace(state, params, batch, rollout, prefix)


def flops(model: ModelConfig, context: int, shared: bool, mesh) -> int:
    return count_matmul_flops(traced(model, 64, 64, 256, context, shared, mesh).jaxpr.jaxpr)


def counted_over_compiled(mesh) -> float:
    """Return this script's FLOPs over the compiler's, for a program whose loops run once."""
    model = dataclasses.replace(SMALL, layers=1)
    trace = traced(model, 2, 16, 16, 64, True, mesh)
    return count_matmul_flops(trace.jaxpr.jaxpr) / trace.lower().compile().cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the shortest and the longest context, one run of each")
    options = parser.parse_args()
    contexts = (0, 4096) if options.quick else (0, 512, 2048, 4096)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    result = {"benchmark": "context_cost", "jax": jax.__version__, "cpu": {}, "llama31_8b": {}}
    with jax.set_mesh(mesh):
        none = flops(LLAMA31_8B, 0, False, mesh)
        for context in contexts[1:]:
            shared, unshared = (flops(LLAMA31_8B, context, kind, mesh) / none for kind in (True, False))
            result["llama31_8b"][context] = {"shared": round(shared, 3), "unshared": round(unshared, 2)}
        result["counted_over_compiled"] = round(counted_over_compiled(mesh), 3)
        runs = 1 if options.quick else 2
        base = seconds(0, False, runs, mesh)
        result["cpu"][0] = {"seconds": round(base, 3)}
        small = count_matmul_flops(traced(SMALL, BATCH, QUESTION, RESPONSE, 0, False, mesh).jaxpr.jaxpr)
        for context in contexts[1:]:
            shared, unshared = (seconds(context, kind, runs, mesh) for kind in (True, False))
            counts = [
                count_matmul_flops(traced(SMALL, BATCH, QUESTION, RESPONSE, context, kind, mesh).jaxpr.jaxpr)
                for kind in (True, False)
            ]
            result["cpu"][context] = {
                "shared_seconds": round(shared, 3),
                "unshared_seconds": round(unshared, 3),
                "times_faster": round(unshared / shared, 2),
                "times_fewer_flops": round(counts[1] / counts[0], 2),
                "shared_over_no_context": round(shared / base, 2),
                "flops_over_no_context": round(counts[0] / small, 2),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
