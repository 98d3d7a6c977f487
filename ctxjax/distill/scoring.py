"""The scoring pass: reads [prompt; response] once and returns the hidden states [B, T, D] that predict the T response
tokens. What becomes of them is chunked_head's business: logits are hundreds of times larger."""

from __future__ import annotations

import jax

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
    tokens_BxL, mask_BxL = masks.join_response(prompts, rollout)
    if prefix is None:
        prefix = transformer.prefix_kv(params, model, prompts.prefix_C)
    hidden_BxLxD = transformer.forward(params, model, tokens_BxL, mask_BxL, prefix)
    return masks.response_window(hidden_BxLxD, prompts.tokens_BxP.shape[1])
