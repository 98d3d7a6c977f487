"""The tasks, one file each. To add one: a module with a frozen config dataclass and a class with the methods of
``data.task.Task``, a section of the dataclass's fields in configs/base.py, and a line here. A task that reads files
takes their rows from ``data.records.Reader``, and its dataclass has a field ``records``."""

from ctxjax.data.task import World
from ctxjax.data.tasks.hints import Hints, HintsConfig
from ctxjax.data.tasks.math import Math, MathConfig
from ctxjax.data.tasks.medical import Medical, MedicalConfig
from ctxjax.data.tasks.qa_jsonl import QaConfig, QaJsonl
from ctxjax.data.tasks.safety import Safety, SafetyConfig
from ctxjax.data.worlds.rules import Rules, RulesConfig
from ctxjax.data.worlds.tiny_safety import TinySafety, TinySafetyConfig

TASKS = {
    "rules": (RulesConfig, Rules),
    "qa_jsonl": (QaConfig, QaJsonl),
    "medical": (MedicalConfig, Medical),
    "safety": (SafetyConfig, Safety),
    "math": (MathConfig, Math),
    "hints": (HintsConfig, Hints),
    "tiny_safety": (TinySafetyConfig, TinySafety),
}
# Those that can train a base of their own.
WORLDS = tuple(name for name, (_, task) in TASKS.items() if issubclass(task, World))
# Text games: configs/ has their recipes, whose shapes can be planned.
PLANNED = ("frozenlake", "sokoban")


def check_task(name: str) -> None:
    """Raises ValueError, with what there is, for a task that is not."""
    if name in PLANNED:
        raise ValueError(
            f"task = {name!r} is not part of this version of ctxjax, which has {', '.join(TASKS)}; "
            "python -m ctxjax.plan tells what its configuration needs"
        )
    if name not in TASKS:
        raise ValueError(f"task = {name!r} is not known; choose from {', '.join(sorted(TASKS))}")
