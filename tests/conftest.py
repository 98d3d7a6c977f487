"""Fixtures of all tests. They run on the CPU, which counts as eight devices; the commands that they start inherit the
environment, and take the devices that their configurations say."""

import os
from pathlib import Path
import random
import string
import subprocess

# Read by JAX when it is imported. Tests compile many programs and run each once, so the compiler does not optimise.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from ctxjax.models import params as params_lib  # noqa: E402
from ctxjax.models.transformer import ModelConfig, param_specs  # noqa: E402
from ctxjax.sharding import make_mesh  # noqa: E402
from ctxjax.types import Prompts, Rollout  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)  # no test takes a program from an earlier run
ALL_DEVICES = jax.devices()


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """Drop a file's programs after its tests. A training step holds some thousand memory maps; Linux gives a process
    65,530, and XLA ends with a segmentation fault if there are no more."""
    yield
    jax.clear_caches()


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


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory) -> tuple[Path, Path]:
    """The finished run of configs/debug.py, and a model that was exported from it. Tests change copies only."""
    from forked import run

    from ctxjax import export

    folder = tmp_path_factory.mktemp("debug")
    workdir, cache, out = folder / "run", folder / "cache", folder / "model"
    folders = [f"--workdir={workdir}", f"--config.base.cache={cache}", f"--config.compile_cache={cache / 'xla'}"]
    ended = run("ctxjax.main", ["--config=configs/debug.py", *folders])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert export.export(workdir, out, "off_policy")[:2] == ("off_policy", 3)
    return workdir, out


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


@pytest.fixture
def mesh8():
    """Two devices along each mesh axis, current during the test."""
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
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


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the world rules; a file may have a fixture of its own."""
    from ctxjax.data.worlds import rules, word_tokenizer

    return word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with a token for each character."""
    from ctxjax.data.worlds import word_tokenizer

    return word_tokenizer.build([*string.printable[:95], "\n"], r"[\s\S]")


def write_random_model(folder: Path, tokenizer, family: str = "llama", **sizes) -> Path:
    """Write a random model of these sizes, on two devices, as a Hugging Face folder."""
    from ctxjax.models.hf import load as hf_load, save as hf_save

    model = ModelConfig(len(tokenizer), **hf_load.FAMILIES[family].parts, **sizes)
    mesh = make_mesh(fsdp=2, devices=ALL_DEVICES[:2])
    with jax.set_mesh(mesh):
        params = params_lib.init(param_specs(model), jax.random.key(0), mesh)
    hf_save.save(folder, params, model, tokenizer, (tokenizer.eos_token_id,), model_type=family)
    return folder


@pytest.fixture(scope="module")
def letters_folder(tmp_path_factory, letters) -> Path:
    """A random model whose tokens are letters."""
    sizes = {"width": 16, "layers": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 16}
    return write_random_model(tmp_path_factory.mktemp("models") / "letters", letters, **sizes)


@pytest.fixture(scope="module")
def tables_folder(tmp_path_factory) -> Path:
    """A random model with the tokens of the world rules."""
    from ctxjax.data.worlds import rules, word_tokenizer

    tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    sizes = {"width": 32, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48}
    return write_random_model(tmp_path_factory.mktemp("models") / "model", tokenizer, **sizes)


@pytest.fixture(scope="module")
def world():
    """A small world of tables: 64 training, 16 dev and 16 test questions; a file may have a fixture of its own."""
    from ctxjax.data.worlds import rules

    return rules.Rules(rules.RulesConfig(0, 0, 64, 16, 16, 0.0))


@pytest.fixture(scope="session")
def safety_sets(tmp_path_factory) -> Path:
    """Tweets, test cases and comments of random words, in the published layouts; one in six is too long."""
    folder, rng = tmp_path_factory.mktemp("published"), random.Random(0)
    (folder / "offensive").mkdir()
    words = [
        "the",
        "@user",
        "you",
        "!",
        "?",
        "#",
        "is",
        "a",
        "fine",
        "bad",
        "day",
        "for",
        "men",
        "and",
        "women",
        "who",
        "like",
        "it",
    ]

    def texts(count: int) -> list[str]:
        lengths = [rng.choice((2, 4, 5, 6, 7, 60)) for _ in range(count)]
        return [f"{n} {' '.join(rng.choices(words, k=length))}" for n, length in enumerate(lengths)]

    for split, count in (("train", 60), ("val", 20), ("test", 20)):
        (folder / "offensive" / f"{split}_text.txt").write_text("\n".join(texts(count)) + "\n")
        (folder / "offensive" / f"{split}_labels.txt").write_text("\n".join(rng.choices("01", k=count)) + "\n")
    cases = [f'{n},"{text}",{rng.choice(("hateful", "non-hateful"))},{n}\n' for n, text in enumerate(texts(60))]
    (folder / "test_suite_cases.csv").write_text("case_id,test_case,label_gold,templ_id\n" + "".join(cases))
    comments = [f"{text};{rng.choice((0.0, 1.0))}\n" for text in texts(60)]
    (folder / "Ethos_Dataset_Binary.csv").write_text("comment;isHate\n" + "".join(comments))
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of a real tokenizer; the test is skipped if the public data are not there."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "smollm2_tokenizer"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """A real tokenizer, of byte pairs and 49k tokens."""
    from ctxjax.inputs.model_folder import load_tokenizer  # takes seconds, and few tests need it

    return load_tokenizer(smollm2_folder)


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
