"""A trained arm as a folder for others: the same logits in transformers and PEFT, and nothing half done."""

import dataclasses
import errno
import json
import resource
import shutil
import stat

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax import config as config_lib, export, sharding
from ctxjax.chat.speaker import open_run
from ctxjax.configs import tiny
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.distill import train_step
from ctxjax.host import workdir
from ctxjax.host.checksum import compute_fingerprint
from ctxjax.inputs import model_folder
from ctxjax.models import lora, transformer
from ctxjax.models.architecture import LayerKind
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.models.rope import Llama3Scaling
from ctxjax.models.transformer import apply_head, head_weights
from ctxjax.training import checkpoint, stored_arms
from ctxjax.types import Batch, Frozen

STEPS, TOKENS = 3, 40
STRETCHED = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)
EXTRA = {"max_position_embeddings": 131072, "_name_or_path": "someone/model", "transformers_version": "4.57.0"}
MIXED = {"layer_kinds": (*(LayerKind(window=3, rope_theta=50.0),) * 2, LayerKind()), "embedding_scale": 32**0.5}
RUNS = {  # family, rank of an adapter, fields of ModelConfig
    "full": ("llama", 0, {}),
    "tied": ("llama", 0, {"tied_embeddings": True, "rope_scaling": STRETCHED}),
    "lora": ("llama", 4, {}),
    "seed_oss": ("seed_oss", 0, {}),
    "mistral": ("mistral", 0, {"layer_kinds": (LayerKind(window=3),) * 3}),
    "gemma3": ("gemma3_text", 0, MIXED | {"tied_embeddings": True, "norm_eps": 1e-6}),
}


class Trained:
    """A run's folder after three steps, as the trainer leaves it, and what it should be exported as."""

    def __init__(self, folder, family: str, rank: int, changes: dict, make_params, make_prompts, make_rollout):
        tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
        self.model = transformer.ModelConfig(
            len(tokenizer) + 1, width=32, layers=3, query_heads=4, kv_heads=2, head_dim=8, mlp_width=48,
            **hf_load.FAMILIES[family].parts, **changes,
        )  # fmt: skip
        self.source, self.workdir = folder / "source", folder / "run"
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            base = make_params(self.model, 0, mesh)
            hf_save.save(self.source, base, self.model, tokenizer, (tokenizer.eos_token_id,), family)
            edit(self.source / "config.json", **EXTRA)
            config = tiny.get_config()
            config.model.path, config.lora.rank, config.run_arms = str(self.source), rank, ("opcd", "opcd_anchored")
            inputs = {"model": compute_fingerprint(base), "stop_ids": [tokenizer.eos_token_id]}
            workdir.claim(self.workdir, workdir.collect_facts(config), inputs)
            experiment = config_lib.experiment(config, jax.device_count())
            sampling = train_step.SamplingConfig(max_tokens=4, eos_ids=(2,), pad_id=0)
            step_config = train_step.StepConfig(
                self.model, self.model, sampling, experiment.arms["opcd"],
                dataclasses.replace(experiment.optim, lr=3e-2, warmup_steps=0), experiment.lora,
            )  # fmt: skip
            frozen = Frozen(base, base if rank else None)
            state = train_step.init_state(base, step_config, jax.random.key(0))
            batch = Batch(make_prompts(0, 8, 5), make_prompts(1, 8, 9), None, np.arange(8, dtype=np.int32))
            batch = sharding.put_batch(batch, mesh)
            checkpoints = checkpoint.Checkpoints(self.workdir / "opcd" / "checkpoints", keep=2, scores={})
            rollout = sharding.put_batch(make_rollout(2, 8, 4), mesh)
            update = jax.jit(train_step.update_step, static_argnames="config")
            for step in range(1, STEPS + 1):
                state, _ = update(state, frozen, batch, rollout, None, step_config)
                checkpoints.save(state, step, {"data_position": step})
            checkpoints.close()
            self.base, self.student = base, train_step.student_params(state.params, frozen, step_config)
            self.tokens = np.random.default_rng(0).integers(0, self.model.vocab_size, (2, TOKENS), dtype=np.int32)
            self.logits, self.base_logits = (self.logits_of(params) for params in (self.student, base))

    def logits_of(self, params) -> np.ndarray:
        @jax.jit
        def run(params):
            hidden = transformer.forward(params, self.model, self.tokens, np.ones(self.tokens.shape, bool))
            return apply_head(hidden, head_weights(params, self.model))

        return np.asarray(run(params))


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_params, make_prompts, make_rollout):
    """trained(kind): one of RUNS, made once."""
    made = {}

    def get(kind) -> Trained:
        if kind not in made:
            made[kind] = Trained(tmp_path_factory.mktemp(kind), *RUNS[kind], make_params, make_prompts, make_rollout)
        return made[kind]

    return get


