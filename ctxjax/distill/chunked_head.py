"""The output head applied to a few tokens at a time, with its gradient in the same sweep.

Losses that compare distributions over a vocabulary of 128k would hold several [B, T, V] arrays, each hundreds of times
larger than the hidden states. Here a loop walks over chunks of response columns; in each it makes the logits of all
views, the losses per token, their gradient with respect to the logits, and from that at once the gradients with
respect to hidden states and heads. So the backward pass has nothing left to do but to scale, no logits are made
twice, and one chunk of them exists at a time. Columns behind the longest response are not visited at all.

That works because the loss is linear in the losses per token, with weights (1 / number of response tokens, times beta)
that are known beforehand. ``dense`` is the same function with all logits at once and plain autodiff: the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.lax import stop_gradient
import jax.numpy as jnp

from ctxjax.models.transformer import apply_head
from ctxjax.sharding import BATCH, WEIGHT_RULES, batch_spec, batch_ways

# Of logits {view: [B, t, V]} and further [B, t] slices, the values per token {name: [B, t]}.
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
    values = function({view: apply_head(h, heads[view]) for view, h in hidden.items()}, *others_BxT)
    return _weighted(values, weights), {name: jnp.where(mask_BxT, v, 0.0) for name, v in stop_gradient(values).items()}


def chunked(
    function: TokenFunction,
    chunk: int,
    hidden: dict[str, jax.Array],
    heads: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    mask_BxT: jax.Array,
    *others_BxT: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, values): sum over names and tokens of weight * value, and the values {name: [B, T]} themselves.

    ``function`` gets the logits {view: [B, t, V]}, float32, and slices of ``others_BxT``, t = ``chunk`` columns, and
    returns float32 values {name: [B, t]}. It may not close over traced arrays.
    ``hidden``: view -> [B, T, D]; ``heads``: view -> [D, V], the same array where views share a head.
    ``weights``: name -> [B, T] float32, for those values that are part of the loss; 0 where ``mask_BxT`` is False.
    Values are 0 behind the longest response. Gradients flow from the loss to ``hidden`` and ``heads``, and are made
    only for those of them that the caller differentiates; none flows from the values.
    """
    # Views that share a head share its gradient: one product makes it.
    distinct: dict[int, jax.Array] = {id(head): head for head in heads.values()}
    names = {key: f"head{place}" for place, key in enumerate(distinct)}
    owner = tuple((view, names[id(heads[view])]) for view in hidden)
    T = mask_BxT.shape[1]
    chunk = min(chunk, T)
    more = -T % chunk

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x

    padded = jax.tree.map(pad, (hidden, weights, mask_BxT, others_BxT))
    hidden, weights, mask_BxT, others_BxT = padded
    distinct_heads = {names[key]: head for key, head in distinct.items()}
    loss, values = _chunked(function, chunk, owner, hidden, distinct_heads, (weights, mask_BxT, others_BxT))
    return loss, {name: stop_gradient(value)[:, :T] for name, value in values.items()}


