"""Planning: memory by item, arithmetic, traffic, times, and what is said where it does not fit."""

import json
import subprocess
import sys

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import tiny
from ctxjax.distill import flops
from ctxjax.distill.sampling import FEWER_ROWS
from ctxjax.inputs import base_model
from ctxjax.models import attention, params as params_lib, transformer
from ctxjax.plan import architectures, chips, hlo, run
from ctxjax.plan.chips import Chip
from ctxjax.plan.remedies import choose_remedies, estimate_remedies
from ctxjax.plan.report import as_json, as_text, judge
from ctxjax.plan.step import Plan
from ctxjax.sharding import MeshConfig, make_mesh

MESH = MeshConfig(data=1, fsdp=4, tensor=1)

LOOPS = """
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g = bf16[64,4]{1,0} all-gather(%w), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %f = bf16[8,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
}
%all-reduce-scatter.3 (q: f32[64,4]) -> f32[8,4] {
  %r = f32[64,4]{1,0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
}
%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
}
%until (p: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(STOP)
  %unfinished_rows = s32[]{:T(128)} constant(72)
}
%head (p: (s32[], bf16[8,4])) -> pred[] {
  %longest = s32[] get-tuple-element(%p), index=1
}
%permute (p: bf16[8,4]) -> bf16[8,4] {
  %s = bf16[8,4]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a2 = (f32[10]{0}, f32[10]{0}) all-reduce-start(%a), replica_groups={{0,1}}
  %w1 = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %w2 = (s32[], bf16[8,4]) while(%t), condition=%until, body=%permute, metadata={op_name="jit(f)/decode_to_STOP/while"}
  %w3 = (s32[], bf16[8,4]) while(%t), condition=%head, body=%permute, metadata={op_name="jit(f)/jvp()/while"}
}
"""


def test_collectives_in_loops_count_as_often_as_the_loops_run():
    found = hlo.count_traffic(LOOPS.replace("STOP", "20"), head_chunks=3)
    assert {kind: one.count for kind, one in found.items()} == {
        "all-reduce": 1, "all-gather": 32, "reduce-scatter": 32, "collective-permute": 19 + 3,
    }  # fmt: skip
    # Each of 8 lacks 7/8 of 64 * 4 bfloat16; an all-reduce of two times 10 float32 over 2 sends 2 * 80 / 2;
    # reduce-scatter of 64 * 4 float32 over 4 sends 3/4 of them; a permutation all 8 * 4 bfloat16.
    assert found["all-gather"].sent == 32 * 512 * 7 / 8
    assert found["all-reduce"].sent == 80
    assert found["reduce-scatter"].sent == 32 * 1024 * 3 / 4
    assert found["collective-permute"].sent == 22 * 64


def test_decode_loops_run_from_bound_to_bound():
    second = LOOPS.replace("%until", "%later").replace("STOP", "50").replace("%w2", "%w4").split("ENTRY")
    later = "\n".join(part for part in second[0].split("\n%") if part.startswith("later"))
    text = LOOPS.replace("STOP", "20").replace("ENTRY", f"%{later}\nENTRY")
    line = next(line for line in second[1].splitlines() if "%w4" in line)
    found = hlo.count_traffic(text.replace("  %w3", f"{line}\n  %w3"), head_chunks=3)
    assert found["collective-permute"].count == (20 - 1) + (50 - 20) + 3
    again = "\n".join(one.replace("%w", "%again") for one in text.splitlines() if "decode_to" in one)
    twice = text.replace("  %w3", f"{line}\n{line.replace('%w', '%again')}\n{again}\n  %w3")
    assert hlo.count_traffic(twice, head_chunks=3)["collective-permute"].count == 2 * 49 + 3  # a second rollout


def test_decode_loops_for_fewer_rows_do_not_run_at_full_length():
    whole = LOOPS.replace("STOP", "20")
    line = next(line for line in whole.splitlines() if "%w2" in line)
    fewer = line.replace("%w2", "%w0").replace("decode_to", f"{FEWER_ROWS}/decode_to")
    found = hlo.count_traffic(whole.replace("  %w3", f"{fewer}\n  %w3"), head_chunks=3)
    assert found["collective-permute"].count == (20 - 1) + 3


def test_a_compiled_programs_collectives_are_found(mesh8):
    spec = jax.P("fsdp", "tensor")
    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=jax.NamedSharding(mesh8, jax.P(None, *spec)))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=jax.NamedSharding(mesh8, jax.P("data", None)))

    def layers(x, weights):
        return lax.scan(lambda x, w: (x @ jax.reshard(w, jax.P(None, None)), None), x, weights)[0]

    found = hlo.count_traffic(jax.jit(layers).lower(x, weights).compile().as_text(), head_chunks=1)
    assert found["all-gather"].count % 5 == 0 and found["all-gather"].count > 0
    assert found["all-gather"].sent == pytest.approx(5 * 16 * 16 * 4 * 3 / 4)


