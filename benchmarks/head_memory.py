"""Measure memory, arithmetic and time of the output head with the losses: chunked_head compared with a dense program.

    python benchmarks/head_memory.py [--quick]

Memory: both programs (loss and gradients of two hidden states and the shared head, for the distributions q_x, f and
q_c) are compiled for 4,096 response tokens, width 2,048 and a vocabulary of 128,256; the compiler reports the temporary
memory. Nothing of this size is run. Arithmetic: the compiler's count of operations; it counts a loop body once, so the
count of the loop is multiplied by its trips. Time: at a shape that fits the dense program; runs alternate, the fastest
of each counts. Prints one JSON object as the last line. Recorded numbers: benchmarks/README.md.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ctxjax import sharding
from ctxjax.distill import chunked_head, objective, terms
from ctxjax.distill.losses import LossConfig
from ctxjax.models.transformer import ModelConfig

VIEWS = ("q_x", "f", "q_c")


def program(implementation, batch: int, columns: int, width: int, vocab: int, chunk: int, dtype: str):
    """Return (jitted value_and_grad, its abstract arguments)."""
    model = ModelConfig(vocab, width, 1, 1, 1, width, width)
    used = objective.terms(LossConfig(beta=0.5))  # L_distill and L_anchor
    function = functools.partial(terms.token_values, used, (model, model), 1.0)

    def loss(trained, teacher, weight_BxT, tokens_BxT):
        hidden = {"q_x": trained["q_x"], "f": teacher["hidden"], "q_c": trained["q_c"]}
        heads = {"q_x": trained["head"], "f": teacher["head"], "q_c": trained["head"]}
        weights = {"distill": weight_BxT, "anchor": 0.5 * weight_BxT}
        return implementation(function, chunk, hidden, heads, weights, weight_BxT > 0, tokens_BxT)[0]

    mesh = jax.sharding.get_mesh()
    rows, head_sharding = (NamedSharding(mesh, spec) for spec in (sharding.batch_spec(), jax.P(None, "tensor")))
    hidden = jax.ShapeDtypeStruct((batch, columns, width), dtype, sharding=rows)
    head = jax.ShapeDtypeStruct((width, vocab), dtype, sharding=head_sharding)
    per_token = functools.partial(jax.ShapeDtypeStruct, (batch, columns), sharding=rows)
    arguments = ({"q_x": hidden, "q_c": hidden, "head": head}, {"hidden": hidden, "head": head})
    return jax.jit(jax.value_and_grad(loss)), (*arguments, per_token(jnp.float32), per_token(jnp.int32))


def compiled_facts(implementation, trips: int, *shape) -> dict:
    function, arguments = program(implementation, *shape)
    compiled = function.lower(*arguments).compile()
    flops = compiled.cost_analysis()["flops"]
    return {"temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30, "teraflop": trips * flops / 1e12}


def random_arguments(arguments) -> list:
    """Return values for ``program``'s abstract arguments: noise, equal weights, token 0."""
    *trained_and_teacher, weights, tokens = arguments
    leaves, tree = jax.tree.flatten(trained_and_teacher)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [jax.random.normal(key, leaf.shape, leaf.dtype) / 4 for key, leaf in zip(keys, leaves)]
    values = [*jax.tree.unflatten(tree, noise), jnp.full(weights.shape, 1 / weights.size), jnp.zeros_like(tokens)]
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, list(arguments))


def seconds(runs: int, *shape) -> dict[str, float]:
    """Return the time of the fastest run of each program. Runs alternate; a first run of each does not count."""
    programs = {name: program(getattr(chunked_head, name), *shape) for name in ("dense", "chunked")}
    values = random_arguments(programs["dense"][1])
    times = {name: [] for name in programs}
    for run in range(runs + 1):
        for name, (function, _) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*values))
            if run:
                times[name].append(time.perf_counter() - start)
    return {name: min(results) for name, results in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small shape for the time, two runs")
    options = parser.parse_args()
    batch, columns, width, vocab, chunk = 8, 512, 2048, 128256, 8
    fit = (8, 64, 256, 8192, 8) if options.quick else (8, 128, 512, 32768, 8)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        shape = (batch, columns, width, vocab)
        facts = {
            "dense": compiled_facts(chunked_head.dense, 1, *shape, chunk, "float32"),
            "chunked": compiled_facts(chunked_head.chunked, columns // chunk, *shape, chunk, "float32"),
        }
        times = seconds(2 if options.quick else 5, *fit, "float32")
    ratios = {
        "temporary_memory": facts["chunked"]["temporary_gib"] / facts["dense"]["temporary_gib"],
        "arithmetic": facts["chunked"]["teraflop"] / facts["dense"]["teraflop"],
        "time": times["chunked"] / times["dense"],
    }
    report = {
        "benchmark": "head_memory",
        "chunked_over_dense": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "tokens": batch * columns, "width": width, "vocabulary": vocab, "chunk_tokens": batch * chunk,
        **{name: {key: round(value, 3) for key, value in fact.items()} for name, fact in facts.items()},
        "seconds": {name: round(value, 3) for name, value in times.items()},
        "timed_shape": dict(zip(("batch", "columns", "width", "vocabulary", "chunk"), fit)),
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
