"""Rounds of extraction and training, with stages that only write their files: order, inputs, what a kill repeats."""

import json
from types import SimpleNamespace

import pytest

from ctxjax import api, export, extract, rounds
from ctxjax.configs import tiny_grid

METRICS = {"acc_x": 0.1, "acc_xc": 0.9, "n": 10, "step": 1}


class Stages:
    """``calls``: what was done, in order. ``die``: the number of the call that is killed; ``late``: after it has
    written its files. ``empty``: rounds in which the empty context wins."""

    def __init__(self, monkeypatch):
        self.calls, self.die, self.late, self.empty = [], None, False, ()
        monkeypatch.setattr(extract, "extract", self.extract)
        monkeypatch.setattr(extract, "describe", lambda done: "described")
        monkeypatch.setattr(api, "start_run", self.train)
        monkeypatch.setattr(export, "export", self.export)

    def _note(self, name, folder, write, **facts):
        self.calls.append((name, folder.parent.name, facts))
        dies = self.die == len(self.calls)
        if dies and not self.late:
            raise KeyboardInterrupt
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in write.items():
            (folder / file).write_text(text)
        if dies:
            raise KeyboardInterrupt

    def extract(self, config, place, first):
        number = int(place.parent.name[-1])
        is_empty = number in self.empty
        facts = {"first": first, "model": config.model.path[-12:], "seed": config.seed, "world": config.tiny_grid.seed}
        self._note("extract", place, {} if is_empty else {"experience.txt": f"lessons {number}"}, **facts)
        return SimpleNamespace(chosen=None if is_empty else "lessons")

    def train(self, config, workdir, resume, command):
        path = config.tiny_grid.context_file
        facts = {"arms": config.run_arms, "context": open(path).read(), "model": config.model.path[-12:]}
        results = {"base": METRICS, config.run_arms[0]: METRICS | {"acc_x": 0.5 + config.seed / 10}}
        self._note("train", workdir, {"results.json": json.dumps(results)}, **facts)

    def export(self, workdir, out, arm):
        assert (workdir / "results.json").exists()
        self._note("export", out, {"model.safetensors": arm})


@pytest.fixture
def stages(monkeypatch):
    return Stages(monkeypatch)


def start(place, count=2, arm="opcd"):
    config = tiny_grid.get_config()
    config.extract.candidates, config.extract.traces = 3, 4
    return rounds.main(config, str(place), count, arm)


def test_a_round_begins_where_the_one_before_it_ended(stages, tmp_path, capsys):
    assert start(tmp_path / "run") == 0
    world, second = {"world": 0}, "round1/model"
    assert stages.calls == [
        ("extract", "round1", {"first": 0, "model": "", "seed": 0} | world),
        ("train", "round1", {"arms": ("opcd",), "context": "lessons 1", "model": ""}),
        ("export", "round1", {}),
        ("extract", "round2", {"first": 12, "model": second, "seed": 1} | world),
        ("train", "round2", {"arms": ("opcd",), "context": "lessons 2", "model": second}),
        ("export", "round2", {}),
    ]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["base", "round 1", "round 2"] and results["round 2"]["acc_x"] == 0.6
    out = capsys.readouterr().out
    assert "after 2 of 2 rounds" in out and "| round 2" in out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("die", range(1, 7))
def test_killed_anywhere_it_goes_on_and_repeats_only_the_stage_under_way(stages, tmp_path, die, late):
    stages.die, stages.late = die, late
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run")
    before = len(stages.calls)
    stages.die = None
    assert start(tmp_path / "run") == 0
    name, *_ = stages.calls[before - 1]
    again = [call[:2] for call in stages.calls[before:]]
    whole = [(stage, folder) for folder in ("round1", "round2") for stage in ("extract", "train", "export")]
    # A stage that was finished is skipped; training, which resumes by itself, is asked once more before its export.
    done = {"extract": late, "train": False, "export": late}[name]
    expected = whole[before - (not done) :]
    if name == "export" and not late:
        expected = [("train", expected[0][1]), *expected]
    assert again == expected
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["base", "round 1", "round 2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_arms": ("off_policy",)}, "arm 'off_policy' learns from the teacher's samples"),
        ({"model.param_dtype": "bfloat16"}, "model.param_dtype = 'bfloat16' and lora.rank = 0"),
        ({"eval.select": "luck"}, "eval.select = 'luck' is not a metric"),
        ({"eval.select": "acc_empty", "eval.views": ()}, "needs 'empty' in eval.views"),
        ({"lora.rank": 4, "lora.init": "/adapter"}, "lora.init = /adapter: every round has a new base"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_extraction(stages, tmp_path, changes, message):
    config = tiny_grid.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        rounds.main(config, str(tmp_path / "run"), 2, config.run_arms[-1])
    assert not stages.calls and not (tmp_path / "run").exists()


def test_more_rounds_can_be_asked_for_later_and_another_arm_cannot(stages, tmp_path):
    assert start(tmp_path / "run", 1) == 0 and len(stages.calls) == 3
    assert start(tmp_path / "run", 2) == 0 and len(stages.calls) == 6
    with pytest.raises(ValueError, match="began with other inputs"):
        start(tmp_path / "run", 2, "opcd_retained")
    with pytest.raises(ValueError, match="--arm=none is not known; choose from .*opcd_anchored"):
        start(tmp_path / "other", 2, "none")


def test_all_rounds_are_trained_alike(stages, tmp_path):
    assert start(tmp_path / "run", 1) == 0
    config = tiny_grid.get_config()
    config.train.steps *= 2
    with pytest.raises(ValueError, match="train.steps = 200, and the rounds in .*run began with 100; give that number"):
        rounds.main(config, str(tmp_path / "run"), 2, "opcd")
    assert len(stages.calls) == 3


def test_the_last_round_is_the_one_in_which_the_empty_context_wins(stages, tmp_path, capsys):
    stages.empty = (2,)
    assert start(tmp_path / "run", 3) == extract.EMPTY_WINS
    assert [call[0] for call in stages.calls] == ["extract", "train", "export", "extract"]
    out = capsys.readouterr().out
    assert "after 1 of 3 rounds" in out and "so this was the last round" in out
    stages.empty = (1,)
    assert start(tmp_path / "none", 1) == extract.EMPTY_WINS and not (tmp_path / "none" / "results.json").exists()
