"""cuDNN's flash attention, for GPUs.

Arrays are one device's rows and heads, [B, H, L, Dh]; cuDNN's own order is [B, L, H, Dh], in which the rows' queries
are one long sequence as they are in memory.

Without a prefix this is ``jax.nn.dot_product_attention``. Its ``return_residual`` does not serve the cascade: it rounds
the logarithm of the normaliser to the dtype of the queries (in bfloat16 8 is known to 0.016, by which the weights of
the parts would be wrong), and drops its gradient. So the parts call the forward and the backward rule below it.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp

from ctxjax.models.cascade import Part, cascade
from ctxjax.types import PrefixKV

try:
    from jax._src.cudnn import fused_attention_stablehlo as library
except ImportError:  # it is private; ``is_known`` then says so
    library = None

_ARRAYS = (
    "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v",
)  # fmt: skip
_OPTIONS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")
_FORWARD = (*_ARRAYS, *_OPTIONS, "cudnn_version", "return_residual")
_BACKWARD = (*_OPTIONS, "is_training", "return_residual", "res", "grad_output")  # is_training: not used


def is_known() -> bool:
    """Whether the installed JAX has the private functions that ``run_forward`` and ``run_backward`` call."""
    rules = (getattr(library, f"_dot_product_attention_{name}_rule", None) for name in ("fwd", "bwd"))
    return all(
        rule is not None and tuple(inspect.signature(rule).parameters) == known
        for rule, known in zip(rules, (_FORWARD, _BACKWARD))
    )


def attend(q, k, v, real_BxL, prefix: PrefixKV | None = None, implementation: str = "cudnn") -> jax.Array:
    """Return causal attention behind ``prefix``. Roll each row so that left padding becomes right padding, which the
    causal mask hides; a padding mask would be an array [B, 1, L, L]."""
    L = q.shape[2]
    padding_B = jnp.argmax(real_BxL, axis=1)

    def roll(x_BxNxLxDh, by_B):
        columns_BxL = (jnp.arange(L) + by_B[:, None]) % L
        return jnp.take_along_axis(x_BxNxLxDh, columns_BxL[:, None, :, None], axis=2)

    q, k, v = (_make_even(roll(x, padding_B).swapaxes(1, 2)) for x in (q, k, v))
    if prefix is None:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    else:
        prefix_k, prefix_v = (_make_even(x.swapaxes(0, 1)[None]) for x in (prefix.keys, prefix.values))
        shared = _make_prefix_part(prefix.keys.shape[1])
        out = cascade(_OWN_PART, shared, q, k, v, prefix_k, prefix_v, real_BxL)
    return roll(out[:, :L].swapaxes(1, 2), -padding_B)


def _make_even(x_BxLxNxDh):
    """cuDNN needs an even number of columns; no other column reads one that is added on the right."""
    return jnp.pad(x_BxLxNxDh, [(0, 0), (0, x_BxLxNxDh.shape[1] % 2), (0, 0), (0, 0)])


def _own_forward(q, k, v, _):
    out, normaliser = run_forward(q, k, v, k.shape[1], is_causal=True)
    return out, normaliser.swapaxes(1, 2)


def _own_backward(q, k, v, _, out, normaliser, d_out):
    return run_backward(q, k, v, out, normaliser.swapaxes(1, 2), d_out, k.shape[1], is_causal=True)


_OWN_PART = Part(_own_forward, _own_backward)


def _make_prefix_part(C: int) -> Part:
    """The queries of all rows, as one long sequence, against one set of C keys, which may have one more as padding."""

    def join_rows(x_BxLx):
        return x_BxLx.reshape(1, -1, *x_BxLx.shape[2:])

    def forward(q, k, v, _):
        out, normaliser = run_forward(join_rows(q), k, v, C, is_causal=False)
        return out.reshape(q.shape), normaliser.swapaxes(1, 2).reshape(q.shape[:3])

    def backward(q, k, v, _, out, normaliser, d_out):
        joined = (join_rows(out), join_rows(normaliser).swapaxes(1, 2), join_rows(d_out))
        d_q, d_k, d_v = run_backward(join_rows(q), k, v, *joined, C, is_causal=False)
        return d_q.reshape(q.shape), d_k, d_v

    return Part(forward, backward)


def run_forward(q_BxLxHxDh, k_BxMxKxDh, v_BxMxKxDh, keys: int, is_causal: bool) -> tuple[jax.Array, jax.Array]:
    """Return (out [B, L, H, Dh], the logarithm of the normaliser [B, H, L], float32). Queries read the first ``keys``
    keys; if ``is_causal``, all keys up to their own column."""
    arrays, options = _make_arguments(q_BxLxHxDh, k_BxMxKxDh, v_BxMxKxDh, keys, is_causal)
    return library._dot_product_attention_fwd_rule(*arrays, *options, library.check_cudnn_version(), True)[0]


def run_backward(
    q_BxLxHxDh, k_BxMxKxDh, v_BxMxKxDh, out_BxLxHxDh, normaliser_BxHxL, d_out_BxLxHxDh, keys: int, is_causal: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (d_q, d_k, d_v) by this output and normaliser, which the public function does not take."""
    arrays, options = _make_arguments(q_BxLxHxDh, k_BxMxKxDh, v_BxMxKxDh, keys, is_causal)
    kept = (*arrays, normaliser_BxHxL, out_BxLxHxDh)
    return tuple(library._dot_product_attention_bwd_rule(*options, True, False, kept, d_out_BxLxHxDh)[:3])


def _make_arguments(q, k, v, keys: int, is_causal: bool):
    """Return (_ARRAYS, _OPTIONS). Arrays of size 0 are not used."""
    B, unused = q.shape[0], jnp.zeros(0, q.dtype)
    mask, lengths = library.MaskType.CAUSAL if is_causal else library.MaskType.NO_MASK, (unused, unused)
    if keys < k.shape[1]:
        mask, lengths = library.MaskType.PADDING, tuple(jnp.full(B, size, jnp.int32) for size in (q.shape[1], keys))
    options = (q.shape[3] ** -0.5, 42, 0.0, (False, False), mask, library.AttentionLayout.BTNH.value, None)
    return (q, k, v, unused, *lengths, *[unused] * 4), options
