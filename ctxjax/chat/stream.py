"""Sample responses a few tokens at a time, with the programs of the sampler: the tokens are those of ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
import functools

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng, sharding
from ctxjax.data import prompts as prompts_lib, shapes as shapes_lib
from ctxjax.distill import sampling as sampling_lib
from ctxjax.distill.sampling import SamplerState, SamplingConfig
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params, Prompts

TOKENS = 4  # sampled between two looks at them; every look prepares the weights once more


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def _begin(params, model: ModelConfig, sampling: SamplingConfig, prompts: Prompts, key, row_number_B) -> SamplerState:
    weights = sampling_lib.prepare(params, model, sampling)
    state = sampling_lib.begin(params, weights, model, sampling, prompts, rng.row_keys(key, row_number_B))
    # One size from the first token to the last: every size is a program to compile, which takes longer than reading
    # the empty columns of two rows.
    return state._replace(cache=state.cache.extend(prompts.tokens_BxP.shape[1] + sampling.max_tokens - 1))


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def _advance(params, model: ModelConfig, sampling: SamplingConfig, state: SamplerState, stop):
    """Return (state, its tokens [B, T] and has_ended [B] on every device)."""
    state = sampling_lib.advance(sampling_lib.prepare(params, model, sampling), model, sampling, state, stop)
    return state, sharding.replicate((state.tokens_BxT, state.has_ended_B))


def stream(
    params: Params, model: ModelConfig, sampling: SamplingConfig, prompts: list[list[int]], key: jax.Array, mesh: Mesh
) -> Iterator[list[tuple[list[int], bool]]]:
    """Sample a response to each prompt; iterate over (its tokens so far, whether it has ended) for each prompt.

    All prompts are drawn with the same numbers, so that responses differ only if the prompts do. The end token is one
    of the tokens. Ends when every response has ended or has ``sampling.max_tokens`` tokens.
    """
    columns = shapes_lib.round_conversation(max(map(len, prompts)))
    count = len(prompts)
    prompts = prompts + prompts[-1:] * (-count % sharding.batch_ways(mesh))  # copies fill the devices
    batch = prompts_lib.left_pad(prompts, columns, sampling.pad_id)
    with jax.set_mesh(mesh):
        batch, row_number_B = sharding.put_batch((batch, np.zeros(len(prompts), np.int32)), mesh)
        state = _begin(params, model, sampling, batch, key, row_number_B)
    for stop in range(TOKENS, sampling.max_tokens + TOKENS, TOKENS):
        stop = min(stop, sampling.max_tokens)
        with jax.set_mesh(mesh):
            state, (tokens_BxT, has_ended_B) = _advance(params, model, sampling, state, np.int32(stop))
            tokens_BxT, has_ended_B = jax.device_get((tokens_BxT[:count], has_ended_B[:count]))
        yield [(_until_end(ids[:stop], sampling.eos_ids), bool(ended)) for ids, ended in zip(tokens_BxT, has_ended_B)]
        if has_ended_B.all():
            return


def _until_end(tokens: np.ndarray, eos_ids: tuple[int, ...]) -> list[int]:
    ends = np.flatnonzero(np.isin(tokens, eos_ids))
    return tokens[: ends[0] + 1 if len(ends) else None].tolist()
