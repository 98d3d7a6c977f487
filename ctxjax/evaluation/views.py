"""Decode a split in one view, and compare two views token by token: compiled programs, arrays in and out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from ctxjax import masks, sharding
from ctxjax.distill import chunked_head, divergences, losses, objective
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import Networks, WeightedBatch
from ctxjax.host import progress
from ctxjax.inputs import decoding
from ctxjax.models import transformer
from ctxjax.models.linear import find_precision
from ctxjax.models.transformer import ModelConfig, finish_logits, head_weights
from ctxjax.types import Batch, Params, Prompts, Rollout

# Linear CKA is exact for states of at most this width; wider ones are projected onto as many random directions.
MOST_FEATURES = 256
_PRODUCTS = {"xx": (0, 0), "cc": (1, 1), "oo": (2, 2), "xc": (0, 1), "xo": (0, 2)}  # of the views, for linear CKA


@functools.partial(jax.jit, static_argnames="model")
def _compare(
    params, model: ModelConfig, bare: Prompts, context: Prompts, control: Prompts, rollout: Rollout, mean_Nx3xD,
    directions_DxK,
):  # fmt: skip
    """View KL [B, T] and cosines by layer [N+1, B, T] of the same response tokens in different views; the sums of the
    states over these tokens, [N+1, 3, D], of the bare, the context and the control view; and by layer the products
    [N+1, K, K] of _PRODUCTS.

    The centred cosine and the products are those of the states minus ``mean_Nx3xD``.
    """

    def window(prompts, x_BxLxD):
        return masks.response_window(x_BxLxD, prompts.tokens_BxP.shape[1])

    def total(x_BxTxD):
        return jnp.sum(jnp.where(rollout.mask_BxT[..., None], x_BxTxD, 0.0), axis=(0, 1))

    def products(*states):
        exact = {"precision": find_precision(directions_DxK)}
        masked = (jnp.where(rollout.mask_BxT[..., None], state, 0.0) for state in states)
        features = [jnp.matmul(state, directions_DxK, **exact) for state in masked]
        pairs = {name: (features[one], features[other]) for name, (one, other) in _PRODUCTS.items()}
        return {name: jnp.einsum("btk,btl->kl", *pair, out_sharding=jax.P(), **exact) for name, pair in pairs.items()}

    def summarise(x_bare, x_context, x_control, mean_3xD):
        states = ((bare, x_bare), (context, x_context), (control, x_control))
        x, c, other = (window(prompts, state).astype(jnp.float32) for prompts, state in states)
        cosines = {
            "cosine": _cosine(x, c),
            "control": _cosine(x, other),
            "centred": _cosine(x - mean_3xD[0], c - mean_3xD[1]),
        }
        centred = (state - mean for state, mean in zip((x, c, other), mean_3xD))
        return cosines, jnp.stack([total(x), total(c), total(other)]), products(*centred)

    views = tuple(
        (*masks.join_response(prompts, rollout), transformer.prefix_kv(params, model, prompts.prefix_C))
        for prompts in (bare, context, control)
    )
    (h_x, h_c, _), (cosines, *sums) = transformer.summarise_layers(params, model, views, summarise, mean_Nx3xD)
    head = head_weights(params, model)

    hidden = {"q_x": window(bare, h_x), "q_c": window(context, h_c)}
    _, values = chunked_head.chunked(
        functools.partial(_view_kl, model), 64, hidden, dict.fromkeys(hidden, head), {}, rollout.mask_BxT
    )
    return sharding.replicate((values["kl"], cosines, *sums))


def _view_kl(model: ModelConfig, raw: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"kl": divergences.kl(finish_logits(raw["q_x"], model), finish_logits(raw["q_c"], model))}


@functools.partial(jax.jit, static_argnames=("model", "teacher_model", "loss"))
def _distillation(params, frozen, model, teacher_model, loss: LossConfig, batch: Batch, rollout: Rollout):
    networks = Networks(params, sharding.bring_to_device(frozen), None, model, teacher_model)
    weight_BxT = losses.token_weights(rollout.mask_BxT, "token_mean")
    _, metrics = objective.objective(networks, loss, WeightedBatch(batch, rollout, weight_BxT), 0)
    return metrics["distill"]


def _cosine(a, b):
    product = jnp.sum(a * b, axis=-1)
    return product / jnp.maximum(jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-12)


def linear_cka(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Return linear CKA [...] from the products X'X, Y'Y and X'Y, [..., K, K], of centred states (Kornblith et al.
    2019): 1 if one are the other rotated and scaled. NaN if either does not vary."""
    xx, yy, xy = (np.sqrt(np.sum(np.square(product, dtype=np.float64), axis=(-2, -1))) for product in (xx, yy, xy))
    with np.errstate(invalid="ignore"):
        return xy**2 / (xx * yy)