def assert_same_logits(ours, theirs):
    scale = np.abs(theirs).max()
    assert scale > 1 and np.abs(ours - theirs).max() <= 2e-4 * scale


def logits_in_torch(model, tokens) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="parity needs torch")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_transformers_computes_the_trained_students_logits(kind, trained, tmp_path):
    pytest.importorskip("torch", reason="parity needs torch")
    from transformers import AutoModelForCausalLM

    run = trained(kind)
    assert np.abs(run.logits - run.base_logits).max() > 0.05 * np.abs(run.logits).max()
    assert export.export(run.workdir, tmp_path / "out")[:2] == ("opcd", STEPS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_logits(run.logits, logits_in_torch(model, run.tokens))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_an_export_loads_bit_for_bit_and_in_shards_too(kind, trained, tmp_path, mesh8):
    run = trained(kind)
    export.export(run.workdir, tmp_path / "one")
    export.export(run.workdir, tmp_path / "several", max_shard_bytes=20_000)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    sizes = [path.stat().st_size for path in (tmp_path / "several").glob("*.safetensors")]
    assert len(sizes) >= 3 and max(sizes) < 22_000  # with their headers
    for name in ("one", "several"):
        model = hf_load.read_config(tmp_path / name)
        assert model == dataclasses.replace(run.model, max_positions=model.max_positions)
        loaded = hf_load.load(tmp_path / name, model, mesh8)
        jax.tree.map(np.testing.assert_array_equal, loaded, run.student)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_in_a_chat_the_trained_student_answers_or_the_base(kind, trained):
    run = trained(kind)
    speaker = open_run(run.workdir)
    assert (speaker.arm, speaker.arms) == ("opcd", ["base", "opcd"])
    for params in (run.student, run.base):
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), speaker.params, params)
        speaker.switch("base")


@pytest.mark.slow
def test_the_base_of_a_run_that_began_with_an_adapter_has_it(trained, tmp_path):
    run, folder = trained("lora"), shutil.copytree(trained("lora").workdir, tmp_path / "run")
    config, random = stored_arms.read_experiment(folder), np.random.default_rng(0)
    specs = lora.specs(run.model, config.lora)["layers"]
    adapter = {"layers": {name: np.float32(random.normal(size=spec.shape)) for name, spec in specs.items()}}
    (tmp_path / "adapter").mkdir()
    hf_save.save_adapter(
        tmp_path / "adapter", adapter, run.model, config.lora, hf_load.FAMILIES["llama"], str(run.source)
    )
    fields = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", lora=fields["lora"] | {"init": str(tmp_path / "adapter")})
    base = lora.join(run.base, adapter, config.lora)
    edit(folder / "run.json", inputs={"model": compute_fingerprint(base), "stop_ids": [2]})
    speaker = open_run(folder)
    for params in (run.student, base, run.student):
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), speaker.params, params)
        speaker.switch("base" if speaker.arm == "opcd" else "opcd")
    export.export(folder, tmp_path / "exported")
    assert (
        load_file(tmp_path / "exported" / "model.safetensors").keys()
        == load_file(run.source / "model.safetensors").keys()
    )


