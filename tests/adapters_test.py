"""Adapters in PEFT's format: read what was written, start from it, and refuse what belongs to another model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax import config as config_lib, sharding
from ctxjax.configs import tiny
from ctxjax.distill import optim
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.distill.train_step import StepConfig, init_state, student_params
from ctxjax.inputs import run_inputs
from ctxjax.models import lora, params as params_lib
from ctxjax.models.hf import adapters, load as hf_load, save as hf_save
from ctxjax.models.lora import LoraConfig
from ctxjax.types import Frozen

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("q", "down"))


@pytest.fixture(scope="module")
def one():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def base(tables_folder):
    return tables_folder, hf_load.read_config(tables_folder)


def draw(model, config, seed=0):
    """A trained adapter, B too, on the host."""
    specs, rng = lora.specs(model, config), np.random.default_rng(seed)
    return {"layers": {name: np.float32(rng.normal(size=spec.shape)) for name, spec in specs["layers"].items()}}


@pytest.fixture
def written(base, tmp_path):
    """written(config): an adapter, and the folder that it was written into."""

    def write(config=CONFIG, name=None):
        source, model = base
        adapter, folder = draw(model, config), tmp_path / "adapter"
        folder.mkdir()
        family = hf_load.FAMILIES["llama"]
        hf_save.save_adapter(folder, adapter, model, config, family, str(source) if name is None else name)
        return adapter, folder

    return write


def load(folder, base, config=CONFIG, mesh=None, name=None):
    source = base[0]
    return adapters.load(folder, str(source) if name is None else name, source, config, mesh)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("config", [CONFIG, LoraConfig(2, 4.0, lora.TARGETS, rslora=True)], ids=["some", "all"])
def test_what_was_written_is_read_bit_for_bit(config, base, written, one, mesh8):
    adapter, folder = written(config)
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] == config.rslora
    for mesh in (one, mesh8):
        found = load(folder, base, config, mesh)
        jax.tree.map(np.testing.assert_array_equal, found, adapter)
        places = params_lib.shardings(lora.specs(base[1], config), mesh)
        assert all(jax.tree.leaves(jax.tree.map(lambda leaf, place: leaf.sharding == place, found, places)))
    assert dataclasses.replace(config, rslora=True).scale == config.alpha / config.rank**0.5


@pytest.mark.parametrize(
    "name", ["org/model", "/elsewhere/Model/", "org/model@v2", "/hub/models--org--model/snapshots/ab12", ""]
)
def test_the_base_may_be_named_in_other_ways(name, base, written, one):
    assert base[0].name == "model"
    _, folder = written(name=name)
    load(folder, base, mesh=one)
    load(folder, base, mesh=one, name="someone/MODEL@main")


def spoil_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: edit(f, base_model_name_or_path="org/other"),
            "trained on 'org/other', and model.path is '.*model'",
        ),
        (
            lambda f: edit(f, r=8),
            r"alpha 6, q, down, rslora False\); set lora.rank=8 lora.alpha=6.0 lora.target",
        ),
        (lambda f: edit(f, use_rslora=True), "lora.rslora=True"),
        (lambda f: edit(f, use_dora=True), "adapters with use_dora = True cannot be read; merge it"),
        (lambda f: edit(f, rank_pattern={"q": 2}), "adapters with rank_pattern = {'q': 2} cannot be read"),
        (
            lambda f: edit(f, init_lora_weights="pissa_niter_4"),
            "init_lora_weights = 'pissa_niter_4' changed the",
        ),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors; give a folder that"),
        (
            lambda f: spoil_tensors(f, lambda t: t.update({"x.lora_A.weight": t[FIRST]})),
            "has x.lora_A.weight and 0",
        ),
        (lambda f: spoil_tensors(f, lambda t: t.pop(FIRST)), "q_proj.lora_A.weight is missing; it belongs to another"),
        (
            lambda f: spoil_tensors(f, lambda t: t.update({FIRST: t[FIRST][:, 1:].copy()})),
            "is .*31], not .*32]; it",
        ),
        (
            lambda f: spoil_tensors(f, lambda t: t.update({FIRST: t[FIRST] * np.nan})),
            "lora_A.weight that are not",
        ),
        (
            lambda f: spoil_tensors(f, lambda t: [t.pop(name) for name in list(t) if "down" in name]),
            "lora.targets=\"\\('q',\\)\"",
        ),
    ],
)
def test_an_adapter_of_another_base_or_kind_is_named_with_the_remedy(spoil, message, base, written, one):
    _, folder = written()
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder, base, mesh=one)


def experiment(folder, base, **changes):
    config = tiny.get_config()
    config.model.path, config.lora.rank, config.lora.alpha = str(base[0]), 3, 6.0
    config.lora.targets, config.lora.init = ("q", "down"), str(folder)
    config.update_from_flattened_dict(changes)
    return config_lib.experiment(config, 1)


def test_a_run_starts_from_the_adapter_and_so_does_its_teacher(base, written, one, mesh8):
    adapter, folder = written()
    with jax.set_mesh(one):
        _, student, teacher, *_ = run_inputs.open_inputs(experiment(folder, base), one, {})
        assert teacher is student
        plain = hf_load.load(base[0], base[1], one)
        jax.tree.map(np.testing.assert_array_equal, student.params, lora.join(plain, adapter, CONFIG))
        step = StepConfig(
            base[1], base[1], SamplingConfig(4, eos_ids=(2,), pad_id=0), LossConfig(), optim.OptimConfig(1e-2, steps=9),
            CONFIG,
        )  # fmt: skip
        state = init_state(student.params, step, jax.random.key(0), student.adapter)
        jax.tree.map(np.testing.assert_array_equal, state.params, adapter)
        joined = student_params(state.params, Frozen(teacher.params, student.params), step)
        jax.tree.map(np.testing.assert_array_equal, joined, student.params)


def test_another_teacher_has_no_adapter(base, written, one, tmp_path):
    _, folder = written()
    shutil.copytree(base[0], tmp_path / "teacher")
    with jax.set_mesh(one):
        opened = experiment(folder, base, **{"teacher.path": str(tmp_path / "teacher")})
        _, student, teacher, *_ = run_inputs.open_inputs(opened, one, {})
        assert teacher.adapter is None and "q_lora_a" not in teacher.params["layers"]
        assert student.adapter is not None and "q_lora_a" in student.params["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_wrote_computes_what_peft_computes(rslora, base, one, tmp_path):
    torch, peft = (pytest.importorskip(name, reason="parity needs torch and peft") for name in ("torch", "peft"))
    from transformers import AutoModelForCausalLM

    from ctxjax.models import transformer
    from ctxjax.models.transformer import apply_head, head_weights

    names = ["q_proj", "down_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, use_rslora=rslora, init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base[0]), settings)
    theirs.save_pretrained(tmp_path / "peft")
    config = dataclasses.replace(CONFIG, rslora=rslora)
    tokens = np.random.default_rng(0).integers(3, base[1].vocab_size, (2, 9), dtype=np.int32)
    with jax.set_mesh(one):
        joined = lora.join(hf_load.load(base[0], base[1], one), load(tmp_path / "peft", base, config, one), config)
        hidden = transformer.forward(joined, base[1], tokens, np.ones(tokens.shape, bool))
        ours = np.asarray(apply_head(hidden, head_weights(joined, base[1])))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