def test_flops_count_loops_branches_and_devices(mesh8):
    a, b = jnp.ones((2, 3)), jnp.ones((3, 3))
    once = 2 * 2 * 3 * 3

    def count(function, *arguments, **options):
        return flops.count_matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr, **options)

    assert count(lambda a, b: a @ b, a, b) == once
    assert count(lambda a, b: lax.scan(lambda x, _: (x @ b, None), a, length=7)[0], a, b) == 7 * once
    assert count(lambda a, b: lax.cond(True, lambda: a @ b @ b, lambda: a @ b), a, b) == 2 * once
    loop = lambda a, b: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ b), (0, a))  # noqa: E731
    assert count(loop, a, b, trips=flops.find_loop_bound) == 9 * once
    everywhere = lambda a, b: jax.shard_map(lambda a, b: a @ b, out_specs=jax.P())(a, b)  # noqa: E731
    assert count(everywhere, a, b) == 8 * once


CHIP = Chip(tflops=100, hbm_gib=16, hbm_gbps=1000, ici_gbps=200)


def make(temporaries: int, held: int = 2**30, seconds: float = 100.0, refused: str = "") -> Plan:
    inside = {"cache of the responses": 2**28, "gradients": 2**29, "weights for decoding": 2**28}
    traffic = None if refused else {"all-gather": hlo.Traffic(10, 6e9), "all-reduce": hlo.Traffic(5, 4e9)}
    items = {"trained weights": held, "optimiser moments": 2 * held, "teacher": held}
    return Plan(4, items, temporaries, inside, int(8e14), int(3e12), seconds, traffic, refused)


def test_floors_are_arithmetic_of_the_published_figures():
    floors = make(2**30).compute_floors(CHIP)
    assert floors == {"compute": 8e14 / 4 / 100e12, "memory": 3.0, "interconnect": 10e9 / 200e9}


def test_the_verdict_leaves_a_reserve():
    assert judge(make(10 * 2**30), 16) == "fits"  # 14 of 16
    assert judge(make(11 * 2**30), 16) == "tight"  # 15 of 16, over 92 %
    assert judge(make(13 * 2**30), 16) == "does not fit"
    assert judge(make(2**30, refused="Ran out of memory"), 16) == "does not fit"


def test_remedies_that_suffice_are_named_first_the_mild_ones_and_tried_where_that_is_cheap():
    config, plan = tiny.get_config(), make(14 * 2**30)
    config.train.batch_size = 64
    estimates = list(estimate_remedies(plan, config, MESH, "v5e:2x4", 8))
    flags = [estimate.flag.split("=")[0] for estimate in estimates]
    assert flags[0] == "--config.train.micro_batches" and flags[-1] == "--topology"
    assert "--config.lora.rank" in flags
    limit = int(chips.USABLE * 16 * 2**30)
    tried = []
    found = choose_remedies(plan, iter(estimates), limit, tried.append)
    assert not tried and found and all(one.total_bytes <= limit and not one.compiled for one in found)
    found = choose_remedies(make(14 * 2**30, seconds=1.0), iter(estimates), limit, lambda flag: make(2**30))
    assert [one.flag for one in found] == [one.flag for one in estimates] and all(one.compiled for one in found)
    hopeless = choose_remedies(plan, iter(estimates), 1, tried.append)
    assert len(hopeless) == len(estimates)


def test_a_report_has_every_item_and_the_remedies():
    plan = make(14 * 2**30, refused="Ran out of memory on HBM")
    config = tiny.get_config()
    result = as_json(
        plan, {"model": "m", "mesh": "fsdp 4"}, "v5e", list(estimate_remedies(plan, config, MESH, "v5e:2x4", 8))
    )
    assert json.loads(json.dumps(result)) == result
    text = as_text(result)
    assert "does not fit" in text and "Ran out of memory" in text and "(estimate)" in text
    for item in plan.buffers:
        assert item in text


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:3x3", "v5e has no slice of that shape; the nearest are v5e:2x4 and v5e:4x4"),
        ("v5p:4x4", "the nearest are v5p:2x2x4$"),
        ("v9:2x2", "a generation .v4, v5e, v5p, v6e. and a shape"),
        ("16", "such as v5e:4x4"),
    ],
)
def test_an_unknown_topology_is_answered_with_those_that_work(topology, message):
    with pytest.raises(ValueError, match=message):
        chips.make_tpu_devices(topology)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(chips, "has_libtpu", lambda: False)
    with pytest.raises(ValueError, match=r'libtpu, which is not installed; pip install "jax\[tpu\]==.*--devices=N'):
        chips.make_tpu_devices("v5e:2x2")


SIZES = {  # scalars of the published checkpoints
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688, "Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096, "Qwen/Qwen3-1.7B": 1_720_574_976,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552, "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344, "google/gemma-3-1b-it": 999_885_952,
    "ByteDance-Seed/Seed-OSS-36B-Instruct": 36_151_104_512,
}  # fmt: skip