def _mask_rows_from(rollout: Rollout, real: int) -> Rollout:
    """Clear the masks of the rows from number ``real`` on: copies that fill a batch do not count."""
    keep = jnp.arange(rollout.mask_BxT.shape[0])[:, None] < real
    return rollout.replace(mask_BxT=rollout.mask_BxT & jax.reshard(keep, sharding.batch_spec(None)))


def compare(
    params: Params,
    model: ModelConfig,
    bare: Prompts,
    context: Prompts,
    control: Prompts,
    rollout: Rollout,
    batch_size: int,
    mesh: Mesh,
    what: str = "",
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return KL(q_x || q_c) in nats, [n, T], hidden-state cosines, each [N+1, n, T], and linear CKA, each [N+1], along
    the same responses.

    "cosine" is between the bare and the context view, "control" between the bare view and one under the context of
    the control. "centred" is "cosine" after subtracting each view's mean state over all n responses, since raw cosines
    are high everywhere. CKA compares how the states of all response tokens lie to each other, "context" in the bare and
    the context view, "control" in the bare view and that of the control. The batches run twice, through one compiled
    program: first for these means.
    """
    width = model.width
    directions = np.eye(width, dtype=np.float32)
    if width > MOST_FEATURES:
        directions = np.random.default_rng(0).standard_normal((width, MOST_FEATURES), np.float32) / MOST_FEATURES**0.5

    def run_batches(mean_Nx3xD, bar):
        for real, batch in decoding.in_batches((bare, context, control, rollout), batch_size, mesh):
            *prompts, rollout_b = batch
            yield real, _compare(params, model, *prompts, _mask_rows_from(rollout_b, real), mean_Nx3xD, directions)
            bar.update(real)

    start = np.zeros((model.layers + 1, 3, width), np.float32)
    kls, all_cosines, products = [], [], dict.fromkeys(_PRODUCTS, 0.0)
    with progress.Bar(what, 2 * len(rollout.mask_BxT), "response", compiles=True) as bar:
        total = sum(np.asarray(jax.device_get(sums), np.float64) for _, (_, _, sums, _) in run_batches(start, bar))
        mean = (total / max(rollout.mask_BxT.sum(), 1)).astype(np.float32)
        for real, (kl, cosines, _, own) in run_batches(mean, bar):
            kl, cosines, own = jax.device_get((kl, cosines, own))
            products = {name: product + own[name].astype(np.float64) for name, product in products.items()}
            kls.append(kl[:real])
            all_cosines.append({name: values[:, :real] for name, values in cosines.items()})
    cka = {
        "context": linear_cka(products["xx"], products["cc"], products["xc"]),
        "control": linear_cka(products["xx"], products["oo"], products["xo"]),
    }
    return np.concatenate(kls), decoding.concatenate(all_cosines, axis=1), cka


def distillation_kl(
    params: Params,
    frozen: Params,
    model: ModelConfig,
    teacher_model: ModelConfig,
    loss: LossConfig,
    bare: Prompts,
    context: Prompts,
    rollout: Rollout,
    batch_size: int,
    mesh: Mesh,
    what: str = "",
) -> float:
    """Return L_distill in nats per token on given responses."""
    rows = np.arange(bare.tokens_BxP.shape[0], dtype=np.int32)
    total, count = 0.0, 0.0
    with progress.Bar(what, len(rows), "response", compiles=True) as bar:
        for real, (bare_b, context_b, rollout_b, ids) in decoding.in_batches(
            (bare, context, rollout, rows), batch_size, mesh
        ):
            rollout_b = _mask_rows_from(rollout_b, real)
            batch = Batch(bare=bare_b, context=context_b, other=None, row_number_B=ids)
            mean = jax.device_get(_distillation(params, frozen, model, teacher_model, loss, batch, rollout_b))
            total, count = total + float(mean.total), count + float(mean.count)
            bar.update(real)
    return total / max(count, 1.0)
