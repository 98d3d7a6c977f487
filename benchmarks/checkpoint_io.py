"""Bytes per second of writing a model folder, beside a plain copy of the same files.

    python benchmarks/checkpoint_io.py [--quick]

A random Llama of 2.6 GB in float32 (--quick: 0.8 GB) lies in memory; its folder is written as an export writes it,
as it is and cast to bfloat16, and the folder's files are copied with ``shutil.copyfile`` (their source in the page
cache, as the weights are in memory). Nobody waits for the disk itself (no fsync). Runs alternate and the best of each
counts. Prints one JSON object as the last line; the numbers of record stand in benchmarks/README.md.
"""

import argparse
import functools
import json
import os
from pathlib import Path
import shutil
import tempfile
import time

import jax
import numpy as np

from ctxjax import sharding
from ctxjax.models import hf_save, llama, params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params


def random_model(layers: int) -> tuple[Params, ModelConfig]:
    """Weights on one device; values matter little, but pages that were never written would be read too fast."""
    model = ModelConfig(32000, 2048, layers, query_heads=32, kv_heads=4, head_dim=64, mlp_width=5632)
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(fsdp=jax.device_count())
    abstract = params_lib.abstract(transformer.param_specs(model), mesh)
    return jax.tree.map(lambda leaf: jax.device_put(rng.random(leaf.shape, np.float32), leaf.sharding), abstract), model


def best_seconds(runs: int, functions: dict) -> dict[str, float]:
    """Seconds of the fastest run of each function of a new folder's name, the functions taking turns; one run of each
    goes before, uncounted. Folders of earlier runs are removed outside the time."""
    times = {name: [] for name in functions}
    with tempfile.TemporaryDirectory() as root:
        for run in range(runs + 1):
            for name, function in functions.items():
                shutil.rmtree(Path(root) / name, ignore_errors=True)
                start = time.perf_counter()
                function(Path(root) / name)
                if run:
                    times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def measure_save(quick: bool) -> dict:
    """GB/s of the bytes written: exports and plain copies."""
    params, model = random_model(layers=2 if quick else 12)
    dtypes, size, functions = ("float32", "bfloat16"), {}, {}

    def save(dtype, folder):
        with hf_save.new_folder(folder) as partial:
            hf_save.save_weights(partial, params, model, llama, dtype)

    def copy(dtype, folder):
        folder.mkdir()
        for path in folder.with_name(f"save_{dtype}").iterdir():
            shutil.copyfile(path, folder / path.name)

    for dtype in dtypes:
        size[dtype] = params_lib.count(transformer.param_specs(model)) * jax.numpy.dtype(dtype).itemsize / 1e9
        functions[f"save_{dtype}"] = functools.partial(save, dtype)
        functions[f"copy_{dtype}"] = functools.partial(copy, dtype)
    seconds = best_seconds(1 if quick else 3, functions)
    result = {"gigabytes": {dtype: round(value, 3) for dtype, value in size.items()}}
    for dtype, value in size.items():
        result[f"save_{dtype}_gb_per_second"] = round(value / seconds[f"save_{dtype}"], 3)
        result[f"copy_{dtype}_gb_per_second"] = round(value / seconds[f"copy_{dtype}"], 3)
        result[f"share_of_copy_{dtype}"] = round(seconds[f"copy_{dtype}"] / seconds[f"save_{dtype}"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, one counted run of each")
    options = parser.parse_args()
    machine = {"cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps({"benchmark": "checkpoint_io", "save": measure_save(options.quick), "machine": machine}))


if __name__ == "__main__":
    main()
