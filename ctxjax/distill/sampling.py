"""The sampler: prompts in, a Rollout out, one compiled program.

    1. prefix_kv reads the shared prefix of all prompts once; prefill reads each prompt's own tokens, and the head is
       applied to the last column only.
    2. Loops decode one token per row until every row has ended or the length limit is reached. While most rows go on,
       the cache grows from loop to loop (``_loop_ends``); after that, rows that have ended leave the batch
       (``row_limits``).

``sample`` is both parts in one program. ``begin`` and ``advance`` are the parts, for callers that show the tokens as
they are sampled: they return the same tokens.

A token costs one uniform number per row, which the inverse of the cumulative distribution turns into a token. A
Gumbel-max sampler would draw V numbers per row and token.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax import masks, rng
from ctxjax.models import transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.sharding import batch_spec, batch_ways, put_own_rows, repeat_rows, split_devices, take_own_rows
from ctxjax.types import KVCache, Params, Prompts, Rollout

NEG_INF = -1e30
DECODE_TO = "decode_to_"  # the name scope of a decode loop that ends at a known column, which follows
FEWER_ROWS = "fewer_rows"  # the name scope of the decode loops that run only if rows end early


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch those filters off; like in transformers, top-k comes
    first and top-p renormalises what is left. A response ends at any of ``eos_ids`` or after ``max_tokens`` tokens;
    ``pad_id`` fills the columns after its end. ``weights``: the weight sharding during decoding, a key of
    sharding.DECODE_RULES; it does not change the tokens. ``samples``: responses per prompt; the prompt is read once.
    """

    max_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    weights: str = "gathered"
    samples: int = 1


class DecodingWeights(NamedTuple):
    """What every step reads: ``read`` by the decoder (transformer.prepare_for_decoding), and the output head."""

    read: Params
    head_DxV: jax.Array


class SamplerState(NamedTuple):
    """``column`` tokens of every row are sampled. ``token_B`` is the last one, which the model has not read yet.
    ``uniforms_BxT``: the random number of each token."""

    column: jax.Array
    token_B: jax.Array
    has_ended_B: jax.Array
    tokens_BxT: jax.Array
    logprobs_BxT: jax.Array
    uniforms_BxT: jax.Array
    cache: KVCache


