"""Compile the whole step for devices that need not exist, and add up its memory and arithmetic."""

from __future__ import annotations

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from ctxjax import sharding
from ctxjax.config_sections import Experiment
from ctxjax.data.shapes import ViewShape
from ctxjax.distill import optim
from ctxjax.distill.flops import count_head_chunks, count_step_flops
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.objective import count_passes, needs_ema
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, train_step
from ctxjax.host import compile_times
from ctxjax.inputs.batch_shapes import BatchShapes
from ctxjax.models import lora, mesh_check, params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.plan import hlo
from ctxjax.plan.chips import Chip
from ctxjax.types import Batch, Frozen, Prompts, Rollout, TrainState

# How far to compile: compiler options. "memory": with almost no memory allowed, the TPU compiler ends after it has
# placed all buffers, and its error gives their size; it may have recomputed more than necessary to save memory.
# "least": machine code with the least optimisation, in minutes. "full": as in a run; it takes several times as long.
EFFORTS: dict[str, dict | None] = {
    "memory": {"xla_tpu_max_hbm_size_mib": "1"},
    "least": {"exec_time_optimization_effort": -1.0},
    "full": None,
}


@dataclasses.dataclass
class Plan:
    """The cost of one step. Bytes are those of the chip that holds most; FLOPs are those of all chips together.

    ``buffers``: bytes of what stays in memory, by item. ``temporary_parts``: bytes of parts of the temporaries,
    computed from shapes; they need not exist at the same time. ``refused``: the compiler's message if the step does not
    fit. ``traffic``: None if the step was refused or ``effort`` is "memory". ``teacher_stage``: bytes, by item, of what
    is in memory while a teacher that is another model decodes before training, for its evaluation and its samples;
    without caches. {} if the student's initial weights are the teacher.
    """

    chips: int
    buffers: dict[str, int]
    temporaries: int
    temporary_parts: dict[str, int]
    flops: int
    hbm_floor: int
    compile_seconds: float
    traffic: dict[str, hlo.Traffic] | None
    refused: str = ""
    effort: str = "full"
    teacher_stage: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of the step."""
        return sum(self.buffers.values()) + self.temporaries

    @property
    def peak(self) -> int:
        """Bytes of the larger one: the step, or what is before it."""
        return max(self.total, sum(self.teacher_stage.values()))

    def compute_floors(self, chip: Chip) -> dict[str, float]:
        """Return lower bounds of a step's time, in seconds: by arithmetic, memory traffic and collectives alone."""
        sent = sum(kind.sent for kind in (self.traffic or {}).values())
        return {
            "compute": self.flops / self.chips / (chip.tflops * 1e12),
            "memory": self.hbm_floor / (chip.hbm_gbps * 1e9),
            "interconnect": sent / (chip.ici_gbps * 1e9),
        }


def make_plan(
    config: Experiment,
    loss: LossConfig,
    model: ModelConfig,
    teacher: ModelConfig | None,
    shapes: BatchShapes,
    devices: list,
    effort: str = "full",
    has_samples: bool = False,
) -> Plan:
    """Compile the step of one arm.

    ``teacher``: None if the student's initial weights are the teacher. ``effort``: a key of EFFORTS, for TPUs.
    ``has_samples``: whether the step is given the teacher's samples and does not sample responses itself. Raises
    ValueError if the configuration does not fit the devices, or if compilation fails for another reason than memory.
    """
    mesh = sharding.make_mesh(devices=devices, **dataclasses.asdict(config.mesh))
    mesh_check.check_model_fits_mesh(model, mesh, "the student")
    mesh_check.check_model_fits_mesh(teacher or model, mesh, "the teacher")
    with jax.set_mesh(mesh):
        step = make_step_config(config, loss, model, teacher or model)
        state, frozen, batch, buffers = make_arguments(config, step, teacher is not None, shapes, mesh)
        rollout = None
        if has_samples:
            rollout = make_abstract_rollout(shapes, mesh)
            buffers["teacher's samples"] = count_chip_bytes(rollout)
        clock = time.monotonic()
        traced = train_step.trace(state, frozen, batch, config=step, rollout=rollout)
        arithmetic = count_step_flops(traced.jaxpr.jaxpr, step)
        lowered = traced.lower(lowering_platforms=(devices[0].platform,))
        rollouts = _list_rollouts(step, shapes, has_samples)
        parts = _compute_temporary_parts(step, rollouts, mesh)
        floor = _compute_hbm_floor(step, buffers, rollouts, mesh)
        stage = {} if teacher is None else _compute_teacher_stage(config, step, buffers, mesh)
        refused, used, sent = "", 0, None
        try:
            what = f"compiling the step for {len(devices)} x {devices[0].device_kind}"
            with compile_times.show(what, (step, shapes, effort, config.mesh)):
                compiled = lowered.compile(compiler_options=EFFORTS[effort])
            memory = compiled.memory_analysis()
            used = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            used += max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
            sent = hlo.count_traffic(compiled.as_text(), count_head_chunks(step))
        except jax.errors.JaxRuntimeError as error:
            refused, used = _parse_refusal(str(error))
            used -= count_chip_bytes((state, frozen, batch, rollout))
            refused = "" if effort == "memory" else refused
        seconds = time.monotonic() - clock
    return Plan(len(devices), buffers, used, parts, arithmetic, floor, seconds, sent, refused, effort, stage)


