"""Count the arithmetic of a traced program: two operations for each multiply-add of its matrix products.

The body of a loop counts as often as it runs; the compiler's own count takes it only once.
"""

from __future__ import annotations

from collections.abc import Callable
import math

from jax.extend.core import jaxprs_in_params

from ctxjax.distill.sampling import FEWER_ROWS
from ctxjax.distill.train_step import StepConfig

# cuDNN's attention (models/cudnn.py) has no inner program. By primitive: its matrix products, each of queries x keys x
# head_dim; the backward pass computes the scores again.
ATTENTION_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}

# From a ``while`` equation to the number of times that its body runs.
Trips = Callable[..., int]


def count_matmul_flops(jaxpr, trips: Trips = lambda equation: 1) -> int:
    """Return the FLOPs of all devices together.

    ``trips(equation)``: how often the body of a ``while`` runs. Of a ``cond`` the most expensive branch counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, jaxprs_in_params(equation.params)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        if name in ATTENTION_PRODUCTS:
            queries_BxLxHxDh, keys_BxMxKxDh = (operand.aval.shape for operand in equation.invars[:2])
            total += 2 * ATTENTION_PRODUCTS[name] * math.prod(queries_BxLxHxDh) * keys_BxMxKxDh[1]
            continue
        parts = [count_matmul_flops(getattr(part, "jaxpr", part), trips) for part in inner]
        if name == "cond":
            total += max(parts, default=0)
        else:
            total += _count_repeats(equation, name, trips) * sum(parts)
    return total


def _count_repeats(equation, name: str, trips: Trips) -> int:
    if name == "scan":
        return equation.params["length"]
    if name == "while":
        return trips(equation)
    if name == "shard_map":  # its inner shapes are those of one device
        return equation.params["mesh"].size
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return 1


def find_loop_bound(equation) -> int | None:
    """Return the constant in the ``<`` comparison of a ``while``'s condition; None if there is none."""
    jaxpr = equation.params["cond_jaxpr"].jaxpr
    constants = [
        int(operand.val)
        for e in jaxpr.eqns
        if e.primitive.name == "lt"
        for operand in e.invars
        if hasattr(operand, "val")
    ]
    return max(constants, default=None)


def count_step_flops(jaxpr, step: StepConfig) -> int:
    """Return the FLOPs of a traced training step, with responses of full length, of all devices together."""
    return count_matmul_flops(jaxpr, _Trips(step))


def count_head_chunks(step: StepConfig) -> int:
    """Return how often the loop over chunks of response columns runs for responses of full length."""
    return -(-step.sampling.max_tokens // step.loss.chunk)


class _Trips:
    """The number of times that each ``while`` of a step's trace runs; call it once per equation, in order.

    A decode loop starts at the bound of the previous one and ends at its own; those for FEWER_ROWS do not run at full
    length. The bound of the head's loop is data; it is counted over all chunks.
    """

    def __init__(self, step: StepConfig):
        self.step, self.before = step, 1

    def __call__(self, equation) -> int:
        stop = find_loop_bound(equation)
        if stop is None:
            return count_head_chunks(self.step)
        if FEWER_ROWS in str(equation.source_info.name_stack):
            return 0
        self.before = 1 if stop <= self.before else self.before  # the next rollout's first loop
        trips, self.before = stop - self.before, stop
        return trips
