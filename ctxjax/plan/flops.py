"""Arithmetic of a traced program: two operations for every multiplication and addition of its matrix products.

Bodies of loops count as often as they run, which the compiler's own count does not do.
"""

from __future__ import annotations

from collections.abc import Callable
import math

from jax.extend.core import jaxprs_in_params

# Of a ``while`` equation, how often its body runs.
Trips = Callable[..., int]


def matmul_flops(jaxpr, trips: Trips = lambda equation: 1) -> int:
    """Of all devices together. ``trips(equation)`` says how often a ``while`` runs; of the branches of a ``cond`` the
    most expensive counts."""
    total = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, jaxprs_in_params(equation.params)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        parts = [matmul_flops(getattr(part, "jaxpr", part), trips) for part in inner]
        if name == "cond":
            total += max(parts, default=0)
        else:
            total += _times(equation, name, trips) * sum(parts)
    return total


def _times(equation, name: str, trips: Trips) -> int:
    if name == "scan":
        return equation.params["length"]
    if name == "while":
        return trips(equation)
    if name == "shard_map":  # shapes in it are those of one device
        return equation.params["mesh"].size
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return 1


def bound(equation) -> int | None:
    """The constant that a ``while`` compares its counter with, where it does so with ``<``."""
    jaxpr = equation.params["cond_jaxpr"].jaxpr
    constants = [
        int(operand.val)
        for e in jaxpr.eqns
        if e.primitive.name == "lt"
        for operand in e.invars
        if hasattr(operand, "val")
    ]
    return max(constants, default=None)
