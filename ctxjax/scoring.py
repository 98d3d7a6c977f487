"""The scoring passes: hidden states of the response window, and the head applied in chunks of tokens.

A pass reads [prompt; response] once and returns hidden states [B, T, D] that predict the T response
tokens. Logits over a vocabulary of 128k would be hundreds of times larger than the hidden states, so
they only ever exist for one chunk of tokens, and are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from ctxjax import masks
from ctxjax.models import transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params, PrefixKV, Prompts, Rollout


def response_hidden(
    params: Params, model: ModelConfig, prompts: Prompts, rollout: Rollout, prefix: PrefixKV | None = None
) -> jax.Array:
    """Hidden states [B, T, D]: column t predicts response token t, given the prompt and tokens before t.

    Where the prompts share a prefix, it is read once, as one row. ``prefix`` is that reading, of these params, where
    the caller has it already: a frozen model's serves a whole run. Without it, it is part of this pass, gradient
    included.
    """
    tokens_BxL, mask_BxL = masks.joined(prompts, rollout)
    if prefix is None:
        prefix = transformer.prefix_kv(params, model, prompts.prefix_C)
    hidden_BxLxD = transformer.forward(params, model, tokens_BxL, mask_BxL, prefix)
    return masks.response_window(hidden_BxLxD, prompts.tokens_BxP.shape[1])


def over_token_chunks(function: Callable, chunk: int, *arrays_BxTx_: jax.Array):
    """``function`` of [B, t, ...] slices, t = ``chunk`` response columns, its [B, t] results joined to [B, T].

    Each chunk is checkpointed: what the function makes inside (logits) is neither kept for the backward
    pass nor ever present for two chunks at once. A last, shorter chunk is padded and cut off again.
    """
    T = arrays_BxTx_[0].shape[1]
    if chunk >= T:
        return jax.checkpoint(function)(*arrays_BxTx_)
    count = -(-T // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * chunk)[:, :T]

    body = jax.checkpoint(lambda _, slices: (None, function(*slices)))
    _, out = lax.scan(body, None, tuple(split(x) for x in arrays_BxTx_))
    return jax.tree.map(join, out)
