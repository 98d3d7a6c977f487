"""Measure how the time to compile the training step depends on the model's depth.

    python benchmarks/compile_depth.py [--quick]

The whole step with the anchor (sampling loop, teacher and student passes, losses, gradient, AdamW) is traced and
compiled from shapes for models that differ only in depth, on all devices along "fsdp". The time is processor time,
which does not depend on the load of the machine. The compile cache is off. Prints one JSON object as the last line.
Recorded numbers: benchmarks/README.md.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from ctxjax import sharding
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, init_state, train_step
from ctxjax.models import params as params_lib
from ctxjax.models.transformer import ModelConfig, param_specs
from ctxjax.types import Batch, Frozen, Prompts

ROWS, PROMPT, RESPONSE = 8, 32, 64


def seconds(layers: int, mesh) -> dict[str, float]:
    """Return the processor seconds to trace and to compile the step of a model of this depth."""
    model = ModelConfig(512, 64, layers, 4, 2, 16, 128, remat="full")
    sampling, loss, optim = SamplingConfig(RESPONSE, (1,), 0), LossConfig(beta=0.5), OptimConfig(1e-3, 10)
    config = StepConfig(model, model, sampling, loss, optim)
    params = params_lib.abstract(param_specs(model), mesh)
    state = jax.eval_shape(lambda params: init_state(params, config, jax.random.key(0)), params)

    def rows(*rest, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((ROWS, *rest), dtype, sharding=jax.NamedSharding(mesh, sharding.batch_spec()))

    prompts = Prompts(rows(PROMPT), rows(PROMPT, dtype=jnp.bool))
    batch = Batch(prompts, prompts, None, rows())
    start = time.process_time()
    lowered = train_step.lower(state, Frozen(params), batch, config=config)
    traced = time.process_time()
    lowered.compile()
    return {"trace": traced - start, "compile": time.process_time() - traced}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the two depths of record only")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(fsdp=jax.device_count())
    with jax.set_mesh(mesh):
        seconds(1, mesh)  # warm-up: work that is done once per process
        times = {layers: seconds(layers, mesh) for layers in ((4, 32) if options.quick else (4, 8, 32, 80))}
    total = {layers: sum(parts.values()) for layers, parts in times.items()}
    report = {
        "benchmark": "compile_depth",
        "layers_32_over_4": round(total[32] / total[4], 3),
        "processor_seconds": {n: {k: round(v, 2) for k, v in parts.items()} for n, parts in times.items()},
        "devices": jax.device_count(), "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
