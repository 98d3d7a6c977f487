"""Measure the sampler's tokens per second, compared with transformers, google-tunix and the machine's limits.

    python -m benchmarks.sampler [--quick] [--devices=N]

All (``generate`` of transformers too) sample at temperature 1, in float32 on the CPU, from the same random folder and
the same batch of full-length prompts, to the same length (no end token). Runs alternate, since the machine may be
shared; the fastest of each counts. The floor is the larger of two times:

    FLOPs   2 * parameters (without the embedding) for each token that is read or sampled, and 4 * query width * length
            for attention
    bytes   in each step, the weights once and the filled part of the cache of all rows once

divided by this machine's rates of matrix products and of reading, which are measured in the same run. For the prompts
only the arithmetic counts. ctxjax decodes rows in parallel on one CPU device per core, since decoding consists of many
small operations that gain little from threads. ``--devices=1`` uses one device, as google-tunix does. torch (extra
"parity") and google-tunix (benchmarks/tunix_sampler.py) are optional; without them their columns are missing.

A second part ("ending", alone with ``--only=ending``) samples responses of different lengths, a quarter of the limit on
average, and compares the sampler with one that keeps all rows in the batch to the end: row-steps, that is, rows summed
over all columns, each divided by the number of sampled tokens, and times. Prints one JSON object as the last line.
Recorded numbers: benchmarks/README.md.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ctxjax import rng, sharding
from ctxjax.data.worlds import word_tokenizer
from ctxjax.distill import sampling
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.hf import save as hf_save
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Prompts

BATCH = 64
SHAPES = {
    "tiny": (ModelConfig(55, 128, 4, 4, 2, 32, 352), 18, 19),
    "w256_l6_v4096": (ModelConfig(4096, 256, 6, 4, 2, 64, 704), 64, 128),
}
LIMITS = (64, 128, 256)  # max_tokens of the second part


def best_of(runs: int, functions: dict) -> dict[str, float]:
    """Return the time of the fastest run of each function. Runs alternate; a first run of each does not count."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            time.sleep(0.3)  # torch's threads stay active for a while after a call and would slow the next function
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def machine_rates() -> tuple[float, float]:
    """Return (FLOP/s of a float32 matrix product, bytes/s read when all devices sum their parts of a large array)."""
    a = jnp.ones((2048, 2048), jnp.float32)
    parts = [jax.device_put(jnp.ones((32 * 2**20,), jnp.float32), device) for device in jax.devices()]
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    times = best_of(
        3,
        {
            "product": lambda: product(a, a).block_until_ready(),
            "read": lambda: jax.block_until_ready([total(part) for part in parts]),
        },
    )
    return 2 * 2048**3 / times["product"], sum(part.nbytes for part in parts) / times["read"]


def floor_seconds(model: ModelConfig, prompt: int, new: int, rates: tuple[float, float]) -> float:
    """Return the least time for reading the prompts and sampling ``new`` tokens, by arithmetic and memory traffic."""
    head = model.vocab_size * model.width
    parameters = params_lib.count(transformer.param_specs(model)) - head  # an embedding is looked up, not multiplied
    attention = 4 * model.layers * model.query_heads * model.head_dim
    filled = prompt + new / 2
    prompt_flops = prompt * (2 * (parameters - head) + attention * prompt / 2) * BATCH
    token_flops = (2 * parameters + attention * filled) * BATCH
    cache = 2 * model.layers * model.kv_heads * model.head_dim * filled * BATCH * 4
    return prompt_flops / rates[0] + new * max(token_flops / rates[0], (4 * parameters + cache) / rates[1])


def measure(model: ModelConfig, prompt: int, new: int, runs: int, rates: tuple[float, float]) -> dict:
    mesh = sharding.make_mesh(data=jax.device_count())
    words = [f"w{i}" for i in range(model.vocab_size - len(word_tokenizer.SPECIAL))]
    tokenizer = word_tokenizer.build(words, r"\S+")
    params = params_lib.init(transformer.param_specs(model), jax.random.key(0), mesh)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (BATCH, prompt), dtype=np.int32)
    with jax.set_mesh(mesh):
        prompts = sharding.put_batch(Prompts(tokens, np.ones(tokens.shape, bool)), mesh)
        rows = sharding.put_batch(np.arange(BATCH, dtype=np.int32), mesh)
        config = SamplingConfig(new, eos_ids=(), pad_id=0)
        program = jax.jit(
            lambda params, prompts, rows: sample(params, model, config, prompts, rng.row_keys(jax.random.key(0), rows))
        )
        functions = {"ctxjax": lambda: jax.block_until_ready(program(params, prompts, rows))}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            hf_save.save(path, params, model, tokenizer, (tokenizer.eos_token_id,), model_type="llama")
            if importlib.util.find_spec("torch"):
                functions["transformers"] = transformers_generate(path, tokens, new)
            if importlib.util.find_spec("tunix"):
                from benchmarks.tunix_sampler import tunix_generate

                functions["tunix"] = tunix_generate(path, model, tokens, new)
            seconds = best_of(runs, functions)
    result = {f"{name}_tokens_per_second": round(BATCH * new / value) for name, value in seconds.items()}
    others = [name for name in seconds if name != "ctxjax"]
    result |= {f"times_{name}": round(seconds[name] / seconds["ctxjax"], 2) for name in others}
    result["share_of_floor"] = round(floor_seconds(model, prompt, new, rates) / seconds["ctxjax"], 3)
    return result | {"batch": BATCH, "prompt_tokens": prompt, "new_tokens": new}


