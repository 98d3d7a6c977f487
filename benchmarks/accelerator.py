"""Measure the parts of a step on one accelerator, at the sizes of Llama-3.2-1B, and compare with the chip's own rates.

    python -m benchmarks.accelerator [--quick] [--parts attention,head,sampler,step]

Needs only jax, flax and optax, and runs on any platform; ``--quick`` uses sizes for a CPU. Weights are random, and
responses have no end token. Each part is compiled, run once, and then timed; the fastest of several runs counts.

machine    FLOP/s of bfloat16 matrix products and bytes/s of a copy (read and written), measured in the same run
attention  forward and backward pass of the reference path and of the platform's kernel (model.attention), the last
           one behind a shared prefix, at the step's sizes. For both in bfloat16: distance of the output and of the
           gradients (queries, keys, values, the prefix's keys and values) from the reference path in float32, relative
           to its norm
head       loss and gradients of three distributions (losses.py), with all logits at once and in chunks of tokens
sampler    tokens/s, and the share of the floor: the time to read the weights and the filled cache of all rows once per
           token, at the copy's rate, and the time of the prompts' arithmetic
step       milliseconds of rollout and update of an anchored step with a shared context; and the update's share of the
           matrix rate, by the arithmetic of its trace (which has the recomputed forward pass)

Prints one JSON object as the last line. Recorded numbers: benchmarks/README.md.
"""

import argparse
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import context_cost, head_memory
from ctxjax import rng, sharding
from ctxjax.distill import chunked_head
from ctxjax.distill.flops import count_matmul_flops
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.distill.train_step import StepConfig, init_state, rollout_step, update_step
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.attention import choose_kind, self_attention
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Frozen, PrefixKV, Prompts

