"""The numbers of a plan, against numbers that are written out by hand. Nothing is compiled."""

import dataclasses
import functools
import types

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax import config as config_lib, rng
from ctxjax.configs import tiny
from ctxjax.data.shapes import ViewShape
from ctxjax.distill import flops
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import sample
from ctxjax.inputs.batch_shapes import BatchShapes
from ctxjax.models import cudnn
from ctxjax.models.transformer import LayerKind, ModelConfig
from ctxjax.plan import chips, hlo, remedies, report, run, step as plan_step
from ctxjax.plan.remedies import Remedy
from ctxjax.plan.step import Plan
from ctxjax.sharding import MeshConfig, put_batch
from ctxjax.types import PrefixKV, Rollout

GIB = 2**30
STUDENT = ModelConfig(
    vocab_size=40, width=32, layers=2, query_heads=4, kv_heads=2, head_dim=8, mlp_width=48, dtype="bfloat16"
)
TEACHER = dataclasses.replace(STUDENT, width=64, layers=3, kv_heads=4, mlp_width=80)
# Scalars of the layers: two norms, q and o, k and v, three matrices of the MLP.
STUDENT_MATRICES = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
TEACHER_MATRICES = 3 * (2 * 64 * 32 + 2 * 64 * 32 + 3 * 64 * 80)
STUDENT_NORMS, TEACHER_NORMS = 2 * 2 * 32, 3 * 2 * 64
# Of a chip of the mesh 2 x 2 x 2: matrices, embedding and head are over fsdp and tensor, norms on every chip.
STUDENT_CHIP = STUDENT_MATRICES // 4 + STUDENT_NORMS + 2 * 40 * 32 // 4 + 32
TEACHER_CHIP = TEACHER_MATRICES // 4 + TEACHER_NORMS + 2 * 40 * 64 // 4 + 64
# A and B of rank 4 for q (32 x 32) and down (48 x 32) of two layers; the axis that is not the rank is over two chips.
ADAPTER_CHIP = 2 * 4 * (32 + 32 + 48 + 32) // 2
SHAPES = BatchShapes(16, 2, 21, 8, ViewShape(3, 10, 13), ViewShape(50, 12, 62), ViewShape(0, 70, 66))
ALL_TERMS = LossConfig(beta=0.5, mu=1.0, chunk=8)


def make_step(loss=ALL_TERMS, teacher=TEACHER, **fields):
    """(the experiment, its step) of eight devices; ``fields``: of the configuration, with two underscores for a dot."""
    config = tiny.get_config()
    config.model.path, config.task = "org/name", "qa_jsonl"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.rollout.max_tokens, config.train.batch_size, config.train.micro_batches = 21, 16, 2
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    experiment = config_lib.experiment(config, 8)
    return experiment, plan_step.make_step_config(experiment, loss, STUDENT, teacher)


# --- Memory traffic ---


