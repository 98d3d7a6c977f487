"""The output head and the losses on it, a few response columns at a time, with their gradient in the same loop.

A loss that compares distributions over a vocabulary of 128k needs several [B, T, V] arrays, each hundreds of times
larger than the hidden states. Here they never exist whole:

    for each chunk of response columns:
        logits[pass] = hidden[pass] @ head                         [B, t, V], every pass of the loss
        values[name] = function(logits, ...)                       [B, t], nats per token
        d_logits     = gradient of sum(weights * values)           [B, t, V]
        d_hidden    += d_logits @ head.T                           [B, t, D]
        d_head      += hidden.T @ d_logits                         [D, V]
    the backward pass only multiplies d_hidden and d_head by the incoming scalar

Every logit is computed once. Columns after the longest response are skipped. This works because the loss is linear in
the values per token, with weights (1 / number of response tokens, times beta) that are known beforehand. ``dense`` is
the same function with all logits at once and plain autodiff; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax.models.linear import find_precision
from ctxjax.models.transformer import apply_head
from ctxjax.sharding import BATCH, WEIGHT_RULES, batch_spec, batch_ways

# (logits {pass: [B, t, V]}, further [B, t] slices) -> values per token {name: [B, t]}.
TokenFunction = Callable[..., dict[str, jax.Array]]


def dense(
    function: TokenFunction,
    chunk: int,
    hidden: dict[str, jax.Array],
    heads: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    mask_BxT: jax.Array,
    *others_BxT: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, values) like ``chunked``, by the obvious program; ``chunk`` is not used."""
    del chunk
    values = function({name: apply_head(h, heads[name]) for name, h in hidden.items()}, *others_BxT)
    masked = {name: jnp.where(mask_BxT, value, 0.0) for name, value in stop_gradient(values).items()}
    return _weighted_sum(values, weights), masked