LLAMA32_1B = ModelConfig(
    128256, 2048, 16, 32, 8, 64, 8192, rope_theta=500000.0, tied_embeddings=True, dtype="bfloat16", remat="full",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """``columns``: sequence lengths for attention, each with ``tokens`` tokens in total. ``prompt``, ``new`` and
    ``context`` are in tokens, ``batches`` in rows."""

    model: ModelConfig
    product: int
    copied: int
    columns: tuple[int, ...]
    tokens: int
    head_tokens: int
    chunks: tuple[int, ...]
    batches: tuple[int, ...]
    prompt: int
    new: int
    step_batch: int
    context: int
    runs: int


FULL = Sizes(LLAMA32_1B, 8192, 2**30, (512, 2048, 8192), 16384, 4096, (256, 1024), (64, 256), 512, 256, 32, 2048, 5)
QUICK = Sizes(
    dataclasses.replace(LLAMA32_1B, vocab_size=512, width=128, layers=2, query_heads=4, kv_heads=2, mlp_width=256),
    512, 2**20, (256,), 512, 128, (64,), (8,), 32, 16, 4, 64, 2,
)  # fmt: skip


def seconds(runs: int, program, *arguments) -> float:
    """Return the time of the fastest run; one run before is not counted."""
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def machine(sizes: Sizes) -> dict:
    a, b = (jax.random.normal(jax.random.key(i), (sizes.product,) * 2, jnp.bfloat16) for i in range(2))
    x = jax.random.normal(jax.random.key(2), (sizes.copied,), jnp.bfloat16)
    product = 2 * sizes.product**3 / seconds(sizes.runs, jax.jit(jnp.matmul), a, b)
    return {
        "tflops": product / 1e12,
        "copy_gb_per_second": 2 * x.nbytes / seconds(sizes.runs, jax.jit(jnp.negative), x) / 1e9,
    }


def attention(sizes: Sizes) -> dict:
    shapes = [(max(1, sizes.tokens // columns), columns, 0) for columns in sizes.columns]
    shapes.append((sizes.step_batch, sizes.prompt // 4 + sizes.new - 1, sizes.context))  # of the step's passes
    return {
        f"{rows}x{columns}" + (f" behind {prefix}" if prefix else ""): attention_of(sizes, rows, columns, prefix)
        for rows, columns, prefix in shapes
    }


def attention_of(sizes: Sizes, rows: int, columns: int, prefix_columns: int) -> dict:
    model = sizes.model
    shapes = [(rows, heads, columns, model.head_dim) for heads in (model.query_heads, model.kv_heads, model.kv_heads)]
    *qkv, d_out = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([*shapes, shapes[0]]))
    start_B = np.random.default_rng(0).integers(0, columns // 4, rows)
    real_BxL = jnp.asarray(np.arange(columns) >= start_B[:, None])
    d_out = jnp.where(real_BxL[:, None, :, None], d_out, 0)
    heads = sharding.batch_spec("heads", None, None)
    d_out, *qkv = (jax.reshard(x, heads) for x in (d_out, *qkv))
    real_BxL = jax.reshard(real_BxL, sharding.batch_spec(None))
    prefix = None
    if prefix_columns:
        shape, place = (model.kv_heads, prefix_columns, model.head_dim), sharding.weight_spec(("kv_heads", None, None))
        prefix = PrefixKV(*(jax.reshard(jax.random.normal(jax.random.key(i), shape), place) for i in (4, 5)))

    def both(kind, d_out, real_BxL, q, k, v, prefix):
        masked = lambda q, k, v, prefix: jnp.where(  # noqa: E731
            real_BxL[:, None, :, None], self_attention(kind, q, k, v, real_BxL, prefix), 0
        )
        out, back = jax.vjp(masked, q, k, v, prefix)
        return out, back(d_out.astype(out.dtype))

    kinds = {"reference": "reference", "auto": model.attention}
    programs = {name: jax.jit(functools.partial(both, kind)) for name, kind in kinds.items()}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (*qkv, prefix))
    times = {kind: seconds(sizes.runs, program, d_out, real_BxL, *half) for kind, program in programs.items()}
    with jax.default_matmul_precision("highest"):
        exact = programs["reference"](d_out, real_BxL, *jax.tree.map(lambda x: x.astype(jnp.float32), half))
    far = {}
    for kind, program in programs.items():
        pairs = zip(jax.tree.leaves(program(d_out, real_BxL, *half)), jax.tree.leaves(exact), strict=True)
        far[kind] = [float(jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())) for x, y in pairs]
    return {
        **{f"{kind}_ms": 1000 * value for kind, value in times.items()},
        "times_faster": times["reference"] / times["auto"],
        **{f"{kind}_error_of_output_and_gradients": errors for kind, errors in far.items()},
    }


def head(sizes: Sizes) -> dict:
    batch, result = 32, {}
    columns = sizes.head_tokens // batch
    shape = (batch, columns, sizes.model.width, sizes.model.vocab_size)
    for name, chunk in [("dense", columns), *((f"chunks_of_{tokens}", tokens // batch) for tokens in sizes.chunks)]:
        implementation = chunked_head.dense if name == "dense" else chunked_head.chunked
        program, arguments = head_memory.program(implementation, *shape, chunk, "bfloat16")
        compiled = program.lower(*arguments).compile()
        result[name] = {
            "ms": 1000 * seconds(sizes.runs, compiled, *head_memory.random_arguments(arguments)),
            "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        }
    # The logits of three distributions, and the gradients of two with respect to hidden states and head.
    result["product_teraflop"] = (3 + 4) * 2 * sizes.head_tokens * sizes.model.width * sizes.model.vocab_size / 1e12
    return result


def sampler(sizes: Sizes, rates: dict) -> dict:
    model, mesh, result = sizes.model, jax.sharding.get_mesh(), {}
    params = params_lib.init(transformer.param_specs(model), jax.random.key(0), mesh)
    config = SamplingConfig(sizes.new, eos_ids=(), pad_id=0)
    program = jax.jit(
        lambda params, prompts, rows: sample(params, model, config, prompts, rng.row_keys(jax.random.key(0), rows))
    )
    weights = params_lib.count(transformer.param_specs(model))
    for batch in sizes.batches:
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, sizes.prompt), dtype=np.int32)
        prompts = sharding.put_batch(Prompts(tokens, np.ones(tokens.shape, bool)), mesh)
        rows = sharding.put_batch(np.arange(batch, dtype=np.int32), mesh)
        taken = seconds(max(1, sizes.runs // 2), program, params, prompts, rows)
        cache = 4 * model.layers * model.kv_heads * model.head_dim * (sizes.prompt + sizes.new / 2) * batch
        reading = 2 * (weights - model.vocab_size * model.width) * batch * sizes.prompt / rates["tflops"] / 1e12
        floor = reading + sizes.new * (2 * weights + cache) / rates["copy_gb_per_second"] / 1e9
        result[f"batch_{batch}"] = {
            "tokens_per_second": batch * sizes.new / taken, "ms_per_token": 1000 * taken / sizes.new,
            "share_of_floor": floor / taken,
        }  # fmt: skip
    return result | {"prompt": sizes.prompt, "new": sizes.new}


def step(sizes: Sizes, rates: dict) -> dict:
    mesh, question, response = jax.sharding.get_mesh(), sizes.prompt // 4, sizes.new
    config = StepConfig(
        sizes.model, sizes.model, SamplingConfig(response, (), 0), LossConfig(beta=0.5), OptimConfig(lr=1e-5, steps=10)
    )
    params = params_lib.init(transformer.param_specs(sizes.model), jax.random.key(0), mesh)
    batch, _ = sharding.put_batch(
        context_cost.host_data(sizes.step_batch, question, response, sizes.context, True), mesh
    )
    state = init_state(params, config, jax.random.key(1))
    prefix = jax.jit(lambda p: transformer.prefix_kv(p, sizes.model, batch.context.prefix_C))(params)
    frozen = Frozen(params, None, prefix)
    sampled = jax.jit(lambda state, frozen, batch: rollout_step(state, frozen, batch, config)[0])
    rollout = sampled(state, frozen, batch)
    result = {"rollout_ms": 1000 * seconds(1, sampled, state, frozen, batch)}

    update = jax.jit(
        lambda state, frozen, batch, rollout: update_step(state, frozen, batch, rollout, None, config), donate_argnums=0
    )
    trace = update.trace(state, frozen, batch, rollout)
    flops, compiled = count_matmul_flops(trace.jaxpr.jaxpr), trace.lower().compile()
    times = []
    for _ in range(1 + sizes.runs):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch, rollout))
        times.append(time.perf_counter() - start)
    best = min(times[1:])
    if not np.isfinite(metrics["loss"]) or metrics["skipped"]:
        raise RuntimeError(f"the step's loss is {metrics['loss']}")
    return result | {
        "update_ms": 1000 * best, "teraflop": flops / 1e12,
        "share_of_matrix_rate": flops / best / rates["tflops"] / 1e12,
        "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "batch": sizes.step_batch, "question": question, "response": response, "context": sizes.context,
    }  # fmt: skip


def rounded(tree):
    return jax.tree.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x, tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="sizes for a CPU")
    parser.add_argument("--parts", default="attention,head,sampler,step", help="parts to run, in this order")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    device = jax.devices()[0]
    kind = choose_kind("auto", sizes.model, device)
    sizes = dataclasses.replace(sizes, model=dataclasses.replace(sizes.model, attention=kind))
    result = {"benchmark": "accelerator", "jax": jax.__version__, "device": device.device_kind}
    with jax.set_mesh(sharding.make_mesh(devices=[device])):
        rates = result["machine"] = machine(sizes)
        parts = {
            "attention": functools.partial(attention, sizes), "head": functools.partial(head, sizes),
            "sampler": functools.partial(sampler, sizes, rates), "step": functools.partial(step, sizes, rates),
        }  # fmt: skip
        for name in options.parts.split(","):
            start = time.perf_counter()
            result[name] = parts[name]()
            print(name, f"{time.perf_counter() - start:.0f} s", json.dumps(rounded(result[name])), flush=True)
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
