"""Fixtures of all tests. The suite runs on the CPU, which stands in for eight devices; commands that tests start
inherit how it compiles, and take the devices that their configurations say."""

import contextlib
import functools
import gc
from importlib.metadata import version
import os
from pathlib import Path
import subprocess

# Before the first import of jax. Tests run programs once and compile many: without optimisation, and with the older
# code generator, which XLA's successors may not know, compiling takes a fifth of the time.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["JAX_PLATFORMS"] = "cpu"
for flag in FLAGS:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Nothing of a program for one device is divided, but XLA's partitioner takes a third of the time of compiling it.
os.environ.setdefault("JAX_USE_SHARDY_PARTITIONER", "0")
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that live on, and looking through them takes long

from hypothesis import given, settings, strategies  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from ctxjax.models import params as params_lib  # noqa: E402
from ctxjax.models.transformer import ModelConfig, param_specs  # noqa: E402
from ctxjax.sharding import make_mesh  # noqa: E402
from ctxjax.types import Prompts, Rollout  # noqa: E402

if version("jaxlib").startswith("0.10."):
    # Every value is lowered with a note of where it lies: two fifths of a program, and of no effect on one device.
    from jax._src.interpreters import mlir

    _noted = mlir.lower_with_sharding_in_types

    def _noted_where_divided(ctx, op, aval):
        return op if aval.sharding.mesh.size == 1 else _noted(ctx, op, aval)

    mlir.lower_with_sharding_in_types = _noted_where_divided
    # One context for all programs: each makes its own, of a megabyte, which lives on with what is cached of it.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)  # keys are made of programs even where nothing is kept
ALL_DEVICES = jax.devices()


# Two workers share out the files in this order, the others last, and end at about the same time.
LONGEST = ["run", "processes", "train_step", "mesh", "chaos", "notebook", "prefix", "objective", "faults", "evaluate"]


def pytest_collection_modifyitems(items):
    place = {f"{name}_test": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_sessionfinish():
    gc.freeze()  # pytest looks through everything five times, for objects that fail as they are deleted


@pytest.fixture(scope="session", autouse=True)
def commands_have_no_torch():
    """In the processes that tests start. Not set before pytest's own workers have started, which have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("without_torch")), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_objects_when_hypothesis_begins():
    """It looks through all objects of the process when it is first used: for seconds, after some hundred tests."""
    settings(max_examples=1, database=None)(given(strategies.none())(lambda _: None))()


@pytest.fixture(scope="session")
def only():
    """only(count, patch): lets the first devices be all that there are."""

    def patched(count: int, patch: pytest.MonkeyPatch) -> None:
        devices = ALL_DEVICES[:count]
        patch.setattr(jax, "devices", lambda: devices)
        patch.setattr(jax, "device_count", lambda: len(devices))

    return patched


@pytest.fixture(scope="module")
def two_devices(only):
    """Two devices are all that there are, during a module: they share out what eight do, and compile faster."""
    with pytest.MonkeyPatch.context() as patch:
        only(2, patch)
        yield


@pytest.fixture
def no_page(monkeypatch):
    """Runs in the tests' own process draw no report, which takes seconds."""
    monkeypatch.setattr("ctxjax.training.run.write_report", lambda workdir: None)


@pytest.fixture
def mesh():
    """The mesh of one device, current during the test."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@contextlib.contextmanager
def partitioned_by_shardy():
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", True)
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


@pytest.fixture(scope="session")
def as_users_divide():
    """as_users_divide(): programs for many devices are divided as users' are, in this context."""
    return partitioned_by_shardy


@pytest.fixture(scope="module")
def shardy():
    """Programs for many devices are divided as users' are, during a module."""
    with partitioned_by_shardy():
        yield


@pytest.fixture
def mesh8():
    """Two devices along each mesh axis, current during the test; programs are divided as users' are."""
    mesh = make_mesh(2, 2, 2)
    with partitioned_by_shardy(), jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """A decoder of every kind of part, with sizes that two devices can share."""
    return ModelConfig(
        vocab_size=40, width=32, layers=2, query_heads=4, kv_heads=2, head_dim=8, mlp_width=48, rope_theta=1000.0
    )


@pytest.fixture(scope="session")
def make_params():
    """make_params(model, seed, mesh): parameters large enough for peaked, position-dependent outputs.

    Values of an untrained model (stddev 0.02) give nearly uniform distributions, on which errors hide.
    """

    def make(model, seed, mesh):
        specs = param_specs(model)
        rng = np.random.default_rng(seed)

        def values(spec, sharding):
            noise = rng.normal(size=spec.shape).astype(np.float32)
            return jax.device_put(1 + 0.2 * noise if spec.stddev is None else 0.3 * noise, sharding)

        is_spec = lambda node: isinstance(node, params_lib.ParamSpec)  # noqa: E731
        return jax.tree.map(values, specs, params_lib.shardings(specs, mesh), is_leaf=is_spec)

    return make


@pytest.fixture
def params(make_params, tiny_model, mesh):
    """The student's parameters on one device."""
    return make_params(tiny_model, 0, mesh)


@pytest.fixture
def frozen(make_params, tiny_model, mesh):
    """The teacher's parameters on one device."""
    return make_params(tiny_model, 1, mesh)


@pytest.fixture(scope="session")
def make_prompts():
    """make_prompts(seed, rows, columns): host Prompts of random lengths, the first row full.

    Ids are random under the padding too: whatever reads them must show.
    """

    def make(seed, rows, columns, vocab=40):
        rng = np.random.default_rng(seed)
        lengths = np.concatenate([[columns], rng.integers(2, columns + 1, rows - 1)])
        mask = np.arange(columns) >= columns - lengths[:, None]
        return Prompts(rng.integers(0, vocab, (rows, columns), dtype=np.int32), mask)

    return make


@pytest.fixture(scope="session")
def make_rollout():
    """make_rollout(seed, rows, columns): a host Rollout of random tokens and lengths, the first row full."""

    def make(seed, rows, columns, vocab=40):
        rng = np.random.default_rng(seed)
        lengths = np.concatenate([[columns], rng.integers(1, columns, rows - 1)])
        mask = np.arange(columns) < lengths[:, None]
        tokens = rng.integers(0, vocab, (rows, columns), dtype=np.int32)
        return Rollout(tokens, mask, np.where(mask, -1.0, 0.0).astype(np.float32))

    return make


@pytest.fixture(scope="session")
def smollm2():
    """A real tokenizer, of byte pairs and 49k tokens, where the folder of public data lies beside the project."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "smollm2_tokenizer"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    from transformers import AutoTokenizer  # takes seconds, and few tests need it

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def products():
    """products(function, *args): the shapes of all matrix products that it traces to, in loops and calls too."""

    def of(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.outvars[0].aval.shape
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from of(getattr(inner, "jaxpr", inner))

    return lambda function, *args: list(of(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.fixture
def mounted(tmp_path):
    """mounted(megabytes): the folder of a file system of that size, where one may be mounted."""
    folder = tmp_path / "disk"

    def mount(megabytes: int):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            folder.rmdir()
            pytest.skip("no file system can be mounted here")
        return folder

    yield mount
    if folder.exists():
        subprocess.run(["umount", "-l", folder], check=True)
