"""Attention over two sets of keys, each computed by itself: a prefix that all rows share, and a row's own columns.

Part i returns what its queries read, and the logarithm of its normaliser. Both together give attention over all keys:

    o_i = softmax(q k_i) v_i           l_i = log sum_m exp(q k_im)
    o   = sum_i exp(l_i - l) o_i       l   = log sum_i exp(l_i)

So the prefix part needs no mask and reads one set of keys: the queries of all rows are one long list (Juravsky et al.
2024, Hydragen, arXiv:2402.05099).

The gradient is split in the same way. A key's score has the gradient

    d_s_m = p_m (d_o v_m - delta)      p_m = exp(q k_m - l)      delta = d_o o

in which l and o are all that it needs to know of the other keys. So the backward pass of a kernel for one set of keys
(FlashAttention-2, arXiv:2307.08691) computes a part's share of the joint gradient if it is given the joint o and l
instead of its own. d_q is the sum of both parts'; keys and values belong to one part.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
    """Attention over one set of keys, by a kernel that holds no scores. Arrays are in the kernel's own order of axes.

    ``forward(q, k, v, real)`` -> (out, in q's shape; the logarithm of the normaliser, float32, that shape without Dh).
    ``backward(q, k, v, real, out, normaliser, d_out)`` -> (d_q, d_k, d_v), by the ``out`` and ``normaliser`` given.
    ``real_BxL`` are the rows' real columns. Padding may be hidden in another way, but every query must read a key.
    """

    forward: Callable
    backward: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cascade(own: Part, shared: Part, q, k, v, prefix_k, prefix_v, real_BxL) -> jax.Array:
    """Return attention over [prefix_k; k], in q's shape and dtype. It never holds all scores."""
    return _forward(own, shared, q, k, v, prefix_k, prefix_v, real_BxL)[0]


def _forward(own: Part, shared: Part, q, k, v, prefix_k, prefix_v, real_BxL):
    parts = own.forward(q, k, v, real_BxL), shared.forward(q, prefix_k, prefix_v, real_BxL)
    out, joint = _join(*parts)
    out = out.astype(q.dtype)
    return out, (q, k, v, prefix_k, prefix_v, real_BxL, out, joint)


def _join(*parts):
    """Return (o, l) of parts (o_i, l_i), in float32."""
    joint = functools.reduce(jnp.logaddexp, [normaliser for _, normaliser in parts])
    return sum(out * jnp.exp(normaliser - joint)[..., None] for out, normaliser in parts), joint


def _backward(own: Part, shared: Part, kept, d_out):
    q, k, v, prefix_k, prefix_v, real_BxL, out, joint = kept
    d_q, d_k, d_v = own.backward(q, k, v, real_BxL, out, joint, d_out)
    more_d_q, d_prefix_k, d_prefix_v = shared.backward(q, prefix_k, prefix_v, real_BxL, out, joint, d_out)
    d_q = (d_q.astype(jnp.float32) + more_d_q).astype(q.dtype)
    return d_q, d_k, d_v, d_prefix_k, d_prefix_v, None


cascade.defvjp(_forward, _backward)