def test_the_memory_floor_is_what_is_read_and_written(mesh8):
    step = make_step()[1]
    buffers = {"trained weights": 10_000_000, "optimiser moments": 300_000_000, "teacher": 7, "batch": 5}

    def floor(loss=ALL_TERMS, shapes=SHAPES, more=None, has_samples=False, **changes):
        changed = dataclasses.replace(step, loss=loss, **changes)
        rollouts = plan_step._list_rollouts(changed, shapes, has_samples)
        return plan_step._compute_hbm_floor(changed, buffers | (more or {}), rollouts, mesh8)

    # Two bytes of a scalar, over two chips of ``tensor``: one byte of each scalar.
    own = STUDENT_MATRICES + STUDENT_NORMS + 40 * 32
    theirs = TEACHER_MATRICES + TEACHER_NORMS + 40 * 64
    column = 2 * 2 * 2 * 8  # keys and values of two layers
    # The bare prefix once, and half of 21 responses. Retention has a rollout of its own, of 8 rows.
    decode = 20 * (own + column * (3 + 16 // 4 * (10 + 10)))
    retained = 20 * (own + column * 8 // 4 * (70 + 10))
    # Read and write weights and moments, and read the gradient.
    optimiser = 2 * (10_000_000 + 300_000_000) + 10_000_000
    # Three forward and three backward passes of the student, two forward passes of the teacher, of two micro-batches.
    assert floor() == decode + retained + 2 * (6 * own + 2 * theirs) + optimiser
    assert floor(LossConfig(beta=0.5)) == decode + 2 * (4 * own + theirs) + optimiser
    assert floor(LossConfig(mu=0.5)) == decode + retained + 2 * (4 * own + 2 * theirs) + optimiser
    assert floor(LossConfig()) == decode + 2 * (2 * own + theirs) + optimiser
    assert floor(LossConfig(reference=0.5)) == decode + 2 * (2 * own + 2 * theirs) + optimiser
    average = {"moving average": 10_000_000}  # is read and written
    moving = LossConfig(reference=0.5, mu=0.5, teacher="ema")
    assert floor(moving, more=average) == decode + retained + 2 * (4 * own + 3 * theirs) + optimiser + 20_000_000
    anchored = LossConfig(beta=0.5, anchor="ema")
    assert floor(anchored, more=average) == decode + 2 * (5 * own + theirs) + optimiser + 20_000_000
    assert floor(LossConfig(divergence="cross_entropy")) == decode + 2 * 2 * own + optimiser  # runs no teacher
    # On the teacher's samples, which are given, only retention has a rollout.
    assert floor(LossConfig(), has_samples=True) == 2 * (2 * own + theirs) + optimiser
    assert floor(LossConfig(mu=0.5), has_samples=True) == retained + 2 * (4 * own + 2 * theirs) + optimiser
    assert floor(micro_batches=1) == decode + retained + 6 * own + 2 * theirs + optimiser
    assert floor(shapes=SHAPES._replace(rows=32)) - floor() == 20 * 64 * 4 * 20
    assert floor(shapes=SHAPES._replace(retention_rows=16)) - floor() == 20 * 64 * 2 * 80
    # One of two layers reads 12 of 20 columns, or 2 of them and of the prefix's 3; and as many of retention's 80.
    windows = dataclasses.replace(STUDENT, layer_kinds=(LayerKind(window=12), LayerKind()))
    assert floor() - floor(model=windows) == 20 * 32 * (4 * 8 + 2 * 68)
    narrow = dataclasses.replace(STUDENT, layer_kinds=(LayerKind(window=2), LayerKind()))
    assert floor() - floor(model=narrow) == 20 * 32 * (1 + 4 * 18 + 2 * 78)


def test_the_parts_of_the_temporaries(mesh8):
    step = make_step(LossConfig(beta=0.5))[1]

    def find_parts(step, has_samples=False):
        rollouts = plan_step._list_rollouts(step, SHAPES, has_samples)
        return plan_step._compute_temporary_parts(step, rollouts, mesh8)

    parts = find_parts(step)
    assert parts == {
        # keys and values, 2 layers, one of 2 heads on a chip, 8 wide, bfloat16, 4 of 16 rows, 10 + 21 columns
        "cache of the responses": 2 * 2 * 1 * 8 * 2 * 4 * 31,
        "gradients": 2 * 4 * STUDENT_CHIP,  # float32, of a part and of the sum
        "weights for decoding": 2 * (STUDENT_MATRICES + STUDENT_NORMS) // 2,
    }
    windows = dataclasses.replace(step.model, layer_kinds=(LayerKind(window=12), LayerKind()))
    found = find_parts(dataclasses.replace(step, model=windows))
    assert found == parts | {"cache of the responses": 2 * 1 * 8 * 2 * 4 * (12 + 31)}
    # With retention, its own cache is the larger one: 2 of 8 rows, 70 + 21 columns. The first has been freed by then.
    retained = dataclasses.replace(step, loss=ALL_TERMS)
    assert find_parts(retained) == parts | {"cache of the responses": 2 * 2 * 1 * 8 * 2 * 2 * 91}
    assert find_parts(retained, has_samples=True) == find_parts(retained)
    assert find_parts(step, has_samples=True) == parts | {"cache of the responses": 0, "weights for decoding": 0}
    whole = dataclasses.replace(step, micro_batches=1, sampling=dataclasses.replace(step.sampling, weights="stored"))
    assert find_parts(whole)["gradients"] == 4 * STUDENT_CHIP
    assert find_parts(whole)["weights for decoding"] == 2 * (STUDENT_MATRICES + STUDENT_NORMS) // 4
    adapted = make_step(lora__rank=4, lora__targets=("q", "down"))[1]
    assert find_parts(adapted)["gradients"] == 2 * 4 * ADAPTER_CHIP


# --- Buffers ---

BATCH = {  # a token and its mask are 5 bytes; a chip has a quarter of the rows, and every shared prefix
    "bare": 4 * 10 * 5 + 4 * 3, "context": 4 * 12 * 5 + 4 * 50, "other": 2 * 70 * 5, "row numbers": 4 * 4,
}  # fmt: skip
PREFIX = 2 * 3 * 4 * 8 * 50 * 2 // 2  # keys and values of 3 layers, 4 heads of 8, 50 tokens, bfloat16, over ``tensor``


def find_buffers(mesh, own_teacher=True, loss=ALL_TERMS, teacher=TEACHER, **fields):
    experiment, step = make_step(loss, teacher, **fields)
    return plan_step.make_arguments(experiment, step, own_teacher, SHAPES, mesh)


def test_buffers_have_the_bytes_of_their_own_types(mesh8):
    state, frozen, _, found = find_buffers(mesh8, teacher__param_dtype="bfloat16")
    assert found == {
        "trained weights": 4 * STUDENT_CHIP,
        "optimiser moments": 2 * 4 * STUDENT_CHIP + 2 * 4,  # and two counters
        "teacher": 2 * TEACHER_CHIP,
        "student's initial weights": 4 * STUDENT_CHIP,
        "teacher's prefix": PREFIX,
        "batch": sum(BATCH.values()),
    }
    assert state.ema is None and frozen.base is None
    found = find_buffers(mesh8, teacher__param_dtype="float32", loss=LossConfig())[3]
    assert found["teacher"] == 4 * TEACHER_CHIP
    assert found["batch"] == sum(BATCH.values()) - BATCH["other"]


def test_without_another_teacher_the_initial_weights_are_counted_once(mesh8):
    average = dataclasses.replace(ALL_TERMS, teacher="ema")
    found = find_buffers(mesh8, False, average, STUDENT, teacher__param_dtype="bfloat16")[3]
    assert found == {
        "trained weights": 4 * STUDENT_CHIP,
        "optimiser moments": 2 * 4 * STUDENT_CHIP + 2 * 4,
        "moving average": 4 * STUDENT_CHIP,
        "teacher": 4 * STUDENT_CHIP,
        "teacher's prefix": 2 * 2 * 2 * 8 * 50 * 2 // 2,
        "batch": sum(BATCH.values()),
    }


def test_an_adapter_is_trained_in_float32_whatever_the_types_of_base_and_teacher(mesh8):
    fields = {"lora__rank": 4, "lora__targets": ("q", "down"), "model__param_dtype": "bfloat16"}
    average = dataclasses.replace(ALL_TERMS, teacher="ema")
    _, frozen, _, found = find_buffers(mesh8, True, average, teacher__param_dtype="float32", **fields)
    assert found["trained weights"] == found["moving average"] == 4 * ADAPTER_CHIP
    assert found["optimiser moments"] == 2 * 4 * ADAPTER_CHIP + 2 * 4
    assert found["teacher"] == 4 * TEACHER_CHIP
    assert found["student's initial weights"] == 2 * STUDENT_CHIP == plan_step.count_chip_bytes(frozen.base)


class Fake:
    """train_step, its trace, its lowered and its compiled program, in one."""

    def __init__(self, memory=None, error=None):
        self.memory, self.error = memory, error

    def trace(self, *_, **given):
        self.given = given
        self.jaxpr = jax.make_jaxpr(lambda a, b: a @ b)(jnp.ones((2, 3)), jnp.ones((3, 5)))
        return self

    def lower(self, **_):
        return self

    def compile(self, compiler_options):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return self

    def memory_analysis(self):
        return types.SimpleNamespace(
            **{
                f"{name}_size_in_bytes": size
                for name, size in zip(("temp", "generated_code", "output", "alias"), self.memory)
            }
        )

    def as_text(self):
        return "ENTRY %main (a: f32[8]) -> f32[8] {\n  %b = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}\n}\n"


def plan_with(monkeypatch, fake, effort="full", teacher=TEACHER, has_samples=False, **fields) -> Plan:
    monkeypatch.setattr(plan_step, "train_step", fake)
    experiment, _ = make_step(**fields)
    return plan_step.make_plan(experiment, ALL_TERMS, STUDENT, teacher, SHAPES, jax.devices(), effort, has_samples)


def test_a_plan_adds_up_what_the_compiler_says(monkeypatch):
    made = plan_with(monkeypatch, Fake((1000, 200, 70, 30)))
    assert made.temporaries == 1000 + 200 + 40 and made.flops == 2 * 2 * 3 * 5 and made.chips == 8
    assert plan_with(monkeypatch, Fake((1000, 200, 30, 70))).temporaries == 1200
    assert made.total == sum(made.buffers.values()) + 1240
    assert made.traffic == {"all-reduce": hlo.Traffic(1, 32.0)}
    assert made.buffers["student's initial weights"] == 4 * STUDENT_CHIP  # the teacher is another model


def test_a_step_on_the_teachers_samples_is_traced_with_them(monkeypatch, mesh8):
    made = plan_with(monkeypatch, fake := Fake((0, 0, 0, 0)), has_samples=True)
    empty = Rollout(np.zeros((16, 21), np.int32), np.zeros((16, 21), bool), np.zeros((16, 21), np.float32))
    planned, run = (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), rollout)
        for rollout in (fake.given["rollout"], put_batch(empty, mesh8))
    )
    assert planned == run
    assert made.buffers["teacher's samples"] == 4 * 21 * (4 + 1 + 4)
    made = plan_with(monkeypatch, fake := Fake((0, 0, 0, 0)))
    assert fake.given["rollout"] is None and "teacher's samples" not in made.buffers


def test_a_teacher_of_its_own_decodes_before_training(monkeypatch):
    made = plan_with(monkeypatch, Fake((10**6, 0, 0, 0)))
    assert made.teacher_stage == {
        "teacher": 4 * TEACHER_CHIP,
        "student's initial weights": 4 * STUDENT_CHIP,
        "teacher's prefix": PREFIX,
        "weights for decoding": 2 * (TEACHER_MATRICES + TEACHER_NORMS) // 2,
    }
    assert made.peak == made.total
    large = dataclasses.replace(TEACHER, mlp_width=8000)
    made = plan_with(monkeypatch, Fake((10**6, 0, 0, 0)), teacher=large)
    assert made.peak == sum(made.teacher_stage.values()) > made.total
    assert plan_with(monkeypatch, Fake((10**6, 0, 0, 0)), teacher=None).teacher_stage == {}
    for sharding in ("gathered", "stored"):  # weights in the type that decoding reads, which has no other sharding
        fields = {"teacher__param_dtype": "bfloat16", "rollout__weights": sharding}
        made = plan_with(monkeypatch, Fake((10**6, 0, 0, 0)), **fields)
        assert ("weights for decoding" in made.teacher_stage) == (sharding == "gathered")


def test_a_refused_step_needs_what_the_compilers_error_says_less_its_arguments(monkeypatch):
    error = "RESOURCE_EXHAUSTED: Ran out of memory in hbm.\nprogram  1.50M"
    made = plan_with(monkeypatch, Fake(error=error))
    arguments = sum(made.buffers.values()) - made.buffers["student's initial weights"]  # not an argument of the step
    assert made.temporaries == 1.5 * 2**20 - arguments - 4  # and the number of the step
    assert made.traffic is None and made.refused.startswith("RESOURCE_EXHAUSTED")
    assert plan_with(monkeypatch, Fake(error=error), "memory").refused == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("temporaries (3.25K)", 3328),
        ("program  512.00M", 512 * 2**20),
        ("program 900.00M and temporaries (1.50G)", 1.5 * GIB),
        ("temporaries (2T)", 2 * 2**40),
    ],
)
def test_the_compilers_sizes_are_read_in_their_units(text, size):
    assert plan_step._parse_refusal(f"RESOURCE_EXHAUSTED: no memory.\n{text}")[1] == size


