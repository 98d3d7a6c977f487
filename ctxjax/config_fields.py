"""Check the fields of a configuration against the dataclasses that they end in: types are the annotations, bounds of
numbers are the fields' metadata (``types.bounded``)."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}
LARGEST = {int: 2**31 - 1, float: 1e9}  # if the field has no ``at_most``; devices count in 32 bits

_hints = functools.cache(typing.get_type_hints)


class _Rule(NamedTuple):
    """What a field accepts: its type, bounds as in ``types.bounded``, and whether it may be missing."""

    hint: Any
    bounds: dict[str, Any]
    is_optional: bool


def check_fields(config: ConfigDict, sections: dict[str, tuple[type, ...]], made: set[str]) -> dict:
    """Return the configuration as a nested dict; whole numbers become floats, and lists tuples, as the types ask.

    ``sections``: name -> the dataclasses that declare its fields; "" has the fields outside of sections. Fields named
    in ``made`` as "section.field", and those that are dataclasses themselves, are not in the configuration. "arms"
    holds variants of "loss", each with an optional ``optim.lr`` of its own. Raises ValueError with the field, its value
    and the rule if a field is missing, unknown, of another type or out of its bounds.
    """
    values = config.to_dict()
    for name, classes in sections.items():
        rules = _list_rules(name, classes, made)
        if not name:
            for field, rule in rules.items():
                values[field] = _check(field, _get(values, field), rule)
            continue
        values[name] = _check_section(name, _get(values, name), rules)
        for field in sorted(rules.keys() - values[name].keys()):
            if not rules[field].is_optional:
                raise ValueError(f"the configuration has no field {name}.{field}; configs/base.py lists them all")
        if name == "loss":
            arms = _get(values, "arms")
            if not isinstance(arms, dict):
                raise ValueError(f"arms = {arms!r} must be a section of arms: name -> what it changes in config.loss")
            rules["lr"] = _list_rules("optim", sections["optim"], made)["lr"]
            values["arms"] = {arm: _check_section(f"arms.{arm}", changes, rules) for arm, changes in arms.items()}
    return values


def _list_rules(section: str, classes: tuple[type, ...], made: set[str]) -> dict[str, _Rule]:
    """Return the fields of a section and their rules."""
    rules = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            hint = _hints(cls)[field.name]
            if f"{section}.{field.name}" not in made and not dataclasses.is_dataclass(hint):
                rules[field.name] = _Rule(hint, dict(field.metadata), field.default is not dataclasses.MISSING)
    return rules


def _get(values: dict, name: str):
    if name not in values:
        raise ValueError(f"the configuration has no {name}; configs/base.py lists all fields")
    return values[name]


def _check_section(name: str, values, rules: dict[str, _Rule]) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{name} = {values!r} must be a section with the fields {', '.join(sorted(rules))}")
    for field in values:
        if field not in rules:
            raise ValueError(f"{name}.{field} is no field; {name} has {', '.join(sorted(rules))}")
    return {field: _check(f"{name}.{field}", value, rules[field]) for field, value in values.items()}


def _check(field: str, value, rule: _Rule):
    value = _convert(field, value, rule.hint)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(field, value, **rule.bounds)
    return value


def _convert(field: str, value, hint):
    """Return the value as the type ``hint``. Raises ValueError if it is of another type."""
    value = value.item() if isinstance(value, np.generic) else value
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{field} = {value!r} must be a list of values, each {KINDS[inner]}: ({value!r},)")
        return tuple(_convert(f"{field}[{place}]", item, inner) for place, item in enumerate(value))
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int and abs(value) <= LARGEST[int]:
        return float(value)
    raise ValueError(f"{field} = {value!r} must be {' or '.join(KINDS[kind] for kind in allowed)}")


def _check_number(
    field: str, value: float, zero: bool = False, at_most: float | None = None, negative: bool = False
) -> None:
    """Raise ValueError if a number is not finite or out of the bounds of ``types.bounded``."""
    require(isinstance(value, int) or math.isfinite(value), field, value, "finite")
    most = LARGEST[type(value)] if at_most is None else at_most
    require(value <= most, field, value, f"at most {most}")
    if not negative:
        require(value > 0 or (zero and value == 0), field, value, "0 or more" if zero else "above 0")


def require(good: bool, field: str, value, rule: str) -> None:
    """Raise ValueError with the field, its value and the rule if not ``good``."""
    if not good:
        raise ValueError(f"{field} = {value} must be {rule}")


def one_of(field: str, value: str, known) -> None:
    """Raise ValueError with the field, its value and the known values if it is none of them."""
    if value not in known:
        raise ValueError(f"{field} = {value!r} is not known; choose from {', '.join(sorted(known))}")
