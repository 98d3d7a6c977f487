"""The tasks, one file each.

To add a task, write a module with a frozen config dataclass and a class with the methods of ``data.task.Task``, add a
section with the dataclass's fields to configs/base.py, and add one line to TASKS. A task over files reads its rows with
``data.records.Reader``, and its dataclass has a field ``records``.
"""

from ctxjax.data.task import World
from ctxjax.data.tasks.handbook import Handbook, HandbookConfig
from ctxjax.data.tasks.hints import Hints, HintsConfig
from ctxjax.data.tasks.math import Math, MathConfig
from ctxjax.data.tasks.medical import Medical, MedicalConfig
from ctxjax.data.tasks.qa_jsonl import QaConfig, QaJsonl
from ctxjax.data.tasks.safety import Safety, SafetyConfig
from ctxjax.data.tasks.self_study import SelfStudy, SelfStudyConfig
from ctxjax.data.tasks.style import Style, StyleConfig
from ctxjax.data.tasks.text_game import TextGame, TextGameConfig
from ctxjax.data.worlds.policy import Policy
from ctxjax.data.worlds.rules import Rules, RulesConfig
from ctxjax.data.worlds.scratch import Scratch
from ctxjax.data.worlds.tiny_grid import TinyGrid, TinyGridConfig
from ctxjax.data.worlds.tiny_safety import TinySafety, TinySafetyConfig

TASKS = {
    "rules": (RulesConfig, Rules),
    "policy": (RulesConfig, Policy),
    "scratch": (RulesConfig, Scratch),
    "qa_jsonl": (QaConfig, QaJsonl),
    "medical": (MedicalConfig, Medical),
    "safety": (SafetyConfig, Safety),
    "math": (MathConfig, Math),
    "hints": (HintsConfig, Hints),
    "handbook": (HandbookConfig, Handbook),
    "style": (StyleConfig, Style),
    "self_study": (SelfStudyConfig, SelfStudy),
    "text_game": (TextGameConfig, TextGame),
    "tiny_safety": (TinySafetyConfig, TinySafety),
    "tiny_grid": (TinyGridConfig, TinyGrid),
}
GAMES = tuple(name for name, (_, task) in TASKS.items() if hasattr(task, "play"))  # those that are a task.GameTask
# Tasks that can train their own base.
WORLDS = tuple(name for name, (_, task) in TASKS.items() if issubclass(task, World))