def test_other_errors_of_the_compiler_are_no_plan():
    for message in ("INTERNAL: program 9.00M of memory", "RESOURCE_EXHAUSTED: memory"):
        with pytest.raises(ValueError, match="the step does not compile: "):
            plan_step._parse_refusal(message)


# --- Arithmetic ---


def find_whiles(function, *arguments):
    return [e for e in jax.make_jaxpr(function)(*arguments).jaxpr.eqns if e.primitive.name == "while"]


def test_decode_loops_count_from_the_bound_of_the_previous_one():
    def rollout(x):
        for stop in (8, 16, 24):
            x = lax.while_loop(lambda x, stop=stop: (x < stop) & (x > -5), lambda x: x + 1, x)
        return x

    step = make_step(dataclasses.replace(ALL_TERMS, chunk=8))[1]
    loops = find_whiles(rollout, 0)
    (head,) = find_whiles(lambda x, end: lax.while_loop(lambda x: x < end, lambda x: x + 1, x), 0, 9)
    trips = flops._Trips(step)
    # The prompt's pass gives the first token. A second rollout begins anew. The head: 21 columns, 8 at a time.
    assert [trips(loop) for loop in (*loops, head, *loops, head)] == [7, 8, 8, 3, 7, 8, 8, 3]
    assert flops.count_head_chunks(dataclasses.replace(step, loss=LossConfig(chunk=7))) == 3
    assert flops.count_head_chunks(dataclasses.replace(step, loss=LossConfig(chunk=128))) == 1


