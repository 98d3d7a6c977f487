"""Decode many prompts in batches of one compiled program; arrays in and out."""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng, sharding
from ctxjax.data import prompts as prompts_lib, shapes as shapes_lib
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.host import preemption, progress
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params, Prompts, Rollout, map_rows


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def _decode(params, model: ModelConfig, sampling: SamplingConfig, prompts: Prompts, key, row_number_B) -> Rollout:
    return sharding.replicate(sample(params, model, sampling, prompts, rng.row_keys(key, row_number_B)))


def pad_prompts(token_lists: list[list[int]], pad_id: int, others: Sequence[list[int]] = ()) -> Prompts:
    """Pad prompts to the columns of the longest; what all of them start with is stored once.

    ``others``: further prompts that count for both, so that batches which are padded one by one have the same shape.
    """
    counted = [*token_lists, *others]
    prefix = prompts_lib.choose_shared_prefix(counted)
    columns = shapes_lib.make_shape(max(map(len, counted)), len(prefix)).columns
    return prompts_lib.left_pad(token_lists, columns, pad_id, prefix)


def batch_size(rows: int, most: int, mesh: Mesh) -> int:
    """Return the size of each of the fewest batches of at most ``most`` rows that hold ``rows``.

    Batches are as even as the mesh allows: few copies fill the last one.
    """
    ways = sharding.batch_ways(mesh)
    return -(-rows // -(-rows // most) // ways) * ways


def in_batches(tree, batch_size: int, mesh: Mesh):
    """Yield (number of rows that count, device batch) along the leading axis of a tree of host arrays.

    Copies of the last row fill the last batch, so that one compiled program serves all batches.
    """
    count = jax.tree.leaves(tree)[0].shape[0]
    for start in range(0, count, batch_size):
        preemption.raise_if_requested()
        places = np.minimum(np.arange(start, start + batch_size), count - 1)
        real = min(batch_size, count - start)
        yield real, sharding.put_batch(take_rows(tree, places), mesh)


def take_rows(tree, index):
    return map_rows(lambda array: np.asarray(array)[index], tree)


def concatenate(parts: list, axis: int = 0):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=axis), *parts)


def decode(
    params: Params,
    model: ModelConfig,
    sampling: SamplingConfig,
    prompts: Prompts,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
    numbers: np.ndarray | None = None,
    what: str = "",
) -> Rollout:
    """Return responses to n prompts (host arrays [n, P]) as host arrays [n * samples, T], all of a prompt in a row.

    The randomness of prompt i is (key, numbers[i]), by default (key, i). ``batch_size``: responses decoded at a time.
    ``what``: of the progress bar; "" for none.
    """
    rows = np.arange(prompts.tokens_BxP.shape[0]) if numbers is None else numbers
    rows = rows.astype(np.int32)
    ways, parts, running = sharding.batch_ways(mesh), [], None
    batch_size = max(batch_size // sampling.samples // ways, 1) * ways
    with progress.Bar(what, len(rows) * sampling.samples, "response", compiles=True) as bar:
        for real, (batch, ids) in in_batches((prompts, rows), batch_size, mesh):
            rollout = _decode(params, model, sampling, batch, key, ids)
            # The previous batch is copied to the host while this one is decoded.
            parts += _copy_to_host(running, bar)
            running = rollout, real * sampling.samples
        return concatenate(parts + _copy_to_host(running, bar))


def _copy_to_host(running: tuple[Rollout, int] | None, bar: progress.Bar) -> list[Rollout]:
    """Wait for (rollout, number of rows that count) and return these rows; nothing if there is none."""
    if running is None:
        return []
    copied = [take_rows(jax.device_get(running[0]), slice(running[1]))]
    bar.update(running[1])
    return copied
