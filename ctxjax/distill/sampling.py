"""The sampler: prompts in, a Rollout out, one compiled program.

The prompts are read once, and once for all rows what they all start with (the head is applied to their last
column only), then a ``while_loop`` decodes a token per row until every row has ended or the length is
reached. Each token costs one uniform number per row, turned into a token through the inverse of the
cumulative distribution: a Gumbel-max sampler would draw V numbers per row and token.
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
from ctxjax.sharding import batch_spec, repeat_rows
from ctxjax.types import KVCache, Params, Prompts, Rollout

NEG_INF = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch those filters
    off; as in transformers, top-k comes first and top-p renormalises what it left. A response ends at any of
    ``eos_ids`` or after ``max_tokens`` tokens. ``pad_id`` fills the columns behind the end. ``weights`` names the
    sharding.DECODE_RULES by which weights lie on the mesh meanwhile; it does not change what is drawn. ``samples``
    responses are drawn to every prompt, which is read once for all of them."""

    max_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    weights: str = "gathered"
    samples: int = 1


class SamplerState(NamedTuple):
    """``column`` tokens of every row are drawn; the token in column-1 has not been read yet."""

    column: jax.Array
    token_B: jax.Array
    has_ended_B: jax.Array
    tokens_BxT: jax.Array
    logprobs_BxT: jax.Array
    cache: KVCache