def test_the_loops_of_a_sampler_count_for_responses_of_full_length(make_params, make_prompts, mesh):
    """Four loops with growing caches, and three for fewer and fewer rows, which run only if rows end early."""
    step = make_step(rollout__max_tokens=128)[1]
    prompts, keys = put_batch((make_prompts(0, 32, 5), np.arange(32)), mesh)

    def roll_out(params):
        return sample(params, STUDENT, step.sampling, prompts, rng.row_keys(jax.random.key(0), keys))

    trips, loops = flops._Trips(step), find_whiles(roll_out, make_params(STUDENT, 0, mesh))
    assert [trips(loop) for loop in loops * 2] == [31, 32, 32, 32, 0, 0, 0] * 2


def test_a_compiled_samplers_loops_have_their_ends_in_their_names(make_params, make_prompts, mesh):
    step = make_step(rollout__max_tokens=40)[1]
    prompts, keys = put_batch((make_prompts(0, 8, 5), np.arange(8)), mesh)

    def roll_out(params):
        return sample(params, STUDENT, step.sampling, prompts, rng.row_keys(jax.random.key(0), keys))

    text = jax.jit(roll_out).lower(make_params(STUDENT, 0, mesh)).compile().as_text()
    loops = {line for line in text.splitlines() if " while(" in line and hlo.DECODE_TO in line}
    assert sorted(hlo._count_trips({"main": list(loops)}, 1).values()) == [8, 31]


def test_the_bound_of_a_loop_is_the_largest_constant_that_it_compares_with():
    (loop,) = find_whiles(lambda x: lax.while_loop(lambda x: (x < 30) & (x * 2 < 7), lambda x: x + 50, x), 0)
    assert flops.find_loop_bound(loop) == 30


@pytest.mark.slow
def test_the_arithmetic_of_a_whole_step(mesh):
    """Responses of 40 tokens: decode loops with 32 and 40 of their columns in the cache, two chunks of the head."""
    loss = dataclasses.replace(ALL_TERMS, chunk=32)
    student, teacher = (
        dataclasses.replace(model, dtype="float32", attention="reference") for model in (STUDENT, TEACHER)
    )
    experiment, step = make_step(loss, teacher, rollout__max_tokens=40)
    step = dataclasses.replace(step, model=student)
    shapes = BatchShapes(4, 2, 40, 2, ViewShape(0, 10, 10), ViewShape(0, 30, 30), ViewShape(0, 50, 50))
    state, frozen, batch, _ = plan_step.make_arguments(experiment, step, True, shapes, mesh)
    jaxpr = plan_step.train_step.trace(state, frozen, batch, config=step).jaxpr.jaxpr

    def read(tokens, columns):  # multiply-adds of the student's layers; a product with the keys, one with the values
        return tokens * (STUDENT_MATRICES + 2 * 2 * 32 * columns)

    def roll_out(prompt):
        loops = ((1, 32), (32, 40))
        decoded = sum((stop - start) * (read(1, prompt + stop - 1) + 32 * 40) for start, stop in loops)
        return read(prompt, prompt) + 32 * 40 + decoded

    def learn(prompt):  # forward, and twice as much backward; the last token of a response is not read
        return 3 * (read(prompt + 39, prompt + 39) + 2 * 32 * 32 * 40)

    def teach(prompt):
        length = prompt + 39
        return length * (TEACHER_MATRICES + 2 * 3 * 32 * length) + 2 * 32 * 64 * 40

    expected = 4 * (roll_out(10) + learn(10) + teach(30) + learn(30)) + 2 * (roll_out(50) + learn(50) + teach(50))
    assert flops.count_step_flops(jaxpr, step) == 2 * expected


def test_products_of_batches_gradients_and_kernels():
    def count(function, *arguments):
        return flops.count_matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    a, b = jnp.ones((7, 2, 3, 4)), jnp.ones((7, 4, 3, 5))
    assert count(lambda a, b: jnp.einsum("zikj,zjkl->zil", a, b), a, b) == 2 * 7 * 2 * 5 * (3 * 4)
    x, w = jnp.ones((2, 3)), jnp.ones((3, 5))
    once = 2 * 2 * 3 * 5
    loss = lambda x, w: jnp.sum((x @ w) ** 2)  # noqa: E731
    assert count(loss, x, w) == once
    assert count(jax.grad(loss, (0, 1)), x, w) == 3 * once
    twice = lambda x, w: jnp.sum((x @ w) ** 2) + jnp.sum(jnp.sin(jax.jit(jnp.matmul)(x, w)))  # noqa: E731
    assert count(twice, x, w) == 2 * once
    layers = lambda x: lax.scan(lambda x, _: (lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], None), x, length=4)  # noqa: E731
    assert count(layers, jnp.ones((2, 2))) == 12 * 2 * 2 * 2 * 2
    assert count(lambda a: a + a, x) == 0

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    tiled = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((16, 24), jnp.float32), grid=(2, 3),
        in_specs=[pl.BlockSpec((8, 8), lambda i, j: (i, 0)), pl.BlockSpec((8, 8), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
    )  # fmt: skip
    assert count(tiled, jnp.ones((16, 8)), jnp.ones((8, 24))) == 2 * 16 * 8 * 24


@pytest.mark.parametrize("prefix", [0, 41])
def test_products_of_cudnns_attention(prefix, monkeypatch):
    """No GPU computes here: the library checks its arguments, and the trace has its primitives, whose products are not
    in it. One call reads a row's own columns, another the prefix, padded to an even number of columns like the rows."""
    monkeypatch.setattr(cudnn.library, "check_cudnn_version", lambda: 91200)
    q, k, v = (jnp.ones((3, heads, 33, 16), jnp.bfloat16) for heads in (4, 2, 2))
    shared = PrefixKV(*[jnp.ones((2, prefix, 16), jnp.bfloat16)] * 2) if prefix else None
    attend = functools.partial(cudnn.attend, real_BxL=jnp.ones((3, 33), bool), prefix=shared)

    def count(function):
        return flops.count_matmul_flops(jax.make_jaxpr(function)(q, k, v).jaxpr)

    # Two products forward; five backward, one of which computes the scores again.
    once = 2 * (3 * 4 * 34 * 16) * (34 + (prefix and prefix + 1))
    assert count(attend) == 2 * once
    assert count(jax.grad(lambda *operands: jnp.sum(attend(*operands)), (0, 1, 2))) == (2 + 5) * once


# --- Collectives ---


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 3 / 4 * 800), ("reduce-scatter", 3 * 800), ("all-gather", 3 / 4 * 800),
        ("all-to-all", 3 / 4 * 800), ("ragged-all-to-all", 3 / 4 * 800), ("collective-permute", 800),
        ("collective-broadcast", 800),
    ],
)  # fmt: skip
def test_each_kind_sends_its_share_of_800_bytes_among_four(kind, sent):
    assert hlo.compute_sent_bytes(kind, 800, 4) == sent


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[8,4]{1,0}", 64), ("f16[5]", 10), ("f32[3]", 12), ("s32[]", 4), ("u32[2]", 8), ("pred[9]", 9),
        ("s8[2,3]", 6), ("u8[7]", 7), ("s16[2]", 4), ("u16[2]", 4), ("f64[2]", 16), ("s64[2]", 16), ("u64[2]", 16),
        ("f8e4m3fn[6]", 6), ("(f32[10]{0}, bf16[40]{0})", 40 + 80), ("()", 0), ("f32[0,4]", 0),
    ],
)  # fmt: skip
def test_bytes_of_a_type_in_a_programs_text(text, size):
    assert hlo._measure_bytes(text) == size