def chunked(
    function: TokenFunction,
    chunk: int,
    hidden: dict[str, jax.Array],
    heads: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    mask_BxT: jax.Array,
    *others_BxT: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, values): the sum over names and tokens of weight * value, and the values {name: [B, T]} themselves.

    ``function`` gets the logits {pass: [B, t, V]}, float32, and slices of ``others_BxT``, t = ``chunk`` columns, and
    returns float32 values {name: [B, t]}. It may not close over traced arrays.
    ``hidden``: pass -> [B, T, D]. ``heads``: pass -> [D, V], the same array object for passes that share a head.
    ``weights``: name -> [B, T] float32, for the values that are part of the loss; 0 for masked tokens.
    Values are 0 after the longest response. Gradients flow from the loss to ``hidden`` and ``heads``, and are computed
    only for those that the caller differentiates. No gradient flows from the values.
    """
    # Passes that share a head share its gradient: one matrix product computes it.
    distinct: dict[int, jax.Array] = {id(head): head for head in heads.values()}
    head_names = {key: f"head{index}" for index, key in enumerate(distinct)}
    head_of = tuple((name, head_names[id(heads[name])]) for name in hidden)
    T = mask_BxT.shape[1]
    chunk = min(chunk, T)
    padding = -T % chunk

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x

    hidden, weights, mask_BxT, others_BxT = jax.tree.map(pad, (hidden, weights, mask_BxT, others_BxT))
    distinct_heads = {head_names[key]: head for key, head in distinct.items()}
    loss, values = _chunked(function, chunk, head_of, hidden, distinct_heads, (weights, mask_BxT, others_BxT))
    return loss, {name: stop_gradient(value)[:, :T] for name, value in values.items()}


def _weighted_sum(values: dict[str, jax.Array], weights: dict[str, jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.where(w != 0, w * values[name], 0.0)) for name, w in weights.items()), jnp.float32(0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(function, chunk, head_of, hidden, heads, fixed):
    loss, values, _ = _sweep(function, chunk, head_of, hidden, heads, fixed, (), ())
    return loss, values


def _forward(function, chunk, head_of, hidden, heads, fixed):
    def is_primal(node):
        return hasattr(node, "perturbed")

    # Sorted: the order shows in the compiled program, which must be the same in every process.
    wanted = [tuple(sorted(name for name, node in tree.items() if node.perturbed)) for tree in (hidden, heads)]
    arrays = jax.tree.map(lambda node: node.value, (hidden, heads, fixed), is_leaf=is_primal)
    loss, values, gradients = _sweep(function, chunk, head_of, *arrays, *wanted)
    return (loss, values), gradients


def _backward(function, chunk, head_of, gradients, cotangents):
    del function, chunk, head_of
    scale = cotangents[0]
    if not isinstance(scale, jax.Array):  # a symbolic zero: only the values were differentiated, and they have none
        scale = jnp.float32(0)
    hidden, heads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return hidden, heads, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _sweep(function, chunk, head_of, hidden, heads, fixed, wanted_hidden, wanted_heads):
    """The loop of the module's docstring.

    ``wanted_hidden`` and ``wanted_heads`` name the inputs that need a gradient. Returns (loss, values, (gradients of
    hidden, gradients of heads)), with None for gradients that are not wanted.
    """
    _, mask_BxT, others_BxT = fixed
    B, T = mask_BxT.shape
    ways, head_of = batch_ways(), dict(head_of)
    trained = [name for name in hidden if name in wanted_hidden or head_of[name] in wanted_heads]
    dtype = next(iter(hidden.values())).dtype
    cast_heads = {name: head.astype(dtype) for name, head in heads.items()}

    def slice_chunk(x, index):
        return lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1)

    def write_chunk(x, part, index):
        return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), index * chunk, axis=1)

    def apply_heads(index):
        h = {name: slice_chunk(x, index) for name, x in hidden.items()}
        return h, {name: apply_head(x, cast_heads[head_of[name]]) for name, x in h.items()}

    def per_device(x_BxtxE):  # [ways, B/ways, t, E]: every device sums its own share of a head's gradient in place
        spec = jax.P(BATCH, None, None, *jax.typeof(x_BxtxE).sharding.spec[2:])
        return jnp.reshape(x_BxtxE, (ways, B // ways, *x_BxtxE.shape[1:]), out_sharding=spec)

    def step(index, carry):
        loss, values, d_hidden, d_heads = carry
        h, logits = apply_heads(index)
        weights, _, others = jax.tree.map(lambda x: slice_chunk(x, index), fixed)

        def chunk_loss(trained_logits):
            of_chunk = function(logits | trained_logits, *others)
            return _weighted_sum(of_chunk, weights), of_chunk

        trained_logits = {name: logits[name] for name in trained}
        (loss_of_chunk, of_chunk), d_logits = jax.value_and_grad(chunk_loss, has_aux=True)(trained_logits)
        d_logits = {name: g.astype(dtype) for name, g in d_logits.items()}
        for name in wanted_hidden:
            head_DxV = cast_heads[head_of[name]]
            d_h = jnp.einsum(
                "btv,dv->btd", d_logits[name], head_DxV,
                precision=find_precision(head_DxV), out_sharding=batch_spec(None, None),
            )  # fmt: skip
            d_hidden = d_hidden | {name: write_chunk(d_hidden[name], d_h, index)}
        for head in wanted_heads:
            mine = [name for name in trained if head_of[name] == head]
            h_of_head = jnp.concatenate([per_device(h[name]) for name in mine], axis=2)
            d_logits_of_head = jnp.concatenate([per_device(d_logits[name]) for name in mine], axis=2)
            d_head_WxDxV = jnp.einsum(
                "wntd,wntv->wdv", h_of_head, d_logits_of_head,
                precision=find_precision(h_of_head), preferred_element_type=jnp.float32, out_sharding=_HEADS_SPEC,
            )  # fmt: skip
            d_heads = d_heads | {head: d_heads[head] + d_head_WxDxV}
        mask = slice_chunk(mask_BxT, index)
        values = {name: write_chunk(values[name], jnp.where(mask, v, 0.0), index) for name, v in of_chunk.items()}
        return loss + loss_of_chunk, values, d_hidden, d_heads

    names = jax.eval_shape(lambda: function(apply_heads(0)[1], *(slice_chunk(x, 0) for x in others_BxT)))
    start = (
        jnp.float32(0),
        {name: jnp.zeros((B, T), jnp.float32, out_sharding=batch_spec(None)) for name in names},
        {name: jnp.zeros_like(hidden[name]) for name in wanted_hidden},
        {name: jnp.zeros((ways, *heads[name].shape), jnp.float32, out_sharding=_HEADS_SPEC) for name in wanted_heads},
    )
    longest = jnp.max(jnp.where(mask_BxT, jnp.arange(1, T + 1), 0))
    loss, values, d_hidden, d_heads = lax.fori_loop(0, -(-longest // chunk), step, start)
    d_heads = {
        name: jax.reshard(jnp.sum(d_WxDxV, axis=0), jax.typeof(heads[name]).sharding.spec).astype(heads[name].dtype)
        for name, d_WxDxV in d_heads.items()
    }
    return loss, values, ({name: d_hidden.get(name) for name in hidden}, {name: d_heads.get(name) for name in heads})


_HEADS_SPEC = jax.P(BATCH, None, WEIGHT_RULES["vocab"])
