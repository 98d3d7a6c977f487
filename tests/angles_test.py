"""The angles between the gradients of an arm's terms."""

import dataclasses
import json

import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import debug
from ctxjax.distill.losses import LossConfig
from ctxjax.study import angles


def make_gradient(seed):
    rng = np.random.default_rng(seed)
    layers = {"q": rng.normal(size=(3, 4, 5)), "attention_norm": rng.normal(size=(3, 4))}
    return {"embedding": rng.normal(size=(7, 4)), "layers": layers}


def flat(gradient, layer=None):
    parts = [
        gradient["layers"][name] if layer is None else gradient["layers"][name][layer] for name in gradient["layers"]
    ]
    parts += [gradient["embedding"]] if layer is None else []
    return np.concatenate([part.ravel() for part in parts])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_cosines_are_those_of_numpy_whole_by_layer_and_by_batch():
    batches = [{"distill": make_gradient(seed), "anchor": make_gradient(seed + 10)} for seed in range(2)]
    found = angles._compare(batches[0], batches, "distill", "anchor")
    one, other = batches[0]["distill"], batches[0]["anchor"]
    assert found["whole"] == pytest.approx(cosine(flat(one), flat(other)))
    assert found["by_layer"] == pytest.approx([cosine(flat(one, n), flat(other, n)) for n in range(3)])
    assert found["by_batch"] == pytest.approx([cosine(flat(own["distill"]), flat(own["anchor"])) for own in batches])
    assert found["by_matrix"] == pytest.approx(
        {"embedding": cosine(one["embedding"].ravel(), other["embedding"].ravel())}
    )


def test_opposite_gradients_have_a_cosine_of_minus_one_and_a_zero_one_has_none():
    one = make_gradient(0)
    opposite = {"embedding": -one["embedding"], "layers": {name: -own for name, own in one["layers"].items()}}
    nothing = {"embedding": 0 * one["embedding"], "layers": {name: 0 * own for name, own in one["layers"].items()}}
    assert angles._cosine(one, opposite) == pytest.approx(-1) and angles._cosine(one, nothing) is None
    shown = angles.format_cosines({"a, b": {"whole": -1.0, "by_batch": [None], "by_layer": [0.254, None]}})
    assert shown.splitlines()[-1] == "| a, b | -1.00 | - | 0.25 - |"


def test_folders_without_a_run_and_files_that_exist_are_refused(tmp_path, capsys):
    assert angles.main([f"--workdir={tmp_path}", "--out=x.json"]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    (tmp_path / "x.json").touch()
    assert angles.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x.json'}"]) == 2
    assert "exists" in capsys.readouterr().err
    assert angles.main([f"--workdir={tmp_path}", "--out=y.json", "--batches=0"]) == 2
    assert "--batches=0" in capsys.readouterr().err


def test_an_arm_whose_gradient_is_noise_is_refused(tmp_path, monkeypatch):
    config = config_lib.experiment(debug.get_config(), 1)
    config = dataclasses.replace(config, arms={"sft": LossConfig(divergence="cross_entropy")})
    monkeypatch.setattr(angles.stored_arms, "read_experiment", lambda workdir: config)
    monkeypatch.setattr(angles, "choose_checkpoint", lambda *given: ("sft", 3))
    with pytest.raises(ValueError, match="arm 'sft' has the loss cross_entropy, .* no gradient but noise"):
        angles.measure_angles(tmp_path, "sft", None)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["off_policy", "opcd_retained"])
def test_every_pair_of_terms_of_a_finished_run_has_a_cosine(arm, debug_run, tmp_path, capsys):
    workdir, _ = debug_run
    out = tmp_path / "angles.json"
    assert angles.main([f"--workdir={workdir}", f"--arm={arm}", "--batches=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert (found["arm"], found["step"]) == (arm, 3)
    assert set(found["cosines"]) == {"distill, anchor", "distill, retain", "anchor, retain"}
    for own in found["cosines"].values():
        assert -1 <= own["whole"] <= 1 and len(own["by_batch"]) == 2 and len(own["by_layer"]) == 1
        assert own["by_batch"][0] != own["by_batch"][1]
    assert min(found["norms"].values()) > 0 and "| distill, anchor | " in capsys.readouterr().out
