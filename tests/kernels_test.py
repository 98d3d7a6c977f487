"""Kernels of accelerators give what the reference path gives, in the interpreter or on plain products."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.models import cudnn, kernels, splash, transformer
from ctxjax.models.architecture import LayerKind, ModelConfig
from ctxjax.models.attention import KERNELS, Window, attention, choose_kind, kernel_for, self_attention
from ctxjax.sharding import batch_spec, put_batch, weight_spec
from ctxjax.types import PrefixKV

H, K, DH = 4, 2, 16


def inputs(mesh, B, L, C):
    """Queries, keys and values, a mask with padding on the left and behind the end, a prefix or None, a cotangent that
    is 0 in columns of padding."""
    random = np.random.default_rng(L + C)
    columns, start = np.arange(L), random.integers(0, L // 3, (B, 1))
    real = (columns >= start) & (columns < random.integers(L // 2, L, (B, 1)))
    real[-1] = True

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    rows = put_batch((normal(B, H, L, DH), normal(B, K, L, DH), normal(B, K, L, DH)), mesh)
    q, k, v = (jax.device_put(x, jax.NamedSharding(mesh, batch_spec("heads", None, None))) for x in rows)
    prefix = None
    if C:
        place = jax.NamedSharding(mesh, weight_spec(("kv_heads", None, None)))
        prefix = PrefixKV(*(jax.device_put(normal(K, C, DH), place) for _ in range(2)))
    d_out = np.where(real[:, None, :, None], normal(B, H, L, DH), 0)
    return q, k, v, prefix, *put_batch((real, d_out), mesh)


def values_and_gradients(function, q, k, v, prefix, real, d_out):
    @jax.jit
    def both(d_out, real, *arguments):
        def masked(*arguments):
            return jnp.where(real[:, None, :, None], function(*arguments, real), 0)

        out, back = jax.vjp(masked, *arguments)
        return out, back(jax.reshard(d_out, jax.typeof(out).sharding.spec))

    return jax.device_get(both(d_out, real, q, k, v, prefix))


def reference(q, k, v, prefix, real):
    return attention(q, k, v, real, jnp.arange(q.shape[2])[None], prefix)


def in_order(kernel):
    return lambda q, k, v, prefix, real: kernel(q, k, v, real, prefix)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("length, prefix", [(130, 0), (70, 150), (256, 128)])
def test_splash_is_the_reference_path(mesh8, length, prefix):
    arguments = inputs(mesh8, 4, length, prefix)
    expected = values_and_gradients(reference, *arguments)
    assert_same(values_and_gradients(in_order(kernels.splash), *arguments), expected)


@pytest.mark.parametrize("length", [33, 40])
def test_cudnn_is_called_so_that_its_causal_mask_is_ours(mesh8, length, monkeypatch):
    """And with an even number of columns: it refuses an odd one."""
    plain, seen = jax.nn.dot_product_attention, []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **how: seen.append(q.shape[1]) or plain(q, k, v, **how)
    )
    arguments = inputs(mesh8, 4, length, 0)
    on_xla = functools.partial(kernels.run_per_device, functools.partial(cudnn.attend, implementation="xla"))
    expected = values_and_gradients(reference, *arguments)
    assert_same(values_and_gradients(in_order(on_xla), *arguments), expected)
    assert set(seen) == {length + length % 2}


def weights(q, k, normaliser, keys, is_causal):
    """exp(score - normaliser) [B, K, G, L, M] of what cuDNN reads; without a normaliser the scores themselves."""
    B, L, H, _ = q.shape
    M, K = k.shape[1:3]
    assert L % 2 == M % 2 == 0 and q.dtype == k.dtype
    is_read = jnp.arange(M) < keys
    if is_causal:
        is_read &= jnp.arange(M) <= jnp.arange(L)[:, None]
    scores = jnp.einsum("blkgd,bmkd->bkglm", q.reshape(B, L, K, H // K, -1), k) * q.shape[3] ** -0.5
    scores = jnp.where(is_read, scores, -jnp.inf)
    return scores if normaliser is None else jnp.exp(scores - normaliser.reshape(B, K, H // K, L, 1))


def plain_forward(q, k, v, keys, is_causal):
    """What cudnn.run_forward returns."""
    scores = weights(q, k, None, keys, is_causal)
    out = jnp.einsum("bkglm,bmkd->blkgd", jax.nn.softmax(scores), v)
    return out.reshape(q.shape), jax.nn.logsumexp(scores, axis=-1).reshape(q.shape[0], q.shape[2], -1)


def plain_backward(q, k, v, out, normaliser, d_out, keys, is_causal):
    """What cudnn.run_backward returns: it knows the weights, and the mean of their gradients, by its arguments only."""
    p, scale = weights(q, k, normaliser, keys, is_causal), q.shape[3] ** -0.5
    q, out, d_out = (x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]) for x in (q, out, d_out))
    delta = jnp.einsum("blkgd,blkgd->bkgl", d_out, out)[..., None]
    d_scores = p * (jnp.einsum("blkgd,bmkd->bkglm", d_out, v) - delta) * scale
    d_q = jnp.einsum("bkglm,bmkd->blkgd", d_scores, k)
    d_k, d_v = (jnp.einsum("bkglm,blkgd->bmkd", x, y) for x, y in ((d_scores, q), (p, d_out)))
    return d_q.reshape(*q.shape[:2], -1, q.shape[4]), d_k, d_v


@pytest.fixture
def cudnn_of_plain_products(monkeypatch):
    monkeypatch.setattr(cudnn, "run_forward", plain_forward)
    monkeypatch.setattr(cudnn, "run_backward", plain_backward)


@pytest.mark.slow
@pytest.mark.parametrize("length, prefix", [(33, 40), (40, 7), (5, 130)])
@pytest.mark.parametrize("on", ["mesh", "mesh8"])
def test_cudnn_behind_a_prefix_is_the_reference_path(on, length, prefix, cudnn_of_plain_products, request):
    arguments = inputs(request.getfixturevalue(on), 4, length, prefix)
    expected = values_and_gradients(reference, *arguments)
    assert_same(values_and_gradients(in_order(kernels.cudnn), *arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_row_of_padding_alone_has_no_gradient_and_changes_no_other(mesh, kernel, cudnn_of_plain_products):
    q, k, v, prefix, real, d_out = inputs(mesh, 2, 24, 9)
    is_row_B = np.arange(2) > 0
    real, d_out = real & is_row_B[:, None], d_out * is_row_B[:, None, None, None]
    kernel = getattr(kernels, kernel)
    expected = values_and_gradients(reference, q, k, v, prefix, real, d_out)
    found = values_and_gradients(in_order(kernel), q, k, v, prefix, real, d_out)
    assert_same(found, expected)
    assert not any(gradient[0].any() for gradient in found[1][:3])
    whole = jax.jit(lambda *arguments: kernel(*arguments, real, prefix))(q, k, v)
    assert np.isfinite(whole).all()


def test_an_empty_prefix_is_none(mesh, cudnn_of_plain_products):
    q, k, v, prefix, real, _ = inputs(mesh, 2, 24, 9)
    none, empty = None, PrefixKV(*(x[:, :0] for x in (prefix.keys, prefix.values)))
    for kind in ("reference", "cudnn"):
        out, same = (jax.jit(functools.partial(self_attention, kind))(q, k, v, real, p) for p in (none, empty))
        np.testing.assert_array_equal(out, same)


@pytest.mark.parametrize("on, own_rows, ways", [("mesh", 8, 1), ("mesh8", 2, 2)])
def test_the_cascade_lowers_for_cuda_to_two_kernels_a_pass(on, own_rows, ways, monkeypatch, request):
    """No GPU computes here, but the library checks its arguments, and the program has the calls that a GPU would get:
    one for each row's own columns, one for the queries of all the device's rows and the prefix."""
    monkeypatch.setattr(cudnn.library, "check_cudnn_version", lambda: 91200)
    q, k, v, prefix, real, _ = inputs(request.getfixturevalue(on), 8, 33, 41)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (q, k, v, prefix))

    @jax.jit
    def both(real, *halves):
        out, back = jax.vjp(lambda *halves: in_order(kernels.cudnn)(*halves, real), *halves)
        return back(out)

    text = both.trace(real, *halves).lower(lowering_platforms=("cuda",)).as_text()
    found = set()
    for call in (line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line):
        name, mask = (re.search(pattern, call)[1] for pattern in (r"fmha(\w+)", r"mask_type\W+22: \W+22(\w+?)\W+22"))
        operands = re.findall(r"tensor<([\dx]+)xbf16>", call)
        found.add((name, mask, *operands[:2]))
    heads, groups = f"{H // ways}x{DH}", f"{K // ways}x{DH}"
    assert found == {
        (name, *call)
        for name in ("Softmax", "SoftmaxBackward")
        for call in (
            ("CAUSAL", f"{own_rows}x34x{heads}", f"{own_rows}x34x{groups}"),
            ("PADDING", f"1x{own_rows * 34}x{heads}", f"1x42x{groups}"),
        )
    }


@pytest.mark.slow
@pytest.mark.parametrize("on", ["mesh", "mesh8"])
def test_a_model_reads_a_prefix_and_rows_behind_it_by_kernels(
    on, tiny_model, make_params, make_prompts, cudnn_of_plain_products, monkeypatch, request
):
    """Gradients through the prefix's keys and values too. On several devices the prefix's own pass has no kernel."""
    mesh, seen, run_kernel = request.getfixturevalue(on), [], kernels.cudnn
    on_xla = functools.partial(kernels.run_per_device, functools.partial(cudnn.attend, implementation="xla"))

    def kernel(*arguments):
        seen.append(arguments[-1] is not None)
        return (run_kernel if seen[-1] else on_xla)(*arguments)

    monkeypatch.setitem(KERNELS, "cudnn", kernel)
    monkeypatch.setattr(kernels, "LEAST_KEYS", 1)
    params, prompts = make_params(tiny_model, 0, mesh), put_batch(make_prompts(1, 4, 9), mesh)
    prefix_C = jnp.arange(1, 22)

    @functools.partial(jax.jit, static_argnums=1)
    def value_and_gradient(params, model):
        def loss(params):
            prefix = transformer.prefix_kv(params, model, prefix_C)
            hidden = transformer.forward(params, model, prompts.tokens_BxP, prompts.mask_BxP, prefix)
            return jnp.sum(jnp.where(prompts.mask_BxP[..., None], jnp.sin(hidden), 0))

        return jax.value_and_grad(loss)(params)

    model = dataclasses.replace(tiny_model, query_scale=0.4)
    expected = value_and_gradient(params, model)
    assert not seen
    found = value_and_gradient(params, dataclasses.replace(model, attention="cudnn"))
    assert set(seen) == ({False, True} if on == "mesh" else {True})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), found, expected)


CPU, TPU = (SimpleNamespace(platform=name) for name in ("cpu", "tpu"))
T4, H100, MI300 = (SimpleNamespace(platform="gpu", compute_capability=version) for version in ("7.5", "9.0", "gfx942"))
LLAMA = ModelConfig(512, 256, 2, 4, 2, 64, 512, dtype="bfloat16")
GEMMA = dataclasses.replace(LLAMA, layer_kinds=(LayerKind(window=4), LayerKind()))
EXACT, WIDE, ODD = (
    dataclasses.replace(LLAMA, **change) for change in ({"dtype": "float32"}, {"head_dim": 256}, {"head_dim": 36})
)


@pytest.mark.parametrize(
    ("device", "model", "kind"),
    [
        (CPU, LLAMA, "reference"), (CPU, EXACT, "reference"), (TPU, LLAMA, "splash"), (TPU, WIDE, "splash"),
        (TPU, ODD, "splash"), (TPU, EXACT, "reference"), (TPU, GEMMA, "reference"), (H100, LLAMA, "cudnn"),
        (H100, EXACT, "reference"), (H100, GEMMA, "reference"), (H100, WIDE, "reference"), (H100, ODD, "reference"),
        (T4, LLAMA, "reference"), (MI300, LLAMA, "reference"),
    ],
)  # fmt: skip
def test_auto_takes_the_kernel_of_the_devices_if_it_can_run_the_model(device, model, kind):
    assert choose_kind("auto", model, device) == kind
    assert choose_kind("reference", model, device) == "reference"
    if kind != "reference":
        assert choose_kind(kind, model, device) == kind


@pytest.mark.parametrize(
    ("kind", "device", "model", "message"),
    [
        ("splash", CPU, LLAMA, "'splash' runs on tpu, and the devices are cpu; use 'auto'"),
        ("cudnn", CPU, LLAMA, "'cudnn' runs on gpu, and the devices are cpu; use 'auto'"),
        ("splash", TPU, GEMMA, "'splash' has no windows, and layers of the model have; use 'auto'"),
        ("cudnn", H100, EXACT, "'cudnn' has no float32, and model.dtype is float32; use 'auto'"),
        ("cudnn", H100, WIDE, "'cudnn' takes a head_dim of at most 128 that 8 divides, and the model's is 256; use"),
        ("cudnn", H100, ODD, "that 8 divides, and the model's is 36; use 'auto'"),
        ("cudnn", T4, LLAMA, "needs a compute capability of 8.0 or more, and the devices have 7.5; use 'auto'"),
    ],
)
def test_a_kernel_that_cannot_run_the_model_on_the_devices_is_an_error(kind, device, model, message):
    with pytest.raises(ValueError, match=f"model.attention = .*{message}"):
        choose_kind(kind, model, device)
    if (kind, model) != ("cudnn", EXACT):
        return
    assert choose_kind("splash", EXACT, TPU) == "splash"  # by name at any precision


def test_passes_that_a_kernel_does_not_know_take_the_reference_path():
    q, short = (jnp.zeros((1, 4, columns, 64), jnp.bfloat16) for columns in (128, 127))
    prefix, window = PrefixKV(q[0], q[0]), Window(4, jnp.arange(128)[None])
    for before in (None, prefix):
        assert kernel_for("splash", q, before) is kernels.splash and kernel_for("cudnn", q, before) is kernels.cudnn
    assert kernel_for("cudnn", short, prefix) is kernels.cudnn  # many scores; splash would pad them to more
    for kind, shape, before, seen in [
        ("splash", short, None, None), ("splash", short, prefix, None), ("cudnn", short, None, None),
        ("splash", q, None, window), ("cudnn", q, None, window), ("cudnn", q, prefix, window),
        ("reference", q, None, None),
    ]:  # fmt: skip
        assert kernel_for(kind, shape, before, seen) is None


@pytest.mark.parametrize(
    ("kind", "device", "library", "function"),
    [
        ("splash", TPU, splash.kernel_lib, "_splash_attention_bwd"),
        ("cudnn", H100, cudnn.library, "_dot_product_attention_fwd_rule"),
        ("cudnn", H100, cudnn.library, "_dot_product_attention_bwd_rule"),
    ],
)
def test_the_library_takes_what_a_kernel_gives_its_private_function(kind, device, library, function, monkeypatch):
    """Fails if a new JAX has another one: then read its backward pass again, and mend the kernel's file."""
    kernels.check_library(kind)
    monkeypatch.setattr(library, function, lambda save_residuals, res, do: None)
    for name in ("auto", kind):
        with pytest.raises(ValueError, match=f"{kind} .* JAX {jax.__version__}, .*model.attention=reference"):
            choose_kind(name, LLAMA, device)
    monkeypatch.delattr(library, function)  # a JAX without it: only who wants it needs it
    with pytest.raises(ValueError, match=f"JAX {jax.__version__}, .*model.attention=reference"):
        choose_kind("auto", LLAMA, device)
    assert choose_kind("auto", LLAMA, CPU) == choose_kind("reference", LLAMA, device) == "reference"


@pytest.mark.slow
def test_the_scores_of_a_long_sequence_are_never_in_memory_at_once(mesh):
    """At 8,192 columns they would take 1 GiB, and their gradient as much again."""
    heads, rows = (jax.NamedSharding(mesh, spec) for spec in (batch_spec("heads", None, None), batch_spec(None)))
    q, k = (jax.ShapeDtypeStruct((1, count, 8192, DH), jnp.float32, sharding=heads) for count in (H, K))
    real = jax.ShapeDtypeStruct((1, 8192), bool, sharding=rows)
    gradient = jax.grad(lambda q, k, v, real: reference(q, k, v, None, real).sum(), argnums=(0, 1, 2))
    memory = jax.jit(gradient).lower(q, k, k, real).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < H * 8192**2 * 4 / 16