def filter_logits(logits_BxV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Apply temperature, top-k and top-p. Excluded tokens get -1e30. Tokens tied at a threshold are kept."""
    logits_BxV = logits_BxV / config.temperature
    if 0 < config.top_k < logits_BxV.shape[-1]:
        kth_Bx1 = lax.top_k(logits_BxV, config.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth_Bx1, NEG_INF, logits_BxV)
    if config.top_p < 1.0:
        probs_BxV = jax.nn.softmax(logits_BxV, axis=-1)
        sorted_BxV = jnp.sort(probs_BxV, axis=-1, descending=True)
        mass_before_BxV = jnp.cumsum(sorted_BxV, axis=-1) - sorted_BxV
        # The smallest probability among those needed to reach top_p. The largest one is always needed.
        least_Bx1 = jnp.min(jnp.where(mass_before_BxV < config.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(probs_BxV < least_Bx1, NEG_INF, logits_BxV)
    return logits_BxV


def invert_cdf(probs_BxV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Return the token whose interval of the cumulative distribution contains ``uniform_B``, int32 [B].

    Two levels, first blocks of about sqrt(V) tokens and then the tokens of one block, keep the running sums short: they
    stay exact and cheap for any vocabulary size. A token of probability 0 is never returned.
    """
    B, V = probs_BxV.shape
    block = max(8, 1 << (V - 1).bit_length() // 2)
    blocks = -(-V // block)
    probs_BxNxK = jnp.pad(probs_BxV, [(0, 0), (0, blocks * block - V)]).reshape(B, blocks, block)
    mass_BxN = jnp.sum(probs_BxNxK, axis=-1)
    cumulative_BxN = jnp.cumsum(mass_BxN, axis=-1)
    target_B = uniform_B * cumulative_BxN[:, -1]
    block_B = _first_above(cumulative_BxN, mass_BxN, target_B)
    places = jnp.arange(blocks)
    before_B = jnp.sum(jnp.where(places < block_B[:, None], mass_BxN, 0.0), axis=-1)
    within_BxK = jnp.sum(jnp.where((places == block_B[:, None])[..., None], probs_BxNxK, 0.0), axis=1)
    return block_B * block + _first_above(jnp.cumsum(within_BxK, axis=-1), within_BxK, target_B - before_B)


def _first_above(cumulative_BxN: jax.Array, weights_BxN: jax.Array, target_B: jax.Array) -> jax.Array:
    """Return the first index of positive weight whose running sum exceeds the target.

    If rounding leaves none, return the last index of positive weight. Rounded running sums may increase even at an
    index of weight 0.
    """
    places = jnp.arange(weights_BxN.shape[-1])
    positive_BxN = weights_BxN > 0
    above_BxN = positive_BxN & (cumulative_BxN > target_B[:, None])
    first_B = jnp.min(jnp.where(above_BxN, places, places.size), axis=-1)
    return jnp.minimum(first_B, jnp.max(jnp.where(positive_BxN, places, 0), axis=-1))


def draw_token(logits_BxV: jax.Array, config: SamplingConfig, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sample one token per row: (token int32 [B], its log-probability at the temperature, nats [B]).

    The log-probability is that among all tokens, before top-k and top-p, since the losses score all tokens too. Greedy
    decoding returns the log-probability at temperature 1.
    """
    if config.temperature == 0:
        token_B = jnp.argmax(logits_BxV, axis=-1)
        logprobs_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
    else:
        logprobs_BxV = jax.nn.log_softmax(logits_BxV / config.temperature, axis=-1)
        filtered_BxV = jax.nn.log_softmax(filter_logits(logits_BxV, config), axis=-1)
        token_B = invert_cdf(jnp.exp(filtered_BxV), uniform_B)
    # take_along_axis would drop the batch axis of a single row, and the batch's sharding with it.
    chosen_B = jax.vmap(lambda logprobs_V, token: logprobs_V[token])(logprobs_BxV, token_B)
    return token_B.astype(jnp.int32), chosen_B


def _loop_ends(max_tokens: int) -> list[int]:
    """Return the response columns at which the decode loops end; each loop has a cache of its own length.

    Attention reads the whole cache, filled or not. Up to four loops with growing caches save a quarter or more of those
    reads. Each loop is compiled separately, so there are at most four, and one for short responses.
    """
    size = max(32, -(-max_tokens // 4))
    return [*range(size, max_tokens, size), max_tokens]


def row_limits(rows: int, max_tokens: int) -> list[int]:
    """Return the numbers of unfinished rows at which the decode loops end, on each device, in descending order down to
    0. The number at which a loop ends is the number of rows that the next one decodes.

    The loops of ``_loop_ends`` decode all ``rows`` and end at the first limit. After them, loop i of n - 1 decodes
    (1 - i / n)^2 of the rows, with a cache of full length. That is close to the cheapest choice if every token is
    equally likely to be the last (benchmarks/README.md). Each loop is compiled separately, so n is 1 for every 32
    tokens and at most 7, and no loop has fewer than four rows.
    """
    count = min(max_tokens // 32, 7)
    limits = [max(4, -(-rows * left**2 // count**2)) for left in range(count - 1, 0, -1)]
    return [limit for limit in dict.fromkeys(limits) if limit < rows] + [0]


def prepare(params: Params, model: ModelConfig, config: SamplingConfig) -> DecodingWeights:
    """Cast and reshard the weights for ``begin`` and ``advance``. Call it before a decode loop, not inside."""
    read = transformer.prepare_for_decoding(params, model, config.weights)
    return DecodingWeights(read, transformer.head_weights(params, model))


def begin(
    params: Params,
    weights: DecodingWeights,
    model: ModelConfig,
    config: SamplingConfig,
    prompts: Prompts,
    row_keys_B: jax.Array,
) -> SamplerState:
    """Read the prompts and sample the first token of every response. The cache has room for the prompts only."""
    prefix = transformer.prefix_kv(params, model, prompts.prefix_C)
    hidden_BxD, cache = transformer.prefill(params, model, prompts.tokens_BxP, prompts.mask_BxP, prefix)
    if config.samples > 1:
        hidden_BxD = repeat_rows(hidden_BxD, config.samples)
        cache = cache.map_rows(lambda x, axis: repeat_rows(x, config.samples, axis))
    B, T = hidden_BxD.shape[0], config.max_tokens
    rows, columns = batch_spec(), batch_spec(None)
    empty = SamplerState(
        column=jnp.int32(0),
        token_B=jnp.zeros((B,), jnp.int32, out_sharding=rows),
        has_ended_B=jnp.zeros((B,), bool, out_sharding=rows),
        tokens_BxT=jnp.full((B, T), config.pad_id, jnp.int32, out_sharding=columns),
        logprobs_BxT=jnp.zeros((B, T), jnp.float32, out_sharding=columns),
        # All at once: hashing few numbers takes as long as many.
        uniforms_BxT=rng.token_uniforms(rng.sample_keys(row_keys_B, config.samples), T),
        cache=cache,
    )
    return _add_token(weights, model, config, empty, hidden_BxD, cache)


def advance(
    weights: DecodingWeights,
    model: ModelConfig,
    config: SamplingConfig,
    state: SamplerState,
    stop: jax.Array | int,
    limit: int = 0,
) -> SamplerState:
    """Sample until ``stop`` columns are sampled, or until no device has more than ``limit`` rows that have not ended.
    The cache must have room for ``stop`` - 1 tokens after the prompts."""

    def is_unfinished(state: SamplerState) -> jax.Array:
        unfinished_W = jnp.sum(split_devices(~state.has_ended_B), axis=1)
        return (state.column < stop) & (jnp.max(unfinished_W) > limit)

    def step(state: SamplerState) -> SamplerState:
        hidden_BxD, cache = transformer.decode_step(weights.read, model, state.token_B, ~state.has_ended_B, state.cache)
        return _add_token(weights, model, config, state, hidden_BxD, cache)

    # The column is a part of the loop's name, for those who count what a compiled program does (plan/hlo.py).
    with jax.named_scope(f"{DECODE_TO}{stop}" if isinstance(stop, int) else "decode"):
        return lax.while_loop(is_unfinished, step, state)


def _finish(
    weights: DecodingWeights, model: ModelConfig, config: SamplingConfig, state: SamplerState, limits: list[int]
) -> tuple[jax.Array, jax.Array]:
    """Decode the at most ``limits[0]`` unfinished rows of every device to their end, without the rows that have ended.
    Return the tokens and log-probabilities of all rows, each [B, T]."""
    rows, *fewer = limits
    if rows == 0:
        return state.tokens_BxT, state.logprobs_BxT
    place_WxR = jnp.argsort(split_devices(state.has_ended_B), axis=1, stable=True)[:, :rows]  # unfinished ones first
    cache = state.cache.map_rows(lambda x, axis: take_own_rows(x, place_WxR, axis))
    kept = jax.tree.map(lambda x: take_own_rows(x, place_WxR), state._replace(column=None, cache=None))
    kept = kept._replace(column=state.column, cache=cache)
    with jax.named_scope(FEWER_ROWS):
        kept = advance(weights, model, config, kept, config.max_tokens, fewer[0])
    tokens_RxT, logprobs_RxT = _finish(weights, model, config, kept, fewer)
    return (
        put_own_rows(state.tokens_BxT, place_WxR, tokens_RxT),
        put_own_rows(state.logprobs_BxT, place_WxR, logprobs_RxT),
    )


def _add_token(
    weights: DecodingWeights,
    model: ModelConfig,
    config: SamplingConfig,
    state: SamplerState,
    hidden_BxD: jax.Array,
    cache: KVCache,
) -> SamplerState:
    logits_BxV = transformer.finish_logits(transformer.apply_head(hidden_BxD, weights.head_DxV), model)
    logits_BxV = jax.reshard(logits_BxV, batch_spec(None))  # sampling needs the whole vocabulary on each device
    uniform_B = lax.dynamic_index_in_dim(state.uniforms_BxT, state.column, axis=1, keepdims=False)
    token_B, logprob_B = draw_token(logits_BxV, config, uniform_B)
    token_B = jnp.where(state.has_ended_B, config.pad_id, token_B)
    logprob_B = jnp.where(state.has_ended_B, 0.0, logprob_B)
    place = (0, state.column)
    return state._replace(
        column=state.column + 1,
        token_B=token_B,
        has_ended_B=state.has_ended_B | masks.is_any(token_B, config.eos_ids),
        tokens_BxT=lax.dynamic_update_slice(state.tokens_BxT, token_B[:, None], place),
        logprobs_BxT=lax.dynamic_update_slice(state.logprobs_BxT, logprob_B[:, None], place),
        cache=cache,
    )


def sample(
    params: Params, model: ModelConfig, config: SamplingConfig, prompts: Prompts, row_keys_B: jax.Array
) -> Rollout:
    """Sample ``config.samples`` responses for every prompt, [B * samples, T], a prompt's samples adjacent.

    ``row_keys_B``: one key per prompt (rng.row_keys). The token at column t depends only on its own prompt, key, sample
    number and t, so splitting a batch does not change the samples.
    """
    weights = prepare(params, model, config)
    state = begin(params, weights, model, config, prompts, row_keys_B)
    limits = row_limits(state.token_B.shape[0] // batch_ways(), config.max_tokens)
    for stop in _loop_ends(config.max_tokens):
        state = state._replace(cache=state.cache.extend(prompts.tokens_BxP.shape[1] + stop - 1))
        state = advance(weights, model, config, state, stop, limits[0])
    tokens_BxT, logprobs_BxT = _finish(weights, model, config, state, limits)
    return Rollout(tokens_BxT, masks.until_eos(tokens_BxT, config.eos_ids), logprobs_BxT)
