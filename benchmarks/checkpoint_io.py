"""Measure the throughput of reading and writing model folders, compared with file copies; and the memory of reading.

    python benchmarks/checkpoint_io.py [--load] [--save] [--state] [--quick]

Reading: a Llama folder of random weights is copied (shutil.copyfile) and loaded, alternating. Before each run the files
are dropped from the operating system's cache (cold) or not (warm); medians count. A copy uses pages that the system
already has. For a fair comparison the process also keeps its allocated memory, and later loads reuse it: a virtual
machine may provide new memory (``new_memory_gb_per_second``) much more slowly than the load fills it.
``first_load_seconds`` includes new memory; this is what a run waits for. Memory is that of the first load: the peak
resident size of a separate process minus its size before. On a CPU this includes the loaded model; ``overhead_mib`` is
the rest. It must be at most ``allowed_mib``, the largest tensor plus a tenth of the model.

Writing: a random Llama of 2.6 GB in float32 (--quick: 0.8 GB) is in memory. Its folder is written as an export writes
it, in float32 and cast to bfloat16, and the files are copied. Runs alternate; the fastest of each counts. No run waits
for the disk (no fsync).

Checkpoints (--state): a training state of 1 GB (--quick: 0.1 GB), a third of it weights and the rest Adam's moments, is
saved as a run saves it. "blocking": until training can continue. "complete": until the state is on the disk. In
addition, rounds of 50 steps of configs/tiny.py (its batch and model, with random weights and prompts) each end with a
save that is waited for. A run trains during a save, so the save's share of the round is an upper bound of its cost.
Medians count.

Prints one JSON object as the last line. Recorded numbers: benchmarks/README.md. Needs Linux.
"""