def filtered(logits_BxV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits after temperature, top-k and top-p; excluded tokens are -1e30. Ties at a threshold stay in."""
    logits_BxV = logits_BxV / config.temperature
    if 0 < config.top_k < logits_BxV.shape[-1]:
        kth_Bx1 = lax.top_k(logits_BxV, config.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth_Bx1, NEG_INF, logits_BxV)
    if config.top_p < 1.0:
        probs_BxV = jax.nn.softmax(logits_BxV, axis=-1)
        sorted_BxV = jnp.sort(probs_BxV, axis=-1, descending=True)
        mass_before_BxV = jnp.cumsum(sorted_BxV, axis=-1) - sorted_BxV
        # The smallest probability among those needed to reach top_p; the first is always needed.
        least_Bx1 = jnp.min(jnp.where(mass_before_BxV < config.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(probs_BxV < least_Bx1, NEG_INF, logits_BxV)
    return logits_BxV


def inverse_cdf(probs_BxV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token whose interval of the cumulative distribution holds ``uniform_B``, int32 [B].

    Two levels, blocks of about sqrt(V) tokens and then tokens within the block, keep the running sums
    short, hence exact and cheap for a vocabulary of any size. A token of probability 0 is never drawn.
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
    """The first place of positive weight whose running sum exceeds the target, or the last of positive weight
    where rounding leaves none. (Rounded running sums may even step up at a place of weight 0.)"""
    places = jnp.arange(weights_BxN.shape[-1])
    positive_BxN = weights_BxN > 0
    above_BxN = positive_BxN & (cumulative_BxN > target_B[:, None])
    first_B = jnp.min(jnp.where(above_BxN, places, places.size), axis=-1)
    return jnp.minimum(first_B, jnp.max(jnp.where(positive_BxN, places, 0), axis=-1))


def draw(logits_BxV: jax.Array, config: SamplingConfig, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token per row and its log-probability under the distribution it was drawn from.

    Greedy decoding reports the log-probability at temperature 1.
    """
    if config.temperature == 0:
        token_B = jnp.argmax(logits_BxV, axis=-1)
        logprobs_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
    else:
        logprobs_BxV = jax.nn.log_softmax(filtered(logits_BxV, config), axis=-1)
        token_B = inverse_cdf(jnp.exp(logprobs_BxV), uniform_B)
    # Not take_along_axis, which drops a batch of one row and with it the batch's sharding.
    chosen_B = jax.vmap(lambda logprobs_V, token: logprobs_V[token])(logprobs_BxV, token_B)
    return token_B.astype(jnp.int32), chosen_B


def _growth(max_tokens: int) -> list[int]:
    """The response columns up to which each decode loop goes; the cache is as long as its loop needs.

    Attention reads the whole cache, filled or not. Up to four loops, each with a longer cache, save a quarter or
    more of those reads; each is compiled, so there are no more, and short responses have one.
    """
    size = max(32, -(-max_tokens // 4))
    return [*range(size, max_tokens, size), max_tokens]


def _repeated(cache: KVCache, count: int) -> KVCache:
    """The cache with every row ``count`` times, one after the other; the prefix is shared as before."""
    rows = 0 if isinstance(cache.keys, tuple) else 1
    keys, values = jax.tree.map(lambda kept: repeat_rows(kept, count, rows), (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values, mask_BxM=repeat_rows(cache.mask_BxM, count))


def sample(
    params: Params, model: ModelConfig, config: SamplingConfig, prompts: Prompts, row_keys_B: jax.Array
) -> Rollout:
    """Samples ``config.samples`` responses for every prompt, [B * samples, T], a prompt's one after the other.

    ``row_keys_B``: one key per prompt (rng.row_keys); the token at column t of a row depends on its own
    prompt, key, sample and t alone, so splitting a batch does not change what is drawn.
    """
    P = prompts.tokens_BxP.shape[1]
    B, T = prompts.tokens_BxP.shape[0] * config.samples, config.max_tokens
    row_keys_B = rng.sample_keys(row_keys_B, config.samples)
    head_DxV = transformer.head_weights(params, model)
    decoding_params = transformer.prepare_for_decoding(params, model, config.weights)
    uniforms_BxT = rng.token_uniforms(row_keys_B, T)  # all at once: hashing a few numbers takes as long as many

    def add_token(state: SamplerState, hidden_BxD: jax.Array, cache: KVCache) -> SamplerState:
        logits_BxV = transformer.finish_logits(transformer.apply_head(hidden_BxD, head_DxV), model)
        logits_BxV = jax.reshard(logits_BxV, batch_spec(None))  # sampled with the vocabulary whole
        uniform_B = lax.dynamic_index_in_dim(uniforms_BxT, state.column, axis=1, keepdims=False)
        token_B, logprob_B = draw(logits_BxV, config, uniform_B)
        token_B = jnp.where(state.has_ended_B, config.pad_id, token_B)
        logprob_B = jnp.where(state.has_ended_B, 0.0, logprob_B)
        place = (0, state.column)
        return SamplerState(
            column=state.column + 1,
            token_B=token_B,
            has_ended_B=state.has_ended_B | masks.is_any(token_B, config.eos_ids),
            tokens_BxT=lax.dynamic_update_slice(state.tokens_BxT, token_B[:, None], place),
            logprobs_BxT=lax.dynamic_update_slice(state.logprobs_BxT, logprob_B[:, None], place),
            cache=cache,
        )

    def step(state: SamplerState) -> SamplerState:
        hidden_BxD, cache = transformer.decode_step(
            decoding_params, model, state.token_B, ~state.has_ended_B, state.cache
        )
        return add_token(state, hidden_BxD, cache)

    prefix = transformer.prefix_kv(params, model, prompts.prefix_C)
    hidden_BxD, cache = transformer.prefill(params, model, prompts.tokens_BxP, prompts.mask_BxP, prefix)
    if config.samples > 1:
        hidden_BxD, cache = repeat_rows(hidden_BxD, config.samples), _repeated(cache, config.samples)
    rows, columns = batch_spec(), batch_spec(None)
    empty = SamplerState(
        column=jnp.int32(0),
        token_B=jnp.zeros((B,), jnp.int32, out_sharding=rows),
        has_ended_B=jnp.zeros((B,), bool, out_sharding=rows),
        tokens_BxT=jnp.full((B, T), config.pad_id, jnp.int32, out_sharding=columns),
        logprobs_BxT=jnp.zeros((B, T), jnp.float32, out_sharding=columns),
        cache=cache,
    )
    state = add_token(empty, hidden_BxD, cache)
    for stop in _growth(T):
        state = state._replace(cache=state.cache.extend(P + stop - 1))
        with jax.named_scope("decode"):
            state = lax.while_loop(lambda s, stop=stop: (s.column < stop) & ~jnp.all(s.has_ended_B), step, state)
    return Rollout(state.tokens_BxT, masks.until_eos(state.tokens_BxT, config.eos_ids), state.logprobs_BxT)