@pytest.mark.slow
def test_peft_puts_the_adapter_onto_the_base_and_gets_the_merged_models_logits(trained, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft")
    from transformers import AutoModelForCausalLM

    run = trained("lora")
    export.export(run.workdir, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(run.source)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_logits(run.logits, logits_in_torch(model, run.tokens))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_the_update_of_an_adapter_is_exported_at_a_chosen_scale(trained, tmp_path, scale):
    run = trained("lora")
    done = export.export(run.workdir, tmp_path / "out", scale=scale)
    assert f"the adapter's update times {scale:g}" in done.weights
    assert f"update times {scale:g}" in (tmp_path / "out" / "README.md").read_text()
    written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].T
    layers, base = run.student["layers"], run.base["layers"]["down"][1]
    update = layers["down_lora_a"][1] @ layers["down_lora_b"][1]
    np.testing.assert_allclose(written, base + scale * update, rtol=1e-5, atol=1e-6)
    export.export(run.workdir, tmp_path / "adapter", adapter=True, scale=scale)
    export.export(run.workdir, tmp_path / "whole", adapter=True)
    alphas, tensors = zip(*(
        (json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_alpha"],
         load_file(tmp_path / name / "adapter_model.safetensors"))
        for name in ("adapter", "whole")
    ))  # fmt: skip
    assert alphas[0] == scale * alphas[1]
    jax.tree.map(np.testing.assert_array_equal, *tensors)


@pytest.mark.slow
def test_weights_are_cast_when_that_is_asked_for(trained, tmp_path, mesh):
    run = trained("lora")
    export.export(run.workdir, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    merged = np.asarray(lora.merged(run.student)["layers"]["down"][1].astype("bfloat16"))
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"].T, merged)
    export.export(run.workdir, tmp_path / "adapter", adapter=True, dtype="bfloat16")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype.name for tensor in adapter.values()} == {"bfloat16"}


@pytest.mark.slow
def test_an_adapter_is_not_rounded_into_a_bfloat16_base(trained, tmp_path):
    run = trained("lora")
    workdir_copy = shutil.copytree(run.workdir, tmp_path / "run")
    config = json.loads((workdir_copy / "config.json").read_text())
    config["model"]["param_dtype"] = "bfloat16"
    (workdir_copy / "config.json").write_text(json.dumps(config))
    rounded = jax.tree.map(lambda weight: weight.astype("bfloat16"), run.base)
    inputs = json.loads((workdir_copy / "run.json").read_text())["inputs"]
    edit(workdir_copy / "run.json", inputs=inputs | {"model": compute_fingerprint(rounded)})
    assert "float32, as trained" in export.export(workdir_copy, tmp_path / "out").weights
    written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].T
    layers = run.student["layers"]
    base = run.base["layers"]["down"][1].astype("bfloat16").astype("float32")
    expected = base + layers["down_lora_a"][1] @ layers["down_lora_b"][1]
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_number_type_of_the_weights_is_named_where_it_is_not_the_sources(trained, tmp_path, capsys):
    run = trained("full")
    assert export.main([f"--workdir={run.workdir}", f"--out={tmp_path / 'same'}"]) == 0
    assert capsys.readouterr().out.strip().endswith("step 3; weights: float32, as trained")
    source = run.source / "model.safetensors"
    before = source.read_bytes()
    save_file({name: value.astype("bfloat16") for name, value in load_file(source).items()}, source)
    try:
        assert export.main([f"--workdir={run.workdir}", f"--out={tmp_path / 'wider'}"]) == 0
        said = capsys.readouterr().out
        cast = export.export(run.workdir, tmp_path / "cast", dtype="bfloat16").weights
    finally:
        source.write_bytes(before)
    assert "weights: float32, as trained; the source's are bfloat16 (--dtype=bfloat16 halves the folder" in said
    assert "weights: float32, as trained; the source's are bfloat16" in (tmp_path / "wider" / "README.md").read_text()
    assert cast == "bfloat16, rounded from float32"


@pytest.mark.slow
def test_the_sources_own_files_and_fields_survive(trained, tmp_path):
    run = trained("tied")
    names = {"added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE.txt", "NOTICE"}
    names |= {"special_tokens_map.json", "chat_template.jinja"}
    absent = [run.source / name for name in names if not (run.source / name).exists()]
    for path in absent:
        path.touch()
    export.export(run.workdir, tmp_path / "out")
    for path in absent:
        path.unlink()
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields == json.loads((run.source / "config.json").read_text()) and EXTRA.items() <= fields.items()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run.source / name).read_bytes()
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


TEACHERS_END = 7