@pytest.mark.parametrize(
    ("operation", "kind", "size"),
    [
        # Arrays that the compiler has combined into one collective: all of them are sent.
        ("(f32[64]{0}, f32[32]{0}) all-reduce(%a, %b)", "all-reduce", 384),
        ("(f32[64]{0}, f32[32]{0}) all-reduce-start(%a, %b)", "all-reduce", 384),
        ("(s8[1], s8[2], s8[4], s8[8], s8[16], /*index=5*/s8[32]{0:T(4)}) all-to-all(%a)", "all-to-all", 63),
        ("(bf16[8]{0}, f32[8]{0}) all-gather(%a, %b)", "all-gather", 48),
        # Asynchronous ones of these kinds: inputs, results, and what the compiler adds.
        ("(f32[8,2]{1,0:T(8,128)S(1)}, f32[8,8]{1,0:T(8,128)}) all-gather-start(%a)", "all-gather", 256),
        ("((f32[2]{0}, s8[1]{0}), (f32[8]{0}, s8[4]{0})) all-gather-start(%a, %b)", "all-gather", 36),
        ("(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a)", "collective-permute", 32),
        ("((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%a)", "reduce-scatter", 8),
        ("f32[8]{0} all-gather-start(%a)", "all-gather", 32),
    ],
)
def test_a_collective_has_the_bytes_of_its_results(operation, kind, size):
    text = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %x = {operation}, replica_groups={{{{0,1,2,3}}}}\n}}\n"
    assert hlo.count_traffic(text, 1) == {kind: hlo.Traffic(1, hlo.compute_sent_bytes(kind, size, 4))}


NESTED = """
%inner (p: f32[8]) -> f32[8] {
  %p1 = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
%outer (p: f32[8]) -> f32[8] {
  %w1 = f32[8] while(%p), condition=%any, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %g = f32[8]{0} all-to-all(%p), replica_groups=[4,2]<=[8]
}
%any (p: f32[8]) -> pred[] {
  %n = s32[] constant(2)
  %m = s32[] constant(11)
}
%left (p: f32[8]) -> f32[8] {
  %l = f32[8]{0} all-gather-start(%p), replica_groups={{0,1,2,3}}
}
%right (p: f32[8]) -> f32[8] {
  %r = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w2 = f32[8] while(%a), condition=%any, body=%outer
  %c = f32[8] conditional(%i, %a, %a), branch_computations={%left, %right}
  %d = f32[8] conditional(%i, %a, %a), true_computation=%left, false_computation=%right
  %e = f32[8]{0} all-reduce(%a)
}
"""


def test_nested_loops_multiply_and_branches_are_read():
    found = hlo.count_traffic(NESTED, head_chunks=100)
    assert found == {
        "collective-permute": hlo.Traffic(11 * 5, 55 * 32.0),
        "all-to-all": hlo.Traffic(11, 11 * 16.0),
        "all-gather": hlo.Traffic(2, 2 * 24.0),
        "reduce-scatter": hlo.Traffic(2, 2 * 16.0),
        "all-reduce": hlo.Traffic(1, 32.0),  # without groups: two devices
    }


# --- Chips ---


def test_the_published_figures():
    """TFLOP/s, GiB, GB/s of memory, and GB/s of links: 2,400, 1,600, 4,800 and 3,200 Gbit/s."""
    assert {name: tuple(chip) for name, chip in chips.CHIPS.items()} == {
        "v4": (275, 32, 1228, 2400 / 8), "v5e": (197, 16, 819, 1600 / 8), "v5p": (459, 95, 2765, 4800 / 8),
        "v6e": (918, 32, 1638, 3200 / 8),
    }  # fmt: skip


