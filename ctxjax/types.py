"""The PyTrees that cross function boundaries, and the letters that name their axes.

    B batch        P prompt        T response     L any sequence    M cache slots
    V vocabulary   D width         F mlp width    N layers          C shared prefix
    H query heads  K key/value heads               Dh head dim

A name such as ``tokens_BxT`` says: shape [B, T]. Masks are boolean and True where a token is real;
they are data, and are never inferred from token ids, because in several model families the padding
token *is* the end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Params = Any  # a nested dict of arrays, declared by models.transformer.param_specs


@struct.dataclass
class Prompts:
    """One view of a batch of questions, left-padded so that every row ends at column P-1.

    ``tokens_BxP`` int32 and ``mask_BxP`` bool; a row of three tokens with P = 5::

        tokens  0   0   17  4   9
        mask    F   F   T   T   T

    ``prefix_C`` int32, where it is given: the tokens that every row of the view starts with, in one row without
    padding, and then not repeated in ``tokens_BxP``. A row reads prefix_C, then its own tokens.
    """

    tokens_BxP: jax.Array
    mask_BxP: jax.Array
    prefix_C: jax.Array | None = None


def map_rows(function: Callable, tree, shared: Callable = lambda array: array):
    """The tree with ``function`` of every array whose leading axis is the batch, and ``shared`` of every
    ``prefix_C``, which has no such axis."""

    def node(value):
        if not isinstance(value, Prompts):
            return function(value)
        prefix_C = None if value.prefix_C is None else shared(value.prefix_C)
        return Prompts(function(value.tokens_BxP), function(value.mask_BxP), prefix_C)

    return jax.tree.map(node, tree, is_leaf=lambda value: isinstance(value, Prompts))


@struct.dataclass
class Batch:
    """A global batch: the same questions in several views.

    ``bare`` is x, ``context`` is (c, x), and ``other`` is (c', x') under a different context c', the
    rows on which the student is held to its old obedience, or None where no retention is wanted.
    ``row_number_B`` int32 names each row; sampling keys derive from it, not from the row's place.
    """

    bare: Prompts
    context: Prompts
    other: Prompts | None
    row_number_B: jax.Array


@struct.dataclass
class Rollout:
    """Sampled responses y. ``mask_BxT`` is True up to and including the first end token;
    ``logprobs_BxT`` (nats, float32) are under the distribution sampled from, 0 where the mask is False."""

    tokens_BxT: jax.Array
    mask_BxT: jax.Array
    logprobs_BxT: jax.Array


@struct.dataclass
class PrefixKV:
    """Keys and values of a prefix that all rows share, [N, K, C, Dh]: a function of the weights and of prefix_C.

    Valid as long as the weights it was computed from: once per run for a frozen model, once per step for a student.
    """

    keys: jax.Array
    values: jax.Array


@struct.dataclass
class KVCache:
    """Keys and values of all layers, and one write cursor for all rows.

    Left padding makes one scalar cursor enough: every row writes the same column at the same time.
    ``keys`` are [N, B, K, Dh, M] and ``values`` [N, B, K, M, Dh], in shallow models tuples of N such arrays without
    the axis of layers. That way round each of the two products of a query reads them in the order they lie in.
    ``mask_BxM`` is True where a slot holds a real token. ``prefix`` is what all rows read before their slots, or
    None; in shallow models a tuple of N, [K, C, Dh] each.
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]
    mask_BxM: jax.Array
    length: jax.Array
    prefix: PrefixKV | tuple[PrefixKV, ...] | None = None

    def extend(self, slots: int) -> KVCache:
        """The same with room for ``slots`` columns."""
        more = slots - self.mask_BxM.shape[1]

        def padded(tree, axis: int):
            return jax.tree.map(lambda x: jnp.pad(x, [(0, more * (a == x.ndim + axis)) for a in range(x.ndim)]), tree)

        keys, values = padded(self.keys, -1), padded(self.values, -2)
        return self.replace(keys=keys, values=values, mask_BxM=jnp.pad(self.mask_BxM, [(0, 0), (0, more)]))


@struct.dataclass
class TrainState:
    """All that a step replaces.

    ``params`` are what is trained: all weights, or an adapter's (models/lora.py). Frozen weights stay outside, since
    a step neither writes nor saves them. ``key`` is the root key and never changes: the randomness of a step is a
    pure function of (key, step, stream, row, position). ``ema`` is the moving average of ``params``, where the loss
    has a use for it.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    ema: Params | None = None


@struct.dataclass
class Frozen:
    """Weights that a step reads and never changes.

    ``teacher`` is f; ``base`` is what the student's adapter is joined to, or None where all its weights are trained.
    They may be the same arrays, and are then held once. ``teacher_prefix`` is what the teacher made of the prefix that
    all rows of the context view start with, or None where they share none: it goes with these weights and no others.
    """

    teacher: Params
    base: Params | None = None
    teacher_prefix: PrefixKV | None = None


@struct.dataclass
class Mean:
    """A mean kept as (total, count), so that micro-batches, devices and hosts can be added up first
    and divided once. An empty mean is 0, not NaN."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> Mean:
        """The masked mean of ``values``; a masked value may be NaN or infinite without harm, in value
        and in gradient."""
        mask = jnp.broadcast_to(mask, values.shape)
        return cls(jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> jax.Array:
        return self.total / jnp.maximum(self.count, 1.0)


@struct.dataclass
class Max:
    """A maximum, of numbers that are not negative, which parts of a batch add up to as they do to a Mean."""

    value: jax.Array

    def __add__(self, other: Max) -> Max:
        return Max(jnp.maximum(self.value, other.value))