@pytest.mark.slow
@pytest.mark.parametrize("has_generation_config", [True, False])
@pytest.mark.parametrize("adapter", [False, True])
def test_an_export_ends_its_responses_where_the_run_did(trained, tmp_path, mesh, adapter, has_generation_config):
    """A student may have learned to end at its teacher's end token, which its source does not know."""
    run, source = trained("lora"), tmp_path / "source"
    shutil.copytree(run.source, source)
    if not has_generation_config:
        (source / "generation_config.json").unlink()
    folder, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run.workdir, folder)
    inputs = json.loads((folder / "run.json").read_text())["inputs"]
    edit(folder / "run.json", inputs=inputs | {"stop_ids": [3, TEACHERS_END]})
    fields = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", model=fields["model"] | {"path": str(source)})
    assert model_folder.open_folder(source, mesh).stop_ids == (3,)
    export.export(folder, out, adapter=adapter)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [3, TEACHERS_END]
    if not adapter:
        assert model_folder.open_folder(out, mesh).stop_ids == (3, TEACHERS_END)
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == [3, TEACHERS_END]


@pytest.mark.slow
def test_a_run_that_does_not_name_its_end_tokens_is_refused(trained, tmp_path):
    shutil.copytree(trained("full").workdir, tmp_path / "run")
    edit(tmp_path / "run" / "run.json", inputs={})
    with pytest.raises(ValueError, match="run.json does not name the run's end tokens"):
        export.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_card_says_what_was_trained_and_what_came_of_it(trained, tmp_path):
    run = trained("full")
    results = {"base": {"acc_x": 0.125}, "opcd": {"acc_x": 0.875, "step": STEPS}, "opcd_anchored": {"acc_x": 0.5}}
    (run.workdir / "results.json").write_text(json.dumps(results))
    export.export(run.workdir, tmp_path / "last")
    export.export(run.workdir, tmp_path / "earlier", step=STEPS - 1)
    (run.workdir / "results.json").unlink()
    last, earlier = ((tmp_path / name / "README.md").read_text() for name in ("last", "earlier"))
    assert "opcd, step 3" in last and "12.5" in last and "87.5" in last and "50.0" not in last
    assert '"lr": 0.001' in last and "is of step" not in last
    assert "is of step 3, not of the exported step 2" in earlier


@pytest.mark.slow
def test_the_card_of_an_arm_on_the_teachers_responses_does_not_call_it_on_policy(trained, tmp_path):
    run = shutil.copytree(trained("full").workdir, tmp_path / "run")
    (run / "opcd").rename(run / "off_policy")
    edit(run / "config.json", run_arms=["off_policy"])
    export.export(run, tmp_path / "out", arm="off_policy")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained by off-policy context distillation, on its teacher's responses (ctxjax)" in card
    assert "on-policy context" not in card


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["", "v2"])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_names_a_model_of_the_hub_and_not_its_copy_here(adapter, revision, trained, tmp_path, monkeypatch):
    run, cached = trained("lora"), tmp_path / "cache" / "snapshots" / "0a1b2c"
    workdir_copy = shutil.copytree(run.workdir, tmp_path / "run")
    shutil.copytree(run.source, cached)
    fields = json.loads((workdir_copy / "config.json").read_text())
    name = f"org/name{revision and '@'}{revision}"
    edit(workdir_copy / "config.json", model=fields["model"] | {"path": name})
    monkeypatch.setattr(export, "find_folder", {name: cached}.get)
    export.export(workdir_copy, tmp_path / "out", adapter=adapter)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# name, opcd, step 3" in card and f"`{name}`, trained by on-policy context distillation (ctxjax)" in card
    given = f'"org/name", revision="{revision}"' if revision else '"org/name"'
    assert (f"AutoModelForCausalLM.from_pretrained({given})" in card) == adapter
    assert str(cached) not in card and cached.name not in card
    if adapter:
        fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (fields["base_model_name_or_path"], fields["revision"]) == ("org/name", revision or None)


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["source", "~/source"])
def test_an_adapter_names_the_folder_of_its_base_from_everywhere(typed, trained, tmp_path, monkeypatch):
    run, source = trained("lora"), tmp_path / "source"
    workdir_copy = shutil.copytree(run.workdir, tmp_path / "run")
    shutil.copytree(run.source, source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = json.loads((workdir_copy / "config.json").read_text())
    edit(workdir_copy / "config.json", model=fields["model"] | {"path": typed})
    export.export(workdir_copy, tmp_path / "out", adapter=True)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == (str(source), None)
    assert f'AutoModelForCausalLM.from_pretrained("{source}")' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_files_are_as_readable_as_any(trained, tmp_path):
    export.export(trained("full").workdir, tmp_path / "out")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "any").touch()
    assert modes == {stat.S_IMODE((tmp_path / "any").stat().st_mode)}


