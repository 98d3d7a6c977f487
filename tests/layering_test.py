"""The package's floors: a module imports from its own floor or from lower ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ctxjax"
FLOORS = {
    "types": 0,
    "sharding": 1, "checksum": 1, "masks": 1, "divergences": 1, "rng": 1,
    "models": 2.1, "models.params": 2.1, "models.projection": 2.1, "models.attention": 2.1, "models.rope": 2.1,
    "models.remat": 2.1,
    "models.transformer": 2.2, "models.lora": 2.3, "models.mesh_fit": 2.3, "models.family": 2.3, "models.weights": 2.3,
    "models.llama": 2.4, "models.qwen2": 2.4, "models.qwen3": 2.4, "models.hf": 2.5, "models.hf_save": 2.6,
    "sampling": 3, "responses": 3, "scoring": 3, "anchors": 3, "head_scan": 3, "losses": 3, "objective": 3, "optim": 3,
    "train_step": 4, "evaluation": 4,
    "processes": 5, "retry": 5, "alarms": 5, "fields": 5, "secrets": 5, "preemption": 5,
    "config": 5, "data": 5, "checkpoint": 5, "metrics": 5, "hub": 5, "folder": 5, "workdir": 5,
    "report.__main__": 7, "report": 5,
    "evaluator": 6, "pretrain": 6, "inputs": 6, "arm": 6, "trainer": 6, "offenders": 6, "preview": 6, "api": 6,
    "teacher_samples": 6,
    "command": 5, "plan": 6, "plan.__main__": 7, "__init__": 6, "main": 7,
}  # fmt: skip
OUTSIDE = {"ml_collections", "transformers", "grain", "time", "pathlib"}  # the world, which arrays know nothing of
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MODULES = sorted(FILES)


def floor(module: str) -> float | None:
    """The floor of the longest listed name; a command that is not listed is on the top floor."""
    parts = module.removesuffix(".__init__").split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in FLOORS:
            return FLOORS[".".join(parts[:length])]
    return 7 if "__name__ == '__main__'" in ast.unparse(TREES[module]) else None


def imports(module: str) -> set[str]:
    """Absolute names of what a module imports, inside functions too: of modules where they are modules."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(name: str) -> str:
    """The module of this package that an absolute name belongs to."""
    parts = name.split(".")[1:]
    while parts and not {".".join(parts), ".".join([*parts, "__init__"])} & FILES.keys():
        parts.pop()
    return ".".join(parts) if ".".join(parts) in FILES else ".".join([*parts, "__init__"])


def identifiers(module: str) -> set[str]:
    """Every name that the code uses; comments and docstrings are not code."""
    nodes = list(ast.walk(TREES[module]))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    return used | {part for name in imports(module) for part in name.split(".")}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_floor_and_imports_only_from_it_or_below(module):
    assert floor(module) is not None, f"{module} is missing from the table of floors"
    for name in imports(module):
        if name.split(".")[0] == "ctxjax":
            assert floor(own(name)) <= floor(module), f"{module} imports {name} from a higher floor"


@pytest.mark.parametrize("module", [name for name in MODULES if (floor(name) or 0) < 5])
def test_the_scientific_core_sees_no_config_tokenizer_file_or_clock(module):
    reads_files = module in ("models.hf", "models.weights", "models.hf_save")
    allowed = {"pathlib"} if reads_files else set()
    assert not {name.split(".")[0] for name in imports(module)} & (OUTSIDE - allowed)
    assert reads_files or "open" not in identifiers(module)


def test_the_package_imports_its_api_only_when_it_is_used():
    assert imports("__init__") == {"importlib"}


def test_only_the_losses_stop_gradients():
    assert {name for name in FILES if "stop_gradient" in identifiers(name)} == {
        "anchors", "divergences", "head_scan", "losses", "objective",
    }  # fmt: skip


def test_only_rng_and_the_initialisation_derive_keys():
    assert {name for name in FILES if "fold_in" in identifiers(name)} == {"models.params", "rng"}


def test_no_file_is_longer_than_350_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: length for name, length in lengths.items() if length > 350}