import argparse
import functools
import json
import math
import mmap
import multiprocessing
import os
from pathlib import Path
import shutil
import statistics
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MIB = 2**20
FILE_BYTES = 512 * MIB
# Width, layers, MLP width, vocabulary; "full" is 2.0 GB in either dtype.
SIZES = {
    "full": {"float32": (2048, 4, 8192, 65536), "bfloat16": (2048, 12, 8192, 65536)},
    "quick": dict.fromkeys(("float32", "bfloat16"), (512, 8, 2048, 32768)),
}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def shapes(width: int, layers: int, mlp: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama checkpoint with an untied head and four query heads per key head."""
    kv = width // 4
    per_layer = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp),
    }  # fmt: skip
    result = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        result |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in per_layer.items()}
    return result | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}


def write_checkpoint(folder: Path, size: tuple[int, int, int, int], dtype: str) -> None:
    """Write random weights to several files, without the code that is measured."""
    width, layers, mlp, vocab = size
    fields = {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 256, "vocab_size": vocab,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    noise = np.random.default_rng(0).standard_normal(MIB, dtype=np.float32).astype(DTYPES[dtype])
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes(*size).items():
        if filled > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += math.prod(shape) * noise.itemsize
    weight_map = {}
    for number, names in enumerate(files):
        weight_map |= dict.fromkeys(names, f"model-{number:05d}.safetensors")
        tensors = {name: np.resize(noise, shapes(*size)[name]) for name in names}
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    for path in weight_files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(folder: Path) -> float:
    """Return the seconds of a copy of the weights to the same file system; the copy is then deleted."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        start = time.perf_counter()
        for path in weight_files(folder):
            shutil.copyfile(path, Path(target) / path.name)
        return time.perf_counter() - start


def status_mib(field: str) -> float:
    """Return a size from /proc/self/status, such as VmRSS, or VmHWM, the highest VmRSS since ``reset_peak``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def touch_seconds(size: int) -> float:
    """Return the seconds until the system has provided ``size`` bytes of memory, by writing one byte of each page."""
    with mmap.mmap(-1, size) as memory:
        start = time.perf_counter()
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 0
        return time.perf_counter() - start


def measure_loads(folder: Path, dtype: str, rounds: int) -> dict:
    """Measure loads and copies of a folder, alternating. Run it in a separate process."""
    import jax

    from ctxjax import sharding
    from ctxjax.models.hf import load as hf_load

    mesh = sharding.make_mesh(fsdp=jax.device_count())
    config = hf_load.read_config(folder)

    def load_seconds() -> tuple[float, int]:
        start = time.perf_counter()
        params = jax.block_until_ready(hf_load.load(folder, config, mesh, dtype))
        return time.perf_counter() - start, sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    before = status_mib("VmRSS")
    reset_peak()
    first, model_bytes = load_seconds()
    peak = status_mib("VmHWM") - before
    file_bytes = sum(path.stat().st_size for path in weight_files(folder))
    result = {
        "file_gb": round(file_bytes / 1e9, 2),
        "first_load_seconds": round(first, 2),
        "new_memory_gb_per_second": round(model_bytes / 1e9 / touch_seconds(model_bytes), 2),
    }
    for cache in ("warm", "cold"):
        seconds = {"copy": [], "load": []}
        for _ in range(rounds):
            for name, measure in (("copy", lambda: copy_seconds(folder)), ("load", lambda: load_seconds()[0])):
                if cache == "cold":
                    drop_from_cache(folder)
                seconds[name].append(measure())
        rates = {name: file_bytes / 1e9 / statistics.median(values) for name, values in seconds.items()}
        result[cache] = {f"{name}_gb_per_second": round(rate, 2) for name, rate in rates.items()}
        result[cache]["load_over_copy"] = round(rates["load"] / rates["copy"], 2)
    largest = config.vocab_size * config.width * np.dtype(DTYPES[dtype]).itemsize / MIB
    return result | {
        "peak_mib": round(peak),
        "model_mib": round(model_bytes / MIB),
        "overhead_mib": round(peak - model_bytes / MIB),
        "allowed_mib": round(largest + 0.1 * model_bytes / MIB),
    }


def measure_load(size: str, rounds: int) -> dict:
    """Measure reading, by "dtype in the files -> dtype in memory"."""
    os.environ |= KEEP_MEMORY  # read by the C library of new processes
    result = {}
    for stored, wanted in (("float32", ["float32"]), ("bfloat16", ["bfloat16", "float32"])):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), SIZES[size][stored], stored)
            for dtype in wanted:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    result[f"{stored}->{dtype}"] = pool.apply(measure_loads, (Path(folder), dtype, rounds))
                print(f"{stored}->{dtype}: {result[f'{stored}->{dtype}']}", flush=True)
    return result


def random_model(layers: int):
    """Return (weights, architecture). The weights are random, since pages that were never written are read too fast."""
    import jax

    from ctxjax import sharding
    from ctxjax.models import params as params_lib, transformer

    model = transformer.ModelConfig(32000, 2048, layers, query_heads=32, kv_heads=4, head_dim=64, mlp_width=5632)
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(fsdp=jax.device_count())
    abstract = params_lib.abstract(transformer.param_specs(model), mesh)
    return jax.tree.map(lambda leaf: jax.device_put(rng.random(leaf.shape, np.float32), leaf.sharding), abstract), model


def best_seconds(runs: int, functions: dict) -> dict[str, float]:
    """Return the time of the fastest run of each function, in seconds. A function gets the name of a new folder.

    Runs of the functions alternate. A first run of each does not count. Folders of earlier runs are deleted outside the
    measured time.
    """
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
    """Measure GB/s of the written bytes, for exports and plain copies."""
    import jax

    from ctxjax.host import workdir
    from ctxjax.models import params as params_lib, transformer
    from ctxjax.models.hf import llama, save as hf_save

    params, model = random_model(layers=2 if quick else 12)
    dtypes, size, functions = ("float32", "bfloat16"), {}, {}

    def save(dtype, folder):
        with workdir.new_folder(folder) as partial:
            hf_save.save_weights(partial, params, model, llama.FAMILY, dtype)

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


def measure_state(quick: bool) -> dict:
    """Measure the seconds of saving a large state, and what saving adds to the steps of a small one."""
    import jax
    import jax.numpy as jnp

    from ctxjax import sharding
    from ctxjax.training.checkpoint import Checkpoints
    from ctxjax.types import TrainState

    mesh = sharding.make_mesh(fsdp=jax.device_count())
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        rng, columns = np.random.default_rng(0), 2048
        rows = (100_000_000 if quick else 1_000_000_000) // 12 // columns // 8 * 8
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        weights, *moments = (jax.device_put(rng.random((rows, columns), np.float32), place) for _ in range(3))
        state = TrainState(jnp.int32(0), {"weights": weights}, tuple(moments), jax.random.key(0))
        checkpoints, times = Checkpoints(Path(folder), 1, {}), []
        for step in range(4):
            start = time.perf_counter()
            checkpoints.save(state, step, {})
            blocking = time.perf_counter() - start
            checkpoints.wait()
            times.append((blocking, time.perf_counter() - start))
        checkpoints.close()
        size = 3 * weights.nbytes / 1e9
    blocking, complete = (round(min(values), 2) for values in zip(*times[1:]))
    with jax.set_mesh(mesh):
        cost = saving_cost(mesh, rounds=1 if quick else 5)
    return {"state_gb": round(size, 2), "blocking_seconds": blocking, "complete_seconds": complete} | cost


def saving_cost(mesh, rounds: int, steps: int = 50) -> dict:
    """Measure ``steps`` steps of configs/tiny.py, and the save after them until it is complete, in seconds."""
    import jax

    from ctxjax import config as config_lib, sharding
    from ctxjax.configs import tiny
    from ctxjax.distill.sampling import SamplingConfig
    from ctxjax.distill.train_step import StepConfig, init_state, train_step
    from ctxjax.inputs.base_model import make_model_config
    from ctxjax.models import params as params_lib, transformer
    from ctxjax.training.checkpoint import Checkpoints
    from ctxjax.types import Batch, Frozen, Prompts

    config, rng = config_lib.experiment(tiny.get_config(), jax.device_count()), np.random.default_rng(0)
    model = make_model_config(config.base, 55)
    params = params_lib.init(transformer.param_specs(model), jax.random.key(0), mesh)
    sampling = SamplingConfig(config.rollout.max_tokens, (3,), 0, 1.0)
    step_config = StepConfig(model, model, sampling, config.arms["opcd"], config.optim)

    def prompts(columns):
        shape = (config.train.batch_size, columns)
        return Prompts(rng.integers(4, 55, shape, dtype=np.int32), np.ones(shape, bool))

    batch = Batch(prompts(10), prompts(18), None, np.arange(config.train.batch_size, dtype=np.int32))
    batch, frozen = sharding.put_batch(batch, mesh), Frozen(params)
    state = init_state(params, step_config, jax.random.key(0))
    state, _ = train_step(state, frozen, batch, config=step_config)
    seconds = {"steps": [], "save": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 2, {})
        checkpoints.save(state, 0, {})
        checkpoints.wait()
        for turn in range(1, rounds + 1):
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = train_step(state, frozen, batch, config=step_config)
            jax.block_until_ready(metrics)
            trained = time.perf_counter()
            checkpoints.save(state, turn, {})
            checkpoints.wait()
            seconds["steps"].append(trained - start)
            seconds["save"].append(time.perf_counter() - trained)
        checkpoints.close()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "steps_seconds": round(median["steps"], 3),
        "save_seconds": round(median["save"], 3),
        "saving_share_percent": round(100 * median["save"] / median["steps"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--load", action="store_true", help="measure reading only")
    parser.add_argument("--save", action="store_true", help="measure writing only")
    parser.add_argument("--state", action="store_true", help="measure checkpoints of a run only")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer runs")
    options = parser.parse_args()
    everything = not (options.load or options.save or options.state)
    result = {"benchmark": "checkpoint_io", "quick": options.quick, "cores": len(os.sched_getaffinity(0))}
    if everything or options.load:
        size, rounds = ("quick", 2) if options.quick else ("full", 3)
        result["load"] = measure_load(size, rounds)
    if everything or options.save:
        result["save"] = measure_save(options.quick)
    if everything or options.state:
        result["state"] = measure_state(options.quick)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