def _weighted(values: dict[str, jax.Array], weights: dict[str, jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.where(w != 0, w * values[name], 0.0)) for name, w in weights.items()), jnp.float32(0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(function, chunk, owner, hidden, heads, fixed):
    loss, values, _ = _sweep(function, chunk, owner, hidden, heads, fixed, (), ())
    return loss, values


def _forward(function, chunk, owner, hidden, heads, fixed):
    def is_primal(node):
        return hasattr(node, "perturbed")

    # Sorted, since the order shows in the compiled program, which must be the same in every process.
    wanted = [tuple(sorted(name for name, node in tree.items() if node.perturbed)) for tree in (hidden, heads)]
    values = jax.tree.map(lambda node: node.value, (hidden, heads, fixed), is_leaf=is_primal)
    loss, values, gradients = _sweep(function, chunk, owner, *values, *wanted)
    return (loss, values), gradients


def _backward(function, chunk, owner, gradients, cotangents):
    del function, chunk, owner
    scale = cotangents[0]
    if not isinstance(scale, jax.Array):  # a symbolic zero: only the values were differentiated, and they carry none
        scale = jnp.float32(0)
    hidden, heads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return hidden, heads, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _sweep(function, chunk, owner, hidden, heads, fixed, wanted_hidden, wanted_heads):
    """The loop. Returns (loss, values, (gradients of hidden, gradients of heads)), None where not wanted."""
    weights, mask_BxT, _ = fixed
    B, T = mask_BxT.shape
    ways, owner = batch_ways(), dict(owner)
    trained = [v for v in hidden if v in wanted_hidden or owner[v] in wanted_heads]
    dtype = next(iter(hidden.values())).dtype
    cast = {name: head.astype(dtype) for name, head in heads.items()}

    def at(x, index):
        return lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1)

    def put(whole, part, index):
        return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), index * chunk, axis=1)

    def per_device(x):  # rows of each device apart, so that its share of a head's gradient is summed in place
        spec = jax.P(BATCH, None, None, *jax.typeof(x).sharding.spec[2:])
        return jnp.reshape(x, (ways, B // ways, *x.shape[1:]), out_sharding=spec)

    def step(index, carry):
        loss, values, d_hidden, d_heads = carry
        h = {view: at(x, index) for view, x in hidden.items()}
        w, _, others = jax.tree.map(lambda x: at(x, index), fixed)
        logits = {view: apply_head(x, cast[owner[view]]) for view, x in h.items()}

        def of_trained(part):
            new = function(logits | part, *others)
            return _weighted(new, w), new

        part = {view: logits[view] for view in trained}
        (more, new), d_logits = jax.value_and_grad(of_trained, has_aux=True)(part)
        d_logits = {view: g.astype(dtype) for view, g in d_logits.items()}
        for view in wanted_hidden:
            back = jnp.einsum("btv,dv->btd", d_logits[view], cast[owner[view]], out_sharding=batch_spec(None, None))
            d_hidden = d_hidden | {view: put(d_hidden[view], back, index)}
        for name in wanted_heads:
            mine = [view for view in trained if owner[view] == name]
            left = jnp.concatenate([per_device(h[view]) for view in mine], axis=2)
            right = jnp.concatenate([per_device(d_logits[view]) for view in mine], axis=2)
            d_head = jnp.einsum(
                "wntd,wntv->wdv", left, right, preferred_element_type=jnp.float32, out_sharding=_HEADS_SPEC
            )
            d_heads = d_heads | {name: d_heads[name] + d_head}
        values = {name: put(values[name], jnp.where(at(mask_BxT, index), v, 0.0), index) for name, v in new.items()}
        return loss + more, values, d_hidden, d_heads

    shapes = jax.eval_shape(
        lambda: function(
            {view: apply_head(at(x, 0), cast[owner[view]]) for view, x in hidden.items()}, *(at(x, 0) for x in fixed[2])
        )
    )
    start = (
        jnp.float32(0),
        {name: jnp.zeros((B, T), jnp.float32, out_sharding=batch_spec(None)) for name in shapes},
        {view: jnp.zeros_like(hidden[view]) for view in wanted_hidden},
        {name: jnp.zeros((ways, *heads[name].shape), jnp.float32, out_sharding=_HEADS_SPEC) for name in wanted_heads},
    )
    longest = jnp.max(jnp.where(mask_BxT, jnp.arange(1, T + 1), 0))
    loss, values, d_hidden, d_heads = lax.fori_loop(0, -(-longest // chunk), step, start)
    d_heads = {
        name: jax.reshard(jnp.sum(g, axis=0), jax.typeof(heads[name]).sharding.spec).astype(heads[name].dtype)
        for name, g in d_heads.items()
    }
    gradients = {view: d_hidden.get(view) for view in hidden}, {name: d_heads.get(name) for name in heads}
    return loss, values, gradients


_HEADS_SPEC = jax.P(BATCH, None, WEIGHT_RULES["vocab"])
