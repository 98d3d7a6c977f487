"""The package's rooms: a room imports from lower rooms only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ctxjax"
# The rooms from bottom to top: folders of the package, and single files at its top. A room imports from rooms above it
# in this list only (lower in the house), and from itself.
ROOMS = [
    "configs", "host", "types", "rng", "masks", "sharding",
    "models", "models.hf", "distill",
    "monitoring", "games", "data.grading", "data", "data.worlds", "data.tasks",
    "config_fields", "config_sections", "config", "inputs", "evaluation", "experience", "report", "training",
    "api", "__init__", "plan", "export", "study", "audit", "chat", "evaluate", "extract", "rounds", "main", "__main__",
]  # fmt: skip
CORE = {"types", "rng", "masks", "sharding", "models", "distill"}
OUTSIDE = {"ml_collections", "transformers", "grain", "time", "pathlib"}  # the world, which arrays know nothing of
PATHS = sorted([*ROOT.rglob("*.py"), *(ROOT / "configs").glob("*.py")])  # rglob does not follow the link to configs/
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MODULES = sorted(FILES)


def room(module: str) -> str:
    """The folder that a module lies in, or the module itself at the top of the package."""
    folder = module.removesuffix("__init__").rstrip(".") if module.endswith("__init__") else module.rpartition(".")[0]
    return folder or module


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


def test_every_room_has_its_row():
    assert {room(module) for module in MODULES} == set(ROOMS)
    # At package level; twelve of them are commands.
    assert sum("." not in name for name in ROOMS) <= 31


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_room_or_lower_ones(module):
    for name in imports(module):
        if name.split(".")[0] == "ctxjax":
            height = ROOMS.index(room(own(name)))
            assert height <= ROOMS.index(room(module)), f"{module} imports {name} from a higher room"


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in CORE])
def test_the_core_sees_no_config_tokenizer_file_or_clock(module):
    assert not {name.split(".")[0] for name in imports(module)} & OUTSIDE
    assert not {name for name in imports(module) if name.startswith("ctxjax.host")}
    assert "open" not in identifiers(module)


def test_the_package_imports_its_api_only_when_it_is_used():
    assert imports("__init__") == {"importlib", "logging"}


def test_only_the_losses_stop_gradients():
    assert {name for name in FILES if "stop_gradient" in identifiers(name)} == {
        "distill.anchors", "distill.divergences", "distill.chunked_head", "distill.losses", "distill.objective",
    }  # fmt: skip


def test_only_rng_and_the_initialisation_derive_keys():
    assert {name for name in FILES if "fold_in" in identifiers(name)} == {"models.params", "rng"}


def test_no_file_is_longer_than_350_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    lengths.pop("configs.base")  # the list of all fields, with a line or two for each
    assert not {name: length for name, length in lengths.items() if length > 350}
