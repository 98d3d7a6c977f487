"""Products of float32 arrays are of float32 precision on every platform: accelerators round the operands by default."""

import dataclasses

import jax
from jax import lax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.distill.losses import LossConfig
from ctxjax.distill.optim import OptimConfig
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.distill.train_step import StepConfig, init_state, train_step
from ctxjax.models import attention, transformer
from ctxjax.models.lora import LoraConfig, merged
from ctxjax.sharding import put_batch
from ctxjax.types import Batch, Frozen

FULL = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def find_products(function, *arguments) -> list[tuple[set[str], object]]:
    """Return (dtypes of the operands, precision) of all matrix products that it traces to, in loops and calls too."""

    def of(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield {operand.aval.dtype.name for operand in equation.invars}, equation.params["precision"]
            for inner in jaxprs_in_params(equation.params):
                yield from of(getattr(inner, "jaxpr", inner))

    return list(of(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.fixture
def trace_step(tiny_model, make_params, make_prompts, mesh, monkeypatch):
    """trace_step(dtype): the products of a step that has every term, a prefix, an adapter, recomputed layers and
    attention in chunks."""
    monkeypatch.setattr("ctxjax.models.attention.CHUNK_SCORES", {"cpu": 2**8})

    def trace(dtype):
        model = dataclasses.replace(tiny_model, dtype=dtype, remat="full")
        config = StepConfig(
            model=model, teacher_model=model,
            sampling=SamplingConfig(max_tokens=4, eos_ids=(2,), pad_id=0),
            loss=LossConfig(beta=0.5, mu=1.0, reference=0.1, gate="response", chunk=2),
            optim=OptimConfig(lr=1e-3, steps=10), lora=LoraConfig(2, 4.0, ("q", "down")),
        )  # fmt: skip
        params = make_params(model, 0, mesh)
        prefix = np.arange(3, dtype=np.int32)
        context = make_prompts(1, 4, 6).replace(prefix_C=prefix)
        batch = Batch(make_prompts(0, 4, 5), context, make_prompts(2, 2, 7), np.arange(4, dtype=np.int32))
        state = init_state(params, config, jax.random.key(0))
        step = lambda *own: train_step.__wrapped__(*own, config)  # noqa: E731
        return find_products(step, state, Frozen(params, params), put_batch(batch, mesh))

    return trace


def test_products_of_a_float32_step_are_of_full_precision(trace_step):
    products = trace_step("float32")
    assert len(products) > 100
    assert {(*kinds, precision) for kinds, precision in products} == {("float32", FULL)}


def test_products_of_a_bfloat16_step_are_left_to_the_platform(trace_step):
    """Kernels and compilers refuse or slow down products of bfloat16 arrays with a precision."""
    products = trace_step("bfloat16")
    assert {precision for kinds, precision in products if "bfloat16" in kinds} == {None}
    assert sum("bfloat16" in kinds for kinds, _ in products) > 100


@pytest.mark.parametrize("dtype, expected", [("float32", FULL), ("bfloat16", None)])
def test_a_sampler_has_the_precision_of_the_training(dtype, expected, tiny_model, make_params, make_prompts, mesh):
    model = dataclasses.replace(tiny_model, dtype=dtype)
    prompts, keys = put_batch(make_prompts(0, 4, 5), mesh), jax.random.split(jax.random.key(0), 4)
    sampling = SamplingConfig(max_tokens=4, eos_ids=(2,), pad_id=0)
    products = find_products(
        lambda *own: sample(own[0], model, sampling, *own[1:]), make_params(model, 0, mesh), prompts, keys
    )
    assert {(*kinds, precision) for kinds, precision in products} == {(dtype, expected)}


def test_an_adapter_is_added_in_full_precision(tiny_model):
    layers = {"q": jnp.ones((2, 4, 4), jnp.bfloat16), "q_lora_a": jnp.ones((2, 4, 1)), "q_lora_b": jnp.ones((2, 1, 4))}
    assert find_products(merged, {"layers": layers}) == [({"float32"}, FULL)]


def test_trained_scales_of_norms_are_decoded_as_they_are_scored(tiny_model, make_params, mesh):
    """A scale of 1.003 is 1 in bfloat16: sampling would not see what training has changed."""
    model = dataclasses.replace(tiny_model, dtype="bfloat16")
    params = make_params(model, 0, mesh)
    read = transformer.prepare_for_decoding(params, model)
    layers = jax.tree.map(lambda *parts: np.stack(parts), *read["layers"])  # decoding is unrolled here
    for name in ("attention_norm", "mlp_norm"):
        np.testing.assert_array_equal(layers[name], params["layers"][name])
    assert layers["q"].dtype == jnp.bfloat16
    assert read["embedding"].dtype == jnp.bfloat16


def test_gradients_of_keys_do_not_lose_precision_if_queries_come_in_many_chunks(mesh, monkeypatch):
    """Each chunk adds to the gradient of all keys; in bfloat16, of 256 such numbers the last ones would be lost."""
    shape = (2, 4, 256, 8)
    q, k, v, out = (jax.random.normal(jax.random.key(i), shape if i in (0, 3) else (2, 2, 256, 8)) for i in range(4))
    real = jnp.ones((2, 256), bool)

    def gradients(dtype):
        def total(k, v):
            read = attention.self_attention("reference", q.astype(dtype), k, v, real, None)
            return jnp.sum(read.astype(jnp.float32) * out)

        return jax.grad(total, (0, 1))(k.astype(dtype), v.astype(dtype))

    def error(found):
        return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found, exact, strict=True))

    exact = gradients(jnp.float32)
    whole = error(gradients(jnp.bfloat16))
    monkeypatch.setattr("ctxjax.models.attention.CHUNK_SCORES", {"cpu": 1})  # a chunk for each query
    assert error(gradients(jnp.bfloat16)) < 1.2 * whole < 0.02
