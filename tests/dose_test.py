"""The change that training made to the weights: where it is, and what a model is with part of it."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ctxjax.models import change, lora
from ctxjax.models.lora import LoraConfig
from ctxjax.study import angles, dose


def make_tree(seed):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    layers = {"q": draw(3, 4, 5), "attention_norm": draw(3, 4)}
    return {"embedding": draw(7, 4), "layers": layers, "final_norm": draw(4)}


def test_norms_are_those_of_numpy_for_each_layer_and_matrix():
    before, after = make_tree(0), make_tree(1)
    after["final_norm"] = before["final_norm"]
    found = change.measure(before, after)
    assert list(found) == ["attention_norm", "embedding", "final_norm", "q"]
    expected = [np.linalg.norm(after["layers"]["q"][i] - before["layers"]["q"][i]) for i in range(3)]
    sizes = [np.linalg.norm(before["layers"]["q"][i]) for i in range(3)]
    assert found["q"]["norm"] == pytest.approx(expected)
    assert found["q"]["relative"] == pytest.approx(np.array(expected) / sizes)
    assert found["embedding"]["norm"] == pytest.approx([np.linalg.norm(after["embedding"] - before["embedding"])])
    assert found["final_norm"] == {"norm": [0.0], "relative": [0.0]}


def test_a_scaled_change_is_the_base_at_zero_the_student_at_one_and_a_line_between_and_beyond():
    before, after = make_tree(0), make_tree(1)
    for scale, expected in ((0.0, before), (1.0, after)):
        found = change.scale(before, after, scale)
        np.testing.assert_array_equal(found["layers"]["q"], expected["layers"]["q"])
    further = change.scale(before, after, 1.25)["layers"]["q"]
    line = before["layers"]["q"] + 1.25 * (after["layers"]["q"] - before["layers"]["q"])
    np.testing.assert_allclose(further, line, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_scaled_as_its_product():
    base = make_tree(0)
    rng = np.random.default_rng(2)
    adapter = {"q_lora_a": rng.normal(size=(3, 4, 2)), "q_lora_b": rng.normal(size=(3, 2, 5))}
    adapter = {"layers": {name: jnp.asarray(value, jnp.float32) for name, value in adapter.items()}}
    joined = lora.join(base, adapter, LoraConfig(2, 4.0, ("q",)))
    half = change.scale(base, lora.merged(joined), 0.5)["layers"]["q"]
    product = 2.0 * np.asarray(adapter["layers"]["q_lora_a"]) @ np.asarray(adapter["layers"]["q_lora_b"])
    np.testing.assert_allclose(half, base["layers"]["q"] + 0.5 * product, rtol=1e-4, atol=1e-6)


def test_scales_and_arms_that_do_not_exist_are_refused(tmp_path, capsys):
    assert dose.main([f"--workdir={tmp_path}", "--out=x.json"]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    (tmp_path / "x.json").touch()
    assert dose.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x.json'}"]) == 2
    assert "exists" in capsys.readouterr().err
    for scales in ("0,half", "0,nan", "inf"):
        assert dose.main([f"--workdir={tmp_path}", "--out=y.json", f"--scales={scales}"]) == 2
        assert f"--scales={scales} must be numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_has_its_own_metrics_at_scales_zero_and_one(debug_run, tmp_path, capsys):
    workdir, _ = debug_run
    out = tmp_path / "dose.json"
    assert dose.main([f"--workdir={workdir}", "--arm=opcd_retained", "--scales=0,1", f"--out={out}"]) == 0
    found, results = json.loads(out.read_text()), json.loads((workdir / "results.json").read_text())
    assert (found["arm"], found["step"], found["split"]) == ("opcd_retained", 3, "test")
    for row, name in zip(found["doses"], ("base", "opcd_retained"), strict=True):
        for key in ("acc_x", "acc_xc", "obedience", "view_kl", "distill"):
            assert row[key] == pytest.approx(results[name][key], rel=1e-4), (name, key)
    assert len(found["change"]["q"]["norm"]) == 1 and min(found["change"]["q"]["norm"]) > 0
    assert "| 0 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", [dose, angles])
def test_a_run_whose_base_is_another_one_now_is_refused(command, debug_run, tmp_path, capsys):
    workdir, out = shutil.copytree(debug_run[0], tmp_path / "run"), tmp_path / "out.json"
    manifest = json.loads((workdir / "run.json").read_text())
    manifest["inputs"]["model"] = "0123456789abcdef"
    (workdir / "run.json").write_text(json.dumps(manifest))
    assert command.main([f"--workdir={workdir}", "--arm=opcd_retained", f"--out={out}"]) == 2
    assert "is not the model that the run began with (digest 0123456789abcdef in" in capsys.readouterr().err
    assert not out.exists()
