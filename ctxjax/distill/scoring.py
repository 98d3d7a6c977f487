"""The scoring pass: read [prompt; response] once, return the hidden states that predict the response tokens.

``chunked_head`` applies the output head chunk by chunk, since logits are hundreds of times larger.
"""

from __future__ import annotations

import jax

from ctxjax import masks
from ctxjax.models import transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params, PrefixKV, Prompts, Rollout


def response_hidden(
    params: Params, model: ModelConfig, prompts: Prompts, rollout: Rollout, prefix: PrefixKV | None = None
) -> jax.Array:
    """Return hidden states [B, T, D]: column t predicts response token t from the prompt and the tokens before t.

    A prefix that the prompts share is read once, as one row. ``prefix``: its keys and values under these ``params``, if
    the caller has computed them; those of a frozen model serve a whole run. Otherwise they are part of this pass, and
    of its gradient.
    """
    tokens_BxL, mask_BxL = masks.join_response(prompts, rollout)
    if prefix is None:
        prefix = transformer.prefix_kv(params, model, prompts.prefix_C)
    hidden_BxLxD = transformer.forward(params, model, tokens_BxL, mask_BxL, prefix)
    return masks.response_window(hidden_BxLxD, prompts.tokens_BxP.shape[1])