def test_slices_in_order_of_their_chips():
    assert [chips.count_chips(shape) for shape in chips.SHAPES_2D] == [1, 4, 8, 16, 32, 64, 128, 256]
    assert [chips.count_chips(shape) for shape in chips.SHAPES_3D] == [2**n for n in range(2, 12)]
    assert chips.SHAPES["v4"] == chips.SHAPES["v5p"] == chips.SHAPES_3D
    assert chips.SHAPES["v5e"] == chips.SHAPES["v6e"] == chips.SHAPES_2D
    assert chips.count_chips("v5p:2x4x4") == 32
    found = [chips.find_next_larger(name) for name in ("v5e:1x1", "v6e:2x4", "v5p:2x2x4", "v4:8x16x16", "v5e:16x16")]
    assert found == ["v5e:2x2", "v6e:4x4", "v5p:2x4x4", None, None]
    with pytest.raises(ValueError, match="the nearest are v5e:1x1 and v5e:2x2$"):
        chips.parse_generation("v5e:1x3")
    with pytest.raises(ValueError, match="the nearest are v5p:8x16x16$"):
        chips.parse_generation("v5p:16x16x16")
    assert [chips.parse_generation(name) for name in ("v4:2x2x1", "v5e:16x16")] == ["v4", "v5e"]


def test_local_devices_are_counted():
    assert len(chips.get_local_devices(3)) == 3
    with pytest.raises(ValueError, match="--devices=9, but there are only 8 cpu devices here"):
        chips.get_local_devices(9)


# --- Remedies and the report ---

PARTS = {"cache of the responses": 300, "gradients": 1000, "weights for decoding": 400}
BUFFERS = {"trained weights": 500, "optimiser moments": 1100, "moving average": 60, "teacher": 70, "batch": 9}


def make_plan(
    temporaries=5000, parts=PARTS, seconds=100.0, traffic=None, refused="", effort="full", buffers=BUFFERS, stage=None
):
    flops, floor = 8 * 10**14, 3 * 10**9
    return Plan(4, buffers, temporaries, parts, flops, floor, seconds, traffic, refused, effort, stage or {})


FOUR = MeshConfig(data=1, fsdp=4, tensor=1)


def estimate(plan, mesh=FOUR):
    config = tiny.get_config()
    config.train.batch_size, config.train.micro_batches = 64, 2
    found = list(remedies.estimate_remedies(plan, config, mesh, "v5e:4x4", 16))
    assert not any(one.compiled for one in found)
    return {one.flag.removeprefix("--config."): one.total_bytes for one in found}


def test_estimates_of_remedies():
    total = 5000 + 500 + 1100 + 60 + 70 + 9
    assert estimate(make_plan()) == {
        "train.micro_batches=4": total - 4000 // 2,  # gradients are kept: 1,000 of 5,000, more than cache and copies
        "model.remat=full": total - 4000 * 3 // 4,
        "rollout.weights=stored": total - 300,  # three quarters of the copy
        "lora.rank=16": total - (500 + 1100 + 1000),
        "--topology=v5e:4x4": total // 4,
    }
    decoding = estimate(make_plan(parts=PARTS | {"gradients": 200}))  # cache and copies are kept: 700
    assert decoding["train.micro_batches=4"] == total - 4300 // 2
    small = estimate(make_plan(temporaries=600))  # no activations
    assert small["train.micro_batches=4"] == small["model.remat=full"] == total - 4400
    assert estimate(make_plan(buffers={"trained weights": 1}, temporaries=10))["lora.rank=16"] == 0


def test_what_helps_training_does_not_help_a_teacher_that_decodes_before():
    total = 5000 + 500 + 1100 + 60 + 70 + 9
    assert estimate(make_plan(stage={"teacher": 4000, "weights for decoding": 8000})) == {
        "train.micro_batches=4": 12000,
        "model.remat=full": 12000,
        "rollout.weights=stored": total - 300,  # the teacher's copy is of a quarter of its size, and 6,000 are less
        "lora.rank=16": 12000,
        "--topology=v5e:4x4": 3000,
    }
    tried = make_plan(0, buffers={"x": 99}, stage={"teacher": 120})
    given = [Remedy("a", 100, False)]
    assert remedies.choose_remedies(make_plan(seconds=1.0), given, 100, {"a": tried}.get) == [Remedy("a", 120, True)]


def test_weights_as_stored_are_shared_by_the_devices_along_fsdp_alone():
    plan = make_plan()
    for data, fsdp, saved in ((4, 1, 0), (2, 2, 200), (2, 4, 300)):
        assert estimate(plan, MeshConfig(data, fsdp, 1))["rollout.weights=stored"] == plan.total - saved


def test_flags_by_the_numbers_of_a_configuration():
    config = tiny.get_config()
    config.train.batch_size, config.train.retention_rows, config.train.micro_batches = 64, 32, 4
    assert remedies.list_flags(config, 4)[0] == "--config.train.micro_batches=8"
    assert "micro_batches" not in "".join(remedies.list_flags(config, 8))  # 32 rows do not split into 8 x 8
    config.train.batch_size, config.train.retention_rows = 16, 32
    assert "micro_batches" not in "".join(remedies.list_flags(config, 4))
    config.eval.batch_size = 44
    assert "--config.eval.batch_size=20" in remedies.suggest_less_memory(config, 4)  # half, in whole rows of 4 devices
    config.eval.batch_size = 4
    assert "eval.batch_size" not in remedies.suggest_less_memory(config, 4)


def test_changes_are_compiled_if_the_plan_took_less_than_20_seconds():
    given = [Remedy("a", 100, False), Remedy("b", 101, False), Remedy("c", 90, False)]
    compile_with = {"a": make_plan(0, buffers={"x": 101}), "b": make_plan(1, buffers={"x": 99}), "c": None}.get
    assert remedies.choose_remedies(make_plan(seconds=20.0), given, 100, compile_with) == [given[0], given[2]]
    found = remedies.choose_remedies(make_plan(seconds=19.9), given, 100, compile_with)
    assert found == [Remedy("b", 100, True), given[2]]


def test_the_verdict_at_its_limits():
    judged = [(bytes_, report.judge(make_plan(0, buffers={"x": bytes_}), 100)) for bytes_ in
              (92 * GIB, 92 * GIB + 1, 100 * GIB, 100 * GIB + 1)]  # fmt: skip
    assert [verdict for _, verdict in judged] == ["fits", "tight", "tight", "does not fit"]
    teacher = make_plan(0, buffers={"x": 1}, stage={"teacher": 60 * GIB, "weights for decoding": 41 * GIB})
    assert report.judge(teacher, 100) == "does not fit" and report.judge(teacher, 110) == "fits"


