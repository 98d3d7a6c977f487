"""The fields of a configuration: their types, which the annotations of the dataclasses they end in say, and the ranges
of numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from ml_collections import ConfigDict
import numpy as np

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}
LARGEST = 2**31 - 1  # of whole numbers: devices count in 32 bits
# What is beyond these is a slip of the pen. Other numbers that are not whole are at most 1e9.
AT_MOST = {
    "optim.lr": 1.0, "base.lr": 1.0, "optim.b1": 0.99999, "optim.b2": 0.9999999, "optim.weight_decay": 1.0,
    "base.weight_decay": 1.0, "rollout.temperature": 100.0, "eval.temperature": 100.0, "rollout.top_p": 1.0,
    "eval.top_p": 1.0, "teacher.temperature": 100.0, "teacher.top_p": 1.0,
    "loss.gate_threshold": 1.0, "loss.on_policy_fraction": 1.0,
    "loss.ema_decay": 1.0, "loss.beta": 1000.0, "loss.mu": 1000.0, "loss.reference": 1000.0, "rules.empty_share": 1.0,
    "alarms.untrained": 1.0, "alarms.truncated": 1.0, "alarms.repetition": 1.0, "alarms.parse_rate": 1.0,
    "alarms.agreement": 1.0, "base.layers": 1000, "base.width": 65536, "base.mlp_width": 262144,
    "rollout.max_tokens": 1_000_000, "eval.bootstrap": 1_000_000, "cpu_devices": 1024, "lora.rank": 65536,
    "train.batch_size": 1_000_000, "eval.batch_size": 1_000_000, "base.batch_size": 1_000_000,
}  # fmt: skip
# Fields that may be 0, where 0 means "off", "none" or "as many as there are"; every other number is positive.
MAY_BE_ZERO = {
    "teacher.temperature", "teacher.top_k", "tiny_safety.seed",
    "cpu_devices", "seed", "base.seed", "base.steps", "base.warmup_steps", "base.weight_decay",
    "loss.beta_ramp", "loss.mu_ramp", "loss.reference", "loss.clip", "loss.skip_first", "loss.on_policy_fraction",
    "loss.off_policy_steps", "loss.gate_threshold", "loss.ema_decay",
    "prompt.max_bare_tokens", "prompt.max_context_tokens", "rollout.temperature", "rollout.top_k", "loss.beta",
    "loss.mu", "optim.warmup_steps", "optim.weight_decay", "optim.b1", "optim.b2", "train.retention_rows",
    "eval.every", "eval.temperature", "eval.top_k", "rules.seed", "rules.context_index", "rules.empty_share",
    "alarms.untrained", "alarms.logprob_gap", "alarms.truncated", "alarms.repetition", "alarms.no_distillation",
    "alarms.parse_rate", "alarms.agreement",
    "optim.lr", "lora.rank", "records.max_skipped", "medical.first_label",
}  | {  # of tasks over files, 0 is no limit
    f"{task}.{field}"
    for task in ("qa_jsonl", "medical", "safety", "math", "hints", "tiny_safety")
    for field in ("context_seed", "limit", "train_questions", "dev_questions", "test_questions")
    if (task, field) not in (("qa_jsonl", "dev_questions"), ("qa_jsonl", "test_questions"))
}  # fmt: skip

_hints = functools.cache(typing.get_type_hints)


def checked(config: ConfigDict, sections: dict[str, tuple[type, ...]], made: set[str], top: dict[str, type]) -> dict:
    """The configuration as a nested dict with every value of the right type; a whole number serves as a number, and a
    list as a tuple.

    ``sections``: name -> the dataclasses whose fields it has, but for those named in ``made`` as "section.field", and
    those that are dataclasses themselves. ``top``: field -> type, outside of sections. "arms" holds variants of "loss".
    Raises ValueError that names the field, where one is missing, unknown, or of another type.
    """
    values = config.to_dict()
    for name, hint in top.items():
        values[name] = _converted(name, _get(values, name), hint)
    for name, classes in sections.items():
        hints = {field: hint for cls in classes for field, hint in _hints(cls).items()}
        known = {f: h for f, h in hints.items() if f"{name}.{f}" not in made and not dataclasses.is_dataclass(h)}
        values[name] = _section(name, _get(values, name), known)
        optional = {f.name for cls in classes for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        for field in sorted(known.keys() - values[name].keys() - optional):
            raise ValueError(f"the configuration has no field {name}.{field}; configs/base.py lists them all")
        if name == "loss":
            arms = _get(values, "arms")
            if not isinstance(arms, dict):
                raise ValueError(f"arms = {arms!r} must be a section of arms: name -> what it changes in config.loss")
            values["arms"] = {arm: _section(f"arms.{arm}", changes, known) for arm, changes in arms.items()}
    return values


def _get(values: dict, name: str):
    if name not in values:
        raise ValueError(f"the configuration has no {name}; configs/base.py lists all fields")
    return values[name]


def _section(name: str, values, hints: dict[str, Any]) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{name} = {values!r} must be a section with the fields {', '.join(sorted(hints))}")
    for field in values:
        if field not in hints:
            raise ValueError(f"{name}.{field} is no field; {name} has {', '.join(sorted(hints))}")
    return {field: _converted(f"{name}.{field}", value, hints[field]) for field, value in values.items()}


def _converted(field: str, value, hint):
    value = value.item() if isinstance(value, np.generic) else value
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{field} = {value!r} must be a list of values, each {KINDS[inner]}: ({value!r},)")
        return tuple(_converted(f"{field}[{place}]", item, inner) for place, item in enumerate(value))
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    raise ValueError(f"{field} = {value!r} must be {' or '.join(KINDS[kind] for kind in allowed)}")


def check_numbers(values: dict, prefix: str = "") -> None:
    """Raises ValueError that names the field, where a number is not finite, is negative, 0 where it may not be, or
    absurdly large. Sizes of ``mesh`` have rules of their own."""
    for name, value in values.items():
        field = f"{prefix}{name}"
        if isinstance(value, dict):
            check_numbers(value, f"{field}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            # An arm's fields are those of the loss, and a teacher's base is a base.
            rules = f"loss.{name}" if field.startswith("arms.") else field.removeprefix("teacher_")
            require(isinstance(value, int) or math.isfinite(value), field, value, "finite")
            most = AT_MOST.get(rules, LARGEST if isinstance(value, int) else 1e9)
            require(value <= most, field, value, f"at most {most}")
            if not field.startswith("mesh."):
                zero = rules in MAY_BE_ZERO
                require(value > 0 or (zero and value == 0), field, value, "0 or more" if zero else "above 0")


def require(good: bool, field: str, value, rule: str) -> None:
    """Raises ValueError with the field, its value, and the rule that it breaks."""
    if not good:
        raise ValueError(f"{field} = {value} must be {rule}")


def one_of(field: str, value: str, known) -> None:
    """Raises ValueError with the field, its value, and those that are known, where it is none of them."""
    if value not in known:
        raise ValueError(f"{field} = {value!r} is not known; choose from {', '.join(sorted(known))}")