# --- What cannot be done ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arm": "opcdd"}, "--arm=opcdd: .* has checkpoints of opcd: step 2, 3"),
        ({"arm": "opcd_anchored"}, "--arm=opcd_anchored: .* has checkpoints of opcd: step 2, 3"),
        ({"step": 1}, "--step=1: .* has checkpoints of opcd: step 2, 3"),
        ({"scale": 0.5}, "--scale=0.5 must be a number, and lora.rank of the run above 0"),
        ({"adapter": True}, r"trained all weights \(lora.rank = 0\); leave --adapter out"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(arguments, message, trained, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.export(trained("full").workdir, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_existing_folder_is_left_as_it_is(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    arguments = [f"--workdir={trained('full').workdir}", f"--out={tmp_path / 'out'}"]
    assert export.main(arguments) == 2
    assert "out exists; nothing was written" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_an_adapter_is_merged_into_no_other_model_than_the_runs(trained, tmp_path):
    run = trained("lora")
    folder, source = shutil.copytree(run.workdir, tmp_path / "run"), shutil.copytree(run.source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", model=fields["model"] | {"path": str(source)})
    message = f"{source} is not the model that the run began with .*run.json.* bring it back"
    with pytest.raises(ValueError, match=message):
        export.export(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        open_run(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
    export.export(folder, tmp_path / "out", adapter=True)  # which has none of its weights


@pytest.mark.slow
def test_a_run_that_began_with_an_adapter_knows_its_model_with_it(trained, tmp_path):
    run = trained("lora")
    folder, start = shutil.copytree(run.workdir, tmp_path / "run"), tmp_path / "start"
    export.export(run.workdir, start, adapter=True, step=2)
    fields = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", lora=fields["lora"] | {"init": str(start)})
    with pytest.raises(ValueError, match="is not the model that the run began with"):
        export.export(folder, tmp_path / "out")
    config = stored_arms.read_experiment(folder)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        adapter = stored_arms.read_trained(run.workdir, config, run.model, "opcd", 2, mesh)
        joined = lora.join(run.base, adapter, config.lora)
    inputs = json.loads((folder / "run.json").read_text())["inputs"]
    edit(folder / "run.json", inputs=inputs | {"model": compute_fingerprint(joined)})
    export.export(folder, tmp_path / "out")


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert export.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert "is not a run's folder: it has no config.json" in capsys.readouterr().err


def test_an_address_is_no_folder_to_write(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main([f"--workdir={tmp_path}", "--out=gs://bucket/model"]) == 2
    assert "--out=gs://bucket/model is an address" in capsys.readouterr().err
    assert export.main(["--workdir=gs://bucket/run", "--out=model"]) == 2
    assert "--workdir=gs://bucket/run is an address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_of_another_version_is_refused(trained, tmp_path):
    fields = json.loads((trained("full").workdir / "config.json").read_text())
    del fields["lora"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="does not fit this version of ctxjax.*lora"):
        export.export(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    write, written = hf_save._write, []

    def fills_up(path, tensors):
        write(path, tensors)
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(hf_save, "_write", fills_up)
    with pytest.raises(OSError, match="No space left on device"):
        export.export(trained("full").workdir, tmp_path / "out", max_shard_bytes=20_000)
    assert len(written) == 2 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_the_system_refuses_is_an_oserror_and_leaves_nothing_behind(trained, tmp_path):
    run, (soft, hard) = trained("full"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            export.export(run.workdir, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_known_before_anything_is_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_save.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"need .* GB, and 1e-06 GB are free"):
        export.export(trained("full").workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())