def test_published_architectures_have_their_published_sizes(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(architectures, "hf_hub_download", unreachable)
    for name, size in SIZES.items():
        model, source = architectures.find_architecture(name, "bfloat16", tiny.get_config().model.remat)
        assert params_lib.count(transformer.param_specs(model)) == size, name
        assert source.startswith("the table of published architectures")
    with pytest.raises(FileNotFoundError, match="org/name's config.json.*Llama-3.1-8B"):
        architectures.find_architecture("org/name", "bfloat16", False)


@pytest.fixture(scope="module")
def small():
    config = tiny.get_config()
    config.base.layers, config.base.width, config.base.mlp_width, config.rollout.max_tokens = 2, 64, 64, 5
    config.run_arms = ("opcd",)
    config.model.remat = "none"  # the compiler decides alone what is kept, and does so alike however far it goes
    config.mesh.data, config.mesh.fsdp = 2, 4
    return config


@pytest.mark.slow
def test_the_plan_of_a_world_for_local_devices(small):
    result = run.plan(small, None, 8)
    model = base_model.make_model_config(config_lib.experiment(small, 8).base, 55)
    params = params_lib.init(transformer.param_specs(model), jax.random.key(0), make_mesh(2, 4, 1))
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert result["bytes"]["trained weights"] == result["bytes"]["teacher"] == weights
    assert 2 * weights <= result["bytes"]["optimiser moments"] <= 2 * weights + 16
    assert result["bytes"]["temporaries"] > 0 and result["collectives"]["all-gather"]["sent_bytes"] > 0
    assert result["total_bytes"] == sum(result["bytes"].values())
    assert result["batch"].endswith("the longest prompts have 10 without the context, 18 with it")
    assert "float32, reference attention" in result["step"]
    assert "verdict" not in result
    with pytest.raises(ValueError, match="--arm=nope is not known; choose from run_arms: opcd"):
        run.plan(small, None, 8, "nope")


def test_a_step_longer_than_the_models_positions_is_not_planned(small):
    long = small.copy_and_resolve_references()
    long.rollout.max_tokens = 2040
    with pytest.raises(ValueError, match=r"rollout.max_tokens = 2040 are together more than a model's 2048 positions"):
        run.plan(long, None, 8)


def test_the_command_answers_bad_input_in_one_line(tmp_path):
    command = [sys.executable, "-m", "ctxjax.plan", "--config=configs/llama3.py", "--topology=v5e:5x5"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "the nearest are v5e:4x4 and v5e:4x8" in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed")
def test_a_step_is_compiled_for_a_tpu_that_is_not_there(small):
    result = run.plan(small, "v5e:2x4", None)
    assert result["verdict"] == "fits" and result["collectives"]["all-gather"]["count"] > 0
    assert result["effort"] == "least" and result["floor_seconds"]["compute"] > 0 and result["hbm_bytes"] == 16 * 2**30
    quick = run.plan(small, "v5e:2x4", None, effort="memory")
    assert quick["verdict"] == "fits" and quick["collectives"] is None
    full = run.plan(small, "v5e:2x4", None, effort="full")
    assert quick["bytes"]["temporaries"] == pytest.approx(full["bytes"]["temporaries"], rel=0.3)


@pytest.mark.slow
@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed")
def test_the_plan_of_a_tpu_has_its_attention_kernel_in_the_step(small, monkeypatch):
    """Behind a shared prefix too. The kernels are those of the planned devices, not of the host."""
    long, seen, lengths = small.copy_and_resolve_references(), [], run.Lengths(prefix=160, question=140)
    long.prompt.max_bare_tokens, long.prompt.max_context_tokens = 140, 300
    long.model.dtype = "bfloat16"
    run_kernel = attention.KERNELS["splash"]
    monkeypatch.setitem(
        attention.KERNELS, "splash", lambda *arguments: seen.append(arguments[-1] is None) or run_kernel(*arguments)
    )
    result = run.plan(long, "v5e:2x4", None, effort="memory", lengths=lengths)
    assert result["verdict"] == "fits" and "bfloat16, splash attention" in result["step"]
    assert set(seen) == {True, False}
    long.model.attention = "reference"
    seen.clear()
    plain = run.plan(long, "v5e:2x4", None, effort="memory", lengths=lengths)
    assert "bfloat16, reference attention" in plain["step"] and not seen
    long.model.attention = "cudnn"
    with pytest.raises(ValueError, match="'cudnn' runs on gpu, and the devices are tpu; use 'auto'"):
        run.plan(long, "v5e:2x4", None, effort="memory", lengths=lengths)


@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:2x2x2", "v6e:1x1"])
def test_a_slice_has_its_chips(topology):
    assert len(chips.make_tpu_devices(topology)) == chips.count_chips(topology)
