"""The whole step compiled for devices that need not exist, and what its memory and arithmetic come to."""

from __future__ import annotations

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from ctxjax import sharding
from ctxjax.config import Experiment
from ctxjax.data.prompts import SHORTEST_PREFIX
from ctxjax.distill import optim
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, train_step
from ctxjax.models import lora, mesh_check, params as params_lib, transformer
from ctxjax.models.transformer import ModelConfig
from ctxjax.plan import flops, hlo
from ctxjax.plan.chips import Chip
from ctxjax.types import Batch, Frozen, Prompts, TrainState

# How far to compile: options of the compiler. A TPU's that is told of almost no memory ends where it has placed all
# buffers and says how much they take; it may have recomputed more to save memory than it would have to. "least" makes
# machine code with the least optimisation, in minutes; "full" is what a run does, and takes several times as long.
EFFORTS: dict[str, dict | None] = {
    "memory": {"xla_tpu_max_hbm_size_mib": "1"},
    "least": {"exec_time_optimization_effort": -1.0},
    "full": None,
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Tokens of a prompt without and with its context, and whether all rows share that context."""

    bare: int
    context: int
    shared: bool


@dataclasses.dataclass
class Plan:
    """What one step takes. Bytes are of one chip, its largest share; FLOPs of all. ``inside`` are parts of the
    temporaries, by their shapes, which need not all exist at one time. ``refused``: the compiler's own words, where
    it found that its temporaries do not fit; ``traffic`` is then None, as it is where ``effort`` is "memory"."""

    chips: int
    held: dict[str, int]
    temporaries: int
    inside: dict[str, int]
    flops: int
    hbm_floor: int
    compile_seconds: float
    traffic: dict[str, hlo.Traffic] | None
    refused: str = ""
    effort: str = "full"

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.temporaries

    def floors(self, chip: Chip) -> dict[str, float]:
        """Seconds of a step below which arithmetic, memory traffic and collectives, each alone, cannot go."""
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
    shapes: Shapes,
    devices: list,
    effort: str = "full",
) -> Plan:
    """Compiles the step of one arm. ``teacher`` None: the student's initial weights teach. ``effort``: a key of
    EFFORTS, for TPUs.

    Raises ValueError where the configuration does not fit the devices, and the compiler's error where it fails for
    another reason than memory.
    """
    mesh = sharding.make_mesh(devices=devices, **dataclasses.asdict(config.mesh))
    mesh_check.check_model_fits_mesh(model, mesh, "the student")
    mesh_check.check_model_fits_mesh(teacher or model, mesh, "the teacher")
    with jax.set_mesh(mesh):
        step = step_config(config, loss, model, teacher or model)
        state, frozen, batch, held = arguments(config, step, teacher is not None, shapes, mesh)
        clock = time.monotonic()
        traced = train_step.trace(state, frozen, batch, config=step)
        arithmetic = flops.matmul_flops(traced.jaxpr.jaxpr, _Trips(step))
        lowered = traced.lower(lowering_platforms=(devices[0].platform,))
        inside, floor = _inside(config, step, shapes, mesh), _hbm_floor(config, step, held, shapes, mesh)
        refused, used, sent = "", 0, None
        try:
            compiled = lowered.compile(compiler_options=EFFORTS[effort])
            memory = compiled.memory_analysis()
            used = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            used += max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
            sent = hlo.traffic(compiled.as_text(), head_turns(step))
        except jax.errors.JaxRuntimeError as error:
            refused, used = _refusal(str(error))
            used -= chip_bytes((state, frozen, batch))
            refused = "" if effort == "memory" else refused
        seconds = time.monotonic() - clock
    return Plan(len(devices), held, used, inside, arithmetic, floor, seconds, sent, refused, effort)


def step_config(config: Experiment, loss: LossConfig, model: ModelConfig, teacher: ModelConfig) -> StepConfig:
    sampling = SamplingConfig(eos_ids=(0,), pad_id=0, **dataclasses.asdict(config.rollout))
    return StepConfig(model, teacher, sampling, loss, config.optim, config.lora, config.train.micro_batches)


def arguments(config: Experiment, step: StepConfig, own_teacher: bool, shapes: Shapes, mesh: Mesh):
    """(state, frozen, batch) of abstract arrays on ``mesh``, and the bytes of a chip that they hold, by item."""

    def model_params(model, dtype):
        return params_lib.abstract(transformer.param_specs(model), mesh, dtype)

    initial = model_params(step.model, config.model.param_dtype)
    trained = initial if step.lora is None else params_lib.abstract(lora.specs(step.model, step.lora), mesh)
    opt_state = jax.eval_shape(optim.optimizer(step.optim).init, trained)
    ema = trained if step.loss.needs_ema else None
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, opt_state, key, ema)
    teacher = model_params(step.teacher_model, config.teacher.param_dtype) if own_teacher else initial
    batch = abstract_batch(config, step, shapes, mesh)
    prefix = None
    if batch.context.prefix_C is not None:
        prefix = jax.eval_shape(
            lambda params, tokens: transformer.prefix_kv(params, step.teacher_model, tokens),
            teacher, batch.context.prefix_C,
        )  # fmt: skip
    frozen = Frozen(teacher, None if step.lora is None else initial, prefix)
    held = {"trained weights": trained, "optimiser moments": opt_state, "moving average": ema, "teacher": teacher}
    if own_teacher:  # kept for the arms that start from them
        held["student's initial weights"] = initial
    held |= {"teacher's prefix": prefix, "batch": batch}
    return state, frozen, batch, {name: size for name, tree in held.items() if (size := chip_bytes(tree))}


def abstract_batch(config: Experiment, step: StepConfig, shapes: Shapes, mesh: Mesh) -> Batch:
    """Prompts of full length. A shared context is a prefix; behind it each row keeps the columns of a bare prompt."""
    prefix = shapes.context - shapes.bare if shapes.shared else 0
    prefix = prefix if prefix >= SHORTEST_PREFIX else 0
    rows, whole = NamedSharding(mesh, P(sharding.BATCH)), NamedSharding(mesh, P())

    def prompts(count, length, shared=0):
        arrays = [jax.ShapeDtypeStruct((count, length - shared), kind, sharding=rows) for kind in (jnp.int32, bool)]
        return Prompts(*arrays, jax.ShapeDtypeStruct((shared,), jnp.int32, sharding=whole) if shared else None)

    count = config.train.batch_size
    other = prompts(config.train.retention_rows, shapes.context) if step.loss.mu > 0 else None
    ids = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows)
    return Batch(prompts(count, shapes.bare), prompts(count, shapes.context, prefix), other, ids)


def chip_bytes(tree) -> int:
    """Of one chip's shards."""

    def size(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def head_turns(step: StepConfig) -> int:
    """How often the loop over chunks of response columns runs when responses are as long as they can be."""
    return -(-step.sampling.max_tokens // step.loss.chunk)


class _Trips:
    """How often each ``while`` of a step's trace runs: decoding up to its bound, behind the loop before it; the head's
    loop, whose bound is data, over all chunks."""

    def __init__(self, step: StepConfig):
        self.step, self.before = step, 1

    def __call__(self, equation) -> int:
        stop = flops.bound(equation)
        if stop is None:
            return head_turns(self.step)
        self.before = 1 if stop <= self.before else self.before  # the next rollout's first loop
        trips, self.before = stop - self.before, stop
        return trips


def _over(mesh: Mesh, *axes: str) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))


def _inside(config: Experiment, step: StepConfig, shapes: Shapes, mesh: Mesh) -> dict[str, int]:
    """Parts of the temporaries that follow from shapes: bytes of a chip."""
    model, kind = step.model, jnp.dtype(step.model.dtype).itemsize
    rows = config.train.batch_size // _over(mesh, "data", "fsdp")
    slots = shapes.bare + step.sampling.max_tokens
    cache = 2 * rows * slots * model.layers * model.kv_heads * model.head_dim * kind // _over(mesh, "tensor")
    trained = transformer.param_specs(model) if step.lora is None else lora.specs(model, step.lora)
    gradients = chip_bytes(params_lib.abstract(trained, mesh)) * (2 if step.micro_batches > 1 else 1)
    return {"cache of the responses": cache, "gradients": gradients, "weights for decoding": _decoding(step, mesh)}


def _decoding(step: StepConfig, mesh: Mesh) -> int:
    """Bytes of the copy of the layers' weights that decoding reads, on a chip."""
    layers = params_lib.count(transformer.param_specs(step.model)["layers"])
    gathered = step.sampling.weights == "gathered"
    return (
        layers * jnp.dtype(step.model.dtype).itemsize // _over(mesh, *(("tensor",) if gathered else ("fsdp", "tensor")))
    )


def _hbm_floor(config: Experiment, step: StepConfig, held: dict[str, int], shapes: Shapes, mesh: Mesh) -> int:
    """Bytes that a chip must at least read and write in a step: every token decoded reads the weights and the filled
    cache; every pass reads the weights once, and once more backwards; the optimiser reads and writes its state."""
    model, kind = step.model, jnp.dtype(step.model.dtype).itemsize
    tensor = _over(mesh, "tensor")
    head = model.vocab_size * model.width * kind // tensor
    layers = params_lib.count(transformer.param_specs(model)["layers"]) * kind // tensor
    tokens = step.sampling.max_tokens
    rows = config.train.batch_size // _over(mesh, "data", "fsdp")
    column = 2 * model.layers * model.kv_heads * model.head_dim * kind // tensor
    decode = (tokens - 1) * (layers + head + rows * column * (shapes.bare + tokens // 2))
    student = 2 * (1 + (step.loss.beta > 0) + (step.loss.mu > 0))
    teacher = 1 + (step.loss.mu > 0)
    theirs = params_lib.count(transformer.param_specs(step.teacher_model)["layers"]) * kind // tensor
    passes = step.micro_batches * (student * (layers + head) + teacher * (theirs + head))
    return decode + passes + 2 * (held["trained weights"] + held["optimiser moments"]) + held["trained weights"]


def _refusal(message: str) -> tuple[str, int]:
    """(the compiler's words, bytes of arguments and temporaries) of a program that does not fit. Raises ValueError at
    any other error."""
    first = next((line.strip() for line in message.splitlines() if "memory" in line.lower()), "")
    sizes = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message) or re.search(r"program\s+([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not sizes:
        raise ValueError(f"the step does not compile: {message.strip().splitlines()[0]}") from None
    return first, int(float(sizes[1]) * 1024 ** ("KMGT".index(sizes[2]) + 1))