def count_row_steps(lengths_WxR: np.ndarray, max_tokens: int) -> int:
    """Return the sum over all response columns of the rows that the sampler computes, for responses of these lengths,
    R on each of W devices."""
    devices, rows = lengths_WxR.shape
    sizes = np.array([0, *sorted(sampling.row_limits(rows, max_tokens))[1:], rows])
    unfinished_TxW = (lengths_WxR > np.arange(max_tokens)[:, None, None]).sum(axis=2)
    return int(sizes[np.searchsorted(sizes, unfinished_TxW.max(axis=1))].sum() * devices)


def draw_lengths(devices: int, rows: int, max_tokens: int, seed: int = 0) -> np.ndarray:
    """Return lengths [devices, rows] of responses in which each token is the last with probability 4 / max_tokens."""
    random = np.random.default_rng(seed)
    return np.minimum(random.geometric(4 / max_tokens, size=(devices, rows)), max_tokens)


def count_ending(devices: int, rows: int, max_tokens: int, batches: int = 100) -> tuple[float, float]:
    """Return the row-steps per token of ``batches`` batches, with all rows in the batch to the end, and as sampled."""
    drawn = [draw_lengths(devices, rows, max_tokens, seed) for seed in range(batches)]
    tokens = sum(int(lengths.sum()) for lengths in drawn)
    whole = sum(lengths.size * int(lengths.max()) for lengths in drawn)
    return whole / tokens, sum(count_row_steps(lengths, max_tokens) for lengths in drawn) / tokens


def measure_ending(model: ModelConfig, prompt: int, max_tokens: int, runs: int) -> dict:
    """Compare the sampler with one that keeps all rows, on responses that end early and on responses that do not."""
    mesh = sharding.make_mesh(data=jax.device_count())
    params = params_lib.init(transformer.param_specs(model), jax.random.key(0), mesh)
    params |= {"embedding": params["embedding"] * 0}  # all tokens are equally likely, so the lengths are geometric
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (BATCH, prompt), dtype=np.int32)
    result, functions = {}, {}
    with jax.set_mesh(mesh):
        arguments = (
            params,
            *sharding.put_batch((Prompts(tokens, np.ones(tokens.shape, bool)), np.arange(BATCH, dtype=np.int32)), mesh),
        )
        for lengths, ends in (("geometric", 4 * model.vocab_size // max_tokens), ("equal", 0)):
            config = SamplingConfig(max_tokens, eos_ids=tuple(range(ends)), pad_id=0)
            for rows in ("fewer rows", "all rows"):
                limits = (lambda *_: [0]) if rows == "all rows" else sampling.row_limits
                with mock.patch.object(sampling, "row_limits", limits):
                    start = time.process_time()
                    program = (
                        jax.jit(
                            lambda *a, c=config: sample(a[0], model, c, a[1], rng.row_keys(jax.random.key(0), a[2]))
                        )
                        .lower(*arguments)
                        .compile()
                    )
                result[f"{rows}: CPU seconds to compile"] = round(time.process_time() - start, 1)
                functions[lengths, rows] = lambda program=program: jax.block_until_ready(program(*arguments))
            drawn = np.asarray(functions[lengths, "fewer rows"]().mask_BxT.sum(axis=1))
            split = drawn.reshape(jax.device_count(), -1)
            result[f"{lengths}: row-steps per token"] = [
                round(steps / int(drawn.sum()), 3)
                for steps in (BATCH * int(drawn.max()), count_row_steps(split, max_tokens))
            ]
        seconds = best_of(runs, functions)
    for lengths in ("geometric", "equal"):
        result[f"{lengths}: time of all rows / of fewer rows"] = round(
            seconds[lengths, "all rows"] / seconds[lengths, "fewer rows"], 2
        )
    return result | {"batch": BATCH, "prompt_tokens": prompt, "max_tokens": max_tokens}


def transformers_generate(path: Path, tokens: np.ndarray, new: int):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor(tokens, dtype=torch.long)

    def run():
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=new, max_new_tokens=new,
            )  # fmt: skip
        if out.shape[1] != tokens.shape[1] + new:
            raise RuntimeError(f"transformers made {out.shape[1] - tokens.shape[1]} tokens instead of {new}")

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one counted run of each")
    parser.add_argument("--devices", type=int, default=len(os.sched_getaffinity(0)), help="CPU devices")
    parser.add_argument("--only", choices=("ending",), help="only this part")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    rates = machine_rates()
    runs, results = 1 if options.quick else 10, {}
    if options.only != "ending":
        results = {name: measure(model, prompt, new, runs, rates) for name, (model, prompt, new) in SHAPES.items()}
    model, prompt, new = SHAPES["w256_l6_v4096"]
    results["ending"] = measure_ending(model, prompt, new, runs)
    results["ending"]["row-steps per token by max_tokens, all rows and fewer rows"] = {
        limit: [round(steps, 2) for steps in count_ending(1, BATCH, limit)] for limit in LIMITS
    }
    versions = {"jax": jax.__version__}
    if importlib.util.find_spec("torch"):
        import torch
        import transformers

        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if importlib.util.find_spec("tunix"):
        versions["tunix"] = importlib.metadata.version("google-tunix")
    machine = {"gflops": round(rates[0] / 1e9, 1), "read_gb_per_second": round(rates[1] / 1e9, 1)}
    machine["devices"] = options.devices
    print(json.dumps({"benchmark": "sampler", **results, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