def make_step_config(config: Experiment, loss: LossConfig, model: ModelConfig, teacher: ModelConfig) -> StepConfig:
    sampling = SamplingConfig(eos_ids=(0,), pad_id=0, **dataclasses.asdict(config.rollout))
    return StepConfig(model, teacher, sampling, loss, config.optim, config.lora, config.train.micro_batches)


def make_arguments(config: Experiment, step: StepConfig, own_teacher: bool, shapes: BatchShapes, mesh: Mesh):
    """Return (state, frozen, batch, buffers): abstract arrays on ``mesh``, and their bytes per chip by item."""

    def model_params(model, dtype):
        return params_lib.abstract(transformer.param_specs(model), mesh, dtype)

    initial = model_params(step.model, config.model.param_dtype)
    trained = initial if step.lora is None else params_lib.abstract(lora.specs(step.model, step.lora), mesh)
    opt_state = jax.eval_shape(optim.optimizer(step.optim).init, trained)
    ema = trained if needs_ema(step.loss) else None
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, opt_state, key, ema)
    teacher = model_params(step.teacher_model, config.teacher.param_dtype) if own_teacher else initial
    batch = make_abstract_batch(step, shapes, mesh)
    prefix = None
    if batch.context.prefix_C is not None:
        prefix = jax.eval_shape(
            lambda params, tokens: transformer.prefix_kv(params, step.teacher_model, tokens),
            teacher, batch.context.prefix_C,
        )  # fmt: skip
    frozen = Frozen(teacher, None if step.lora is None else initial, prefix)
    items = {"trained weights": trained, "optimiser moments": opt_state, "moving average": ema, "teacher": teacher}
    if own_teacher:  # kept for the arms that follow
        items["student's initial weights"] = initial
    items |= {"teacher's prefix": prefix, "batch": batch}
    return state, frozen, batch, {name: size for name, tree in items.items() if (size := count_chip_bytes(tree))}


def make_abstract_batch(step: StepConfig, shapes: BatchShapes, mesh: Mesh) -> Batch:
    """Return a batch of these shapes, as a run's pipeline puts it on ``mesh`` for an arm with this step."""
    rows, replicated = NamedSharding(mesh, P(sharding.BATCH)), NamedSharding(mesh, P())

    def prompts(count: int, view: ViewShape) -> Prompts:
        own = [jax.ShapeDtypeStruct((count, view.columns), kind, sharding=rows) for kind in (jnp.int32, bool)]
        shared = jax.ShapeDtypeStruct((view.prefix,), jnp.int32, sharding=replicated) if view.prefix else None
        return Prompts(*own, shared)

    other = prompts(shapes.retention_rows, shapes.other) if step.loss.mu > 0 else None
    ids = jax.ShapeDtypeStruct((shapes.rows,), jnp.int32, sharding=rows)
    return Batch(prompts(shapes.rows, shapes.bare), prompts(shapes.rows, shapes.context), other, ids)


def make_abstract_rollout(shapes: BatchShapes, mesh: Mesh) -> Rollout:
    """Return the teacher's samples of a batch, as an off-policy step gets them."""
    shape, rows = (shapes.rows, shapes.responses), NamedSharding(mesh, P(sharding.BATCH))
    return Rollout(*(jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in (jnp.int32, bool, jnp.float32)))


def count_chip_bytes(tree) -> int:
    """Return the bytes of one chip's shards of all arrays."""

    def size(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _count_devices(mesh: Mesh, *axes: str) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))


def _count_cache_columns(model: ModelConfig, columns: int) -> int:
    """Return the columns of the caches of all layers together, after ``columns`` of a text."""
    return sum(min(columns, kind.window or columns) for kind in model.kinds)


def _list_rollouts(step: StepConfig, shapes: BatchShapes, has_samples: bool) -> list[tuple[int, ViewShape]]:
    """Return the rows and the prompts of each rollout that the step's program samples, one after the other."""
    own = [] if has_samples else [(shapes.rows, shapes.bare)]
    return own + [(shapes.retention_rows, shapes.other)] * (step.loss.mu > 0)


