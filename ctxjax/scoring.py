"""The scoring pass: reads [prompt; response] once and returns the hidden states [B, T, D] that predict the T response
tokens. What becomes of them is head_scan's business: logits are hundreds of times larger."""

from __future__ import annotations

import jax

from ctxjax import masks
from ctxjax.models import transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.types import Params, Prompts, Rollout


def response_hidden(params: Params, model: ModelConfig, prompts: Prompts, rollout: Rollout) -> jax.Array:
    """Hidden states [B, T, D]: column t predicts response token t, given the prompt and tokens before t."""
    tokens_BxL, mask_BxL = masks.joined(prompts, rollout)
    hidden_BxLxD = transformer.forward(params, model, tokens_BxL, mask_BxL)
    return masks.response_window(hidden_BxLxD, prompts.tokens_BxP.shape[1])