def test_the_report_of_a_teacher_that_decodes_before_training():
    stage = {"teacher": 9 * GIB, "weights for decoding": 9 * GIB}
    result = report.as_json(make_plan(8 * GIB, buffers={}, stage=stage), {}, "v5e", [])
    assert result["teacher_stage"] == stage and result["share_of_hbm"] == 1.125
    lines = report.as_text(result).splitlines()
    assert "     8.00 GiB  in total, 50 % of 16.00 GiB" in lines
    assert (
        "    18.00 GiB  at least before training, while the teacher decodes (weights alone, no cache), 112 % of "
        "16.00 GiB: does not fit" in lines
    )
    small = report.as_json(make_plan(8 * GIB, buffers={}, stage={"teacher": GIB}), {}, "v5e", [])
    lines = report.as_text(small).splitlines()
    assert "     8.00 GiB  in total, 50 % of 16.00 GiB: fits" in lines
    assert any(line.startswith("     1.00 GiB  at least before training") and line.endswith("GiB") for line in lines)
    local = report.as_text(report.as_json(make_plan(stage=stage), {}, None, []))
    assert "    18.00 GiB  at least before training, while the teacher decodes (weights alone, no cache)\n" in local


def test_the_report_of_a_v5e():
    traffic = {"all-reduce": hlo.Traffic(5, 4e9), "all-gather": hlo.Traffic(1234, 6.5e9)}
    held = {"trained weights": 8 * GIB, "batch": GIB // 10 - 1}
    plan = make_plan(2 * GIB, PARTS | {"gradients": GIB}, 3.14, traffic, buffers=held)
    result = report.as_json(plan, {"model": "m"}, "v5e", [Remedy("--f=1", GIB // 2, True)])
    total = 10 * GIB + GIB // 10 - 1
    assert result == {
        "model": "m", "chips": 4, "bytes": held | {"temporaries": 2 * GIB},
        "inside_temporaries": PARTS | {"gradients": GIB}, "total_bytes": total, "flops": 8 * 10**14,
        "compile_seconds": 3.1, "refused": "", "effort": "full", "teacher_stage": {},
        "collectives": {
            "all-gather": {"count": 1234, "sent_bytes": 6_500_000_000},
            "all-reduce": {"count": 5, "sent_bytes": 4_000_000_000},
        },
        "hbm_bytes": 16 * GIB, "share_of_hbm": 0.6312, "verdict": "fits",
        # 2e14 of 197e12 a second, 3e9 bytes of 819e9, 10.5e9 of 200e9; four digits
        "floor_seconds": {"compute": 1.015, "memory": 0.003663, "interconnect": 0.0525},
        "remedies": [{"flag": "--f=1", "total_bytes": GIB // 2, "compiled": True}],
    }  # fmt: skip
    lines = report.as_text(result).splitlines()
    for line in (
        "     8.00 GiB  trained weights", "   102.40 MiB  batch", "     2.00 GiB  temporaries",
        "    10.10 GiB  in total, 63 % of 16.00 GiB: fits",
        "arithmetic: 8e+14 FLOPs per step, with responses of full length",
        "  all-gather               1,234       6.500", "  all-reduce                   5       4.000",
        "a step takes at least: compute 1.01 s, memory 0.00366 s, interconnect 0.0525 s",
        "compiled as a run does in 3 s", "     0.50 GiB  --f=1  (compiled)",
    ):  # fmt: skip
        assert line in lines, line
    unknown = report.as_text(report.as_json(make_plan(), {}, "v5e", []))
    assert "interconnect" not in unknown and make_plan().compute_floors(chips.CHIPS["v5e"])["interconnect"] == 0


# --- Choices ---

SHORT = run.Lengths(0, 10)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 2), ({"beta": 0.1}, 3), ({"mu": 0.1}, 4), ({"reference": 0.1}, 3), ({"teacher": "ema"}, 3),
        ({"beta": 0.1, "mu": 0.1, "reference": 0.1, "teacher": "ema"}, 7),
        ({"beta": 0.1, "anchor": "handover"}, 3), ({"beta": 0.1, "anchor": "teacher_bare"}, 4),
        ({"beta": 0.1, "anchor": "ema"}, 5),
    ],
)  # fmt: skip
def test_passes_of_an_arm(changes, passes):
    assert run._count_passes(LossConfig(**changes)) == passes


@pytest.fixture
def planned(monkeypatch):
    """planned(config, *arguments): plan with plans of fixed bytes. The arguments of the made plans are in ``made``."""
    made = []

    def make(config, loss, model, teacher, shapes, devices, effort, has_samples):
        made.append(types.SimpleNamespace(config=config, loss=loss, model=model, teacher=teacher, shapes=shapes,
                                          devices=len(devices), effort=effort, has_samples=has_samples))  # fmt: skip
        parts = {name: size * 2**20 for name, size in PARTS.items()}
        buffers = {name: size * 2**20 for name, size in BUFFERS.items()}
        temporaries = (14000, 13000, 13500, 4000, 5000, None)[len(made) - 1]
        if temporaries is None:
            raise ValueError("the configuration does not allow it")
        return make_plan(temporaries * 2**20, parts, 1.0, buffers=buffers)

    monkeypatch.setattr(run, "make_plan", make)
    monkeypatch.setattr(chips, "make_tpu_devices", lambda topology: jax.devices()[: chips.count_chips(topology)])
    return types.SimpleNamespace(made=made, plan=run.plan)


@pytest.mark.parametrize(
    ("arms", "chosen"),
    [
        (("opcd", "opcd_anchored", "opcd_retained"), "opcd_retained"),
        (("opcd_retained", "opcd_anchored", "opcd"), "opcd_retained"),
        (("opcd_anchored", "opcd"), "opcd_anchored"),
        (("opcd", "opcd_anchored", "only_retained"), "only_retained"),
        (("off_policy", "opcd"), "opcd"),  # as many passes, and the student's rollout
    ],
)
def test_the_arm_with_the_most_passes_is_planned(arms, chosen, planned):
    config = tiny.get_config()
    config.arms.only_retained = {"mu": 1.0}
    config.run_arms = arms
    assert planned.plan(config, None, 8, lengths=SHORT)["arm"] == chosen
    assert planned.made[-1].loss == config_lib.experiment(config, 8).arms[chosen]
    assert planned.plan(config, None, 8, arms[0], lengths=SHORT)["arm"] == arms[0]


def test_an_arm_of_the_teachers_samples_alone_is_planned_without_a_rollout(monkeypatch):
    monkeypatch.setattr(plan_step, "train_step", fake := Fake((0, 0, 0, 0)))
    config = tiny.get_config()
    config.arms.warm = {"off_policy_steps": 3, "off_policy_divergence": "forward_kl"}
    config.arms.long_warm = {"off_policy_steps": config.train.steps, "off_policy_divergence": "forward_kl"}
    config.run_arms = ("opcd", "off_policy", "warm", "long_warm")
    found = {}
    for arm in config.run_arms:
        notes = run.plan(config, None, 8, arm, lengths=SHORT)["notes"]
        is_given = fake.given.get("rollout") is not None
        found[arm] = is_given, fake.given["config"].loss.divergence
        assert ("all steps learn from the teacher's samples, which are drawn before training" in notes) == is_given
    assert found == {
        "opcd": (False, "reverse_kl"), "off_policy": (True, "forward_kl"),
        "warm": (False, "reverse_kl"), "long_warm": (True, "forward_kl"),
    }  # fmt: skip


def test_a_teacher_that_is_too_large_to_decode_does_not_fit(monkeypatch):
    monkeypatch.setattr(plan_step, "train_step", Fake((0, 0, 0, 0)))
    monkeypatch.setattr(chips, "make_tpu_devices", lambda topology: jax.devices()[: chips.count_chips(topology)])
    config = tiny.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 4
    config.teacher_base.steps, config.teacher_base.width = 1, 1024
    config.teacher_base.layers, config.teacher_base.mlp_width = 20, 65536  # 4 billion scalars
    assert run.plan(config, "v5e:2x2", None, lengths=SHORT)["verdict"] == "does not fit"
    config.rollout.weights = "stored"
    assert run.plan(config, "v5e:2x2", None, lengths=SHORT)["verdict"] == "fits"


def test_a_step_without_a_reserve_is_planned_again_with_one_change_each(planned):
    config = tiny.get_config()
    config.train.batch_size, config.mesh.fsdp, config.model.dtype = 32, 2, "auto"
    result = planned.plan(config, "v5e:2x2", None, None, "memory", SHORT)
    assert result["verdict"] == "tight" and result["rows_over"] == 4
    assert result["step"].startswith("float32")  # the devices are processors here
    first, parts, remat, stored, lora, larger = planned.made
    assert [one.devices for one in planned.made] == [4, 4, 4, 4, 4, 8]
    assert {one.effort for one in planned.made} == {"memory"}
    assert (first.shapes.rows, first.shapes.parts, first.shapes.responses) == (32, 1, 19)
    assert parts.config.train.micro_batches == parts.shapes.parts == 2
    assert (first.model.remat, remat.model.remat) == ("dots", "full")
    assert (first.config.rollout.weights, stored.config.rollout.weights) == ("gathered", "stored")
    assert first.config.lora is None and lora.config.lora.rank == 16
    assert larger.config.mesh.data == 4 and larger.config.train == first.config.train
    # In MiB. 92 % of 16 GiB are 15,073: remat, with 15,239, does not help. The larger slice is an estimate, a half.
    held = sum(BUFFERS.values())
    found = [(one["total_bytes"] / 2**20, one["compiled"]) for one in result["remedies"]]
    assert found == [(13000 + held, True), (4000 + held, True), (5000 + held, True), ((14000 + held) / 2, False)]


@pytest.mark.parametrize("is_away", [False, True])
def test_a_plan_says_that_it_counts_a_teacher_in_the_hosts_memory(is_away, planned):
    config = tiny.get_config()
    config.teacher.offload = is_away
    notes = planned.plan(config, None, 8, lengths=SHORT)["notes"]
    assert notes.startswith("prompts have the lengths of --prefix and --question")
    assert notes.endswith("; teacher.offload: the teacher is counted as if it stayed on the device") == is_away


@pytest.mark.parametrize(("own", "theirs"), [(28, 29), (29, 28)])
def test_both_models_need_the_positions(own, theirs, planned, monkeypatch):
    models = {"org/student": (STUDENT, own), "org/teacher": (TEACHER, theirs)}

    def find(path, dtype, remat):
        model, positions = models[path]
        return dataclasses.replace(model, dtype=dtype, max_positions=positions), "a table"

    monkeypatch.setattr(run, "find_architecture", find)
    config = tiny.get_config()
    config.model.path, config.teacher.path = "org/student", "org/teacher"
    with pytest.raises(ValueError, match="a prompt of 10 tokens and rollout.max_tokens = 19 .* 28 positions"):
        run.plan(config, None, 8, lengths=SHORT)
    models |= {"org/student": (STUDENT, 29), "org/teacher": (TEACHER, 29)}
    run.plan(config, None, 8, lengths=SHORT)
    assert (planned.made[0].model.width, planned.made[0].teacher.width) == (32, 64)


def test_a_step_may_fill_all_positions_of_a_model():
    model = dataclasses.replace(STUDENT, max_positions=66 + 21)  # the longest prompt is one of another context
    run._check_positions(model, SHAPES)
    with pytest.raises(ValueError, match="a prompt of 66 tokens and rollout.max_tokens = 21 .* 86 positions"):
        run._check_positions(dataclasses.replace(model, max_positions=86), SHAPES)