def _compute_column_bytes(model: ModelConfig, mesh: Mesh) -> int:
    """Return a chip's bytes of one column of one layer's cache, keys and values."""
    return 2 * model.kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize // _count_devices(mesh, "tensor")


def _compute_temporary_parts(step: StepConfig, rollouts: list[tuple[int, ViewShape]], mesh: Mesh) -> dict[str, int]:
    """Return the parts of the temporaries that follow from shapes, in bytes per chip.

    Of several ``rollouts`` the largest cache counts: one has ended before the next begins.
    """
    tokens, ways = step.sampling.max_tokens, sharding.batch_ways(mesh)
    columns = [rows // ways * _count_cache_columns(step.model, view.columns + tokens) for rows, view in rollouts]
    trained = transformer.param_specs(step.model) if step.lora is None else lora.specs(step.model, step.lora)
    gradients = count_chip_bytes(params_lib.abstract(trained, mesh)) * (2 if step.micro_batches > 1 else 1)
    return {
        "cache of the responses": max(columns, default=0) * _compute_column_bytes(step.model, mesh),
        "gradients": gradients,
        "weights for decoding": _compute_decoding_bytes(step.model, step.sampling, mesh) if rollouts else 0,
    }


def _compute_teacher_stage(config: Experiment, step: StepConfig, buffers: dict[str, int], mesh: Mesh) -> dict[str, int]:
    """Return Plan.teacher_stage of a run whose teacher is another model.

    Decoding reads a copy of the weights, unless they are stored in the type and the sharding in which it reads them.
    """
    kept = ("teacher", "student's initial weights", "teacher's prefix")
    model, sampling = step.teacher_model, step.sampling
    is_sharded_so = sampling.weights == "stored" or mesh.shape["fsdp"] == 1
    is_read_as_stored = config.teacher.param_dtype == model.dtype and is_sharded_so
    copy = {} if is_read_as_stored else {"weights for decoding": _compute_decoding_bytes(model, sampling, mesh)}
    return {name: buffers[name] for name in kept if name in buffers} | copy


def _compute_decoding_bytes(model: ModelConfig, sampling: SamplingConfig, mesh: Mesh) -> int:
    """Return the bytes per chip of the copy of the layers' weights that decoding reads."""
    layers = params_lib.count(transformer.param_specs(model)["layers"])
    axes = ("tensor",) if sampling.weights == "gathered" else ("fsdp", "tensor")
    return layers * jnp.dtype(model.dtype).itemsize // _count_devices(mesh, *axes)


def _compute_hbm_floor(
    step: StepConfig, buffers: dict[str, int], rollouts: list[tuple[int, ViewShape]], mesh: Mesh
) -> int:
    """Return the least number of bytes that a chip reads and writes in a step.

    Every decoded token of a rollout reads the weights and the filled cache. Every forward pass and every backward pass
    reads the weights once. The optimiser reads and writes its state, and the moving average if there is one.
    """
    tensor = _count_devices(mesh, "tensor")

    def count_scalars(model: ModelConfig) -> int:  # that one pass reads
        return params_lib.count(transformer.param_specs(model)["layers"]) + model.vocab_size * model.width

    model, kind = step.model, jnp.dtype(step.model.dtype).itemsize
    own, theirs = (count_scalars(one) * kind // tensor for one in (model, step.teacher_model))
    tokens = step.sampling.max_tokens

    def count_read_columns(rows: int, view: ViewShape) -> int:  # on average over a response's tokens
        prefix, columns = (_count_cache_columns(model, n) for n in (view.prefix, view.columns + tokens // 2))
        return prefix + rows // sharding.batch_ways(mesh) * columns

    column = _compute_column_bytes(model, mesh)
    decode = sum((tokens - 1) * (own + column * count_read_columns(rows, view)) for rows, view in rollouts)
    count = count_passes(step.loss)
    of_teacher = count["teacher"] + count["frozen"]
    passes = step.micro_batches * ((2 * count["student"] + count["ema"]) * own + of_teacher * theirs)
    weights = buffers["trained weights"]
    state = weights + buffers["optimiser moments"] + buffers.get("moving average", 0)
    return decode + passes + 2 * state + weights


def _parse_refusal(message: str) -> tuple[str, int]:
    """Return (message, bytes of arguments and temporaries) from the compiler's error if the program does not fit.

    Raises ValueError for any other error.
    """
    first = next((line.strip() for line in message.splitlines() if "memory" in line.lower()), "")
    sizes = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message) or re.search(r"program\s+([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not sizes:
        raise ValueError(f"the step does not compile: {message.strip().splitlines()[0]}") from None
    return first, int(float(sizes[1]) * 1024 ** ("KMGT".index(sizes[2]) + 1))
