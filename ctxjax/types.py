"""The PyTrees that cross function boundaries, and the letters that name their axes.

    B batch        P prompt        T response     L any sequence    M cache slots
    V vocabulary   D width         F mlp width    N layers          C shared prefix
    H query heads  K key/value heads               Dh head dim

A name such as ``tokens_BxT`` says: shape [B, T]. Masks are boolean, True for real tokens;
they are data, and are never inferred from token ids, because in several model families the padding
token *is* the end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp


def bounded(
    default: Any = dataclasses.MISSING, *, zero: bool = False, at_most: float | None = None, negative: bool = False
) -> Any:
    """Declare a number of a configuration's dataclass, with the bounds that ``config_fields`` checks.

    Without ``bounded``, a number must be above 0. ``zero``: it may be 0, for "off", "none" or "all". ``at_most``: a
    larger number is taken for a slip of the pen (None: a bound for all numbers). ``negative``: any sign.
    """
    given = {name: value for name, value in (("zero", zero), ("at_most", at_most), ("negative", negative)) if value}
    return dataclasses.field(default=default, metadata=given)


Params = Any  # a nested dict of arrays, declared by models.architecture.param_specs


@struct.dataclass
class Prompts:
    """One view of a batch of questions, left-padded so that every row ends at column P-1.

    ``tokens_BxP`` int32 and ``mask_BxP`` bool; a row of three tokens with P = 5::

        tokens  0   0   17  4   9
        mask    F   F   T   T   T

    ``prefix_C`` int32 or None: tokens that every row of the view starts with, as one row without padding; they are
    not repeated in ``tokens_BxP``. A row reads prefix_C, then its own tokens.
    """

    tokens_BxP: jax.Array
    mask_BxP: jax.Array
    prefix_C: jax.Array | None = None


def map_rows(function: Callable, tree, shared: Callable = lambda array: array):
    """Map ``function`` over the arrays of a tree that have a leading batch axis, and ``shared`` over every
    ``prefix_C``, which has none."""

    def node(value):
        if not isinstance(value, Prompts):
            return function(value)
        prefix_C = None if value.prefix_C is None else shared(value.prefix_C)
        return Prompts(function(value.tokens_BxP), function(value.mask_BxP), prefix_C)

    return jax.tree.map(node, tree, is_leaf=lambda value: isinstance(value, Prompts))


@struct.dataclass
class Batch:
    """A global batch: the same questions in several views.

    ``bare`` is x, ``context`` is (c, x), and ``other`` is (c', x') under a different context c': the rows on which
    the student must still follow its context as before training. None: no such retention.
    ``row_number_B`` int32 names each row; sampling keys derive from it, not from the row's place in the batch.
    """

    bare: Prompts
    context: Prompts
    other: Prompts | None
    row_number_B: jax.Array


@struct.dataclass
class Rollout:
    """Sampled responses y. ``mask_BxT`` is True up to and including the first end token.

    ``logprobs_BxT`` (nats, float32) are at the sampling temperature, among all tokens, whatever top-k and top-p left; 0
    for masked tokens.
    """

    tokens_BxT: jax.Array
    mask_BxT: jax.Array
    logprobs_BxT: jax.Array


@struct.dataclass
class PrefixKV:
    """Keys and values of a prefix that all rows share, [N, K, C, Dh]: a function of the weights and of prefix_C.

    It is valid as long as the weights are: compute it once per run for a frozen model, once per step for a student.
    """

    keys: jax.Array
    values: jax.Array


@struct.dataclass
class KVCache:
    """Keys and values of all layers, and one write cursor for all rows.

    Left padding makes one scalar cursor enough: every row writes the same column at the same time.
    The layers are in segments of n consecutive ones with the same window, each with its own arrays: ``keys``
    [n, B, K, Dh, S] and ``values`` [n, B, K, S, Dh], without the first axis if n is 1. In these orders both products of
    a query read memory contiguously. Without a window the S slots are the M columns; with one they are a ring
    (models/ring.py) of min(M, window). ``mask_BxM`` is True for columns that hold a real token, ``length`` the number
    of columns written. ``prefix`` is what all rows read before their columns, of each segment [n, K, C, Dh], or None. A
    segment with a window has only the part that is still in reach; ``prefix_length`` is that of the whole.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask_BxM: jax.Array
    length: jax.Array
    windows: tuple[int, ...] = struct.field(pytree_node=False)
    prefix: tuple[PrefixKV, ...] | None = None
    prefix_length: int = struct.field(default=0, pytree_node=False)

    def extend(self, columns: int) -> KVCache:
        """Return the same cache with room for ``columns``. The present columns may all be written: a ring smaller than
        its window has wrapped none of them."""

        def padded(arrays, axis: int):
            sizes = [min(columns, window or columns) for window in self.windows]
            return tuple(_pad_right(x, size, axis) for x, size in zip(arrays, sizes, strict=True))

        keys, values, mask_BxM = padded(self.keys, -1), padded(self.values, -2), _pad_right(self.mask_BxM, columns, -1)
        return self.replace(keys=keys, values=values, mask_BxM=mask_BxM)

    def map_rows(self, function: Callable[[jax.Array, int], jax.Array]) -> KVCache:
        """Return the same cache with function(x, its axis of rows) for every array x; the prefix, which has no rows, is
        unchanged."""
        keys, values = jax.tree.map(lambda x: function(x, x.ndim - 4), (self.keys, self.values))
        return self.replace(keys=keys, values=values, mask_BxM=function(self.mask_BxM, 0))


def _pad_right(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Pad x with zeros on the right, up to ``size`` along ``axis``."""
    return jnp.pad(x, [(0, (size - x.shape[axis]) * (a == axis % x.ndim)) for a in range(x.ndim)])


@struct.dataclass
class TrainState:
    """All that a step replaces.

    ``params`` are what is trained: all weights, or an adapter's (models/lora.py). Frozen weights are not in it, because
    a step neither writes nor saves them. ``key`` is the root key and never changes: the randomness of a step is a
    pure function of (key, step, stream, row, position). ``ema`` is the moving average of ``params``, if the loss
    uses it.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    ema: Params | None = None


@struct.dataclass
class Frozen:
    """Weights that a step reads and never changes.

    ``teacher`` is f; ``base`` is what the student's adapter is joined to, None if all its weights are trained.
    Both may be the same arrays, which are then held once. ``teacher_prefix`` holds the teacher's keys and values of the
    prefix that all rows of the context view start with, None if they share none.
    """

    teacher: Params
    base: Params | None = None
    teacher_prefix: PrefixKV | None = None


@struct.dataclass
class Mean:
    """A mean kept as (total, count), so that those of micro-batches, devices and hosts can be added first and divided
    once. An empty mean is 0, not NaN."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> Mean:
        """Return the masked mean of ``values``. A masked value may be NaN or infinite; neither the mean nor its
        gradient sees it."""
        mask = jnp.broadcast_to(mask, values.shape)
        return cls(jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> jax.Array:
        return self.total / jnp.maximum(self.count, 1.0)


@struct.dataclass
class Max:
    """A maximum of numbers that are not negative; as with a Mean, ``+`` joins those of a batch's parts."""

    value: jax.Array

    def __add__(self, other: Max) -> Max:
        return Max(jnp.maximum(self.value, other.value))
