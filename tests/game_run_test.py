"""A run whose questions are episodes of a game, of few steps: from the base to the results, resumed, previewed."""

import json
from pathlib import Path

import jax
import pytest

from ctxjax import config as config_lib
from ctxjax.audit import audit
from ctxjax.configs import tiny_grid
from ctxjax.host import preemption, workdir as workdir_lib
from ctxjax.training import preview, run
from ctxjax.training.checkpoint import saved_steps
from ctxjax.training.game_episodes import GameEpisodes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_devices", "no_page")]
STEPS, BOARDS = 4, 4


def make_config(cache: Path, steps: int):
    config = tiny_grid.get_config()
    config.base.cache, config.run_arms = str(cache), ("opcd_retained",)
    config.base.steps, config.base.warmup_steps, config.base.width, config.base.layers = 2, 1, 32, 1
    config.base.head_dim, config.base.mlp_width, config.base.batch_size = 8, 48, 16
    config.train.steps, config.train.batch_size, config.train.save_every, config.eval.every = steps, BOARDS, 2, 2
    config.optim.schedule, config.optim.warmup_steps = "constant", 1
    config.tiny_grid.dev_questions, config.tiny_grid.test_questions = 8, 10
    config.eval.batch_size, config.eval.bootstrap = 8, 20
    return config


def run_once(config, workdir: Path) -> dict:
    facts = workdir_lib.collect_facts(config)
    workdir_lib.check_workdir(workdir, facts["config"])
    return run.run(config_lib.experiment(config, jax.device_count()), workdir, facts)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(workdir: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without their times."""
    rows = read_rows(workdir / "opcd_retained" / "metrics.jsonl")
    return [{name: v for name, v in row.items() if "time" not in name and "second" not in name} for row in rows]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache, two_devices):
    """(workdir, results) of a complete run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda workdir: None)
        return cache / "run", run_once(make_config(cache, STEPS), cache / "run")


def test_results_count_boards(finished):
    workdir, results = finished
    for name, metrics in results.items():
        assert metrics["n"] == 10 and 1 <= metrics["turns_x"] <= 5 and 1 <= metrics["turns_xc"] <= 5
        assert {"harm", "benefit", "obedience", "acc_paraphrase", "view_kl", "distill"} <= metrics.keys()
        assert 0 < metrics["random_moves"] < metrics["fixed_path"] < metrics["perfect_play"] == 1
        items = read_rows(workdir / name / "items.jsonl")
        assert len({(item["id"], item["view"]) for item in items}) == len(items) == 10 * 5
        bare = [item["turns"] for item in items if item["view"] == "bare"]
        assert metrics["turns_x"] == sum(bare) / len(bare)


def test_a_step_learns_from_the_turns_that_were_taken(finished):
    rows = [row for row in read_rows(finished[0] / "opcd_retained" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["untrained"] == row["skipped"] == 0 and row["logprob_gap_max"] < 1e-4
        turns = row["response_tokens"] / row["response_length"]
        assert abs(turns - round(turns)) < 1e-3 and BOARDS <= round(turns) <= 5 * BOARDS
        assert row["retain"] > -1e-6  # a sum that rounds


def test_a_run_that_stops_and_goes_on_is_the_same(finished, cache, tmp_path, capsys):
    for steps in (2, STEPS):
        run_once(make_config(cache, steps), tmp_path / "run")
    assert "continues from the checkpoint of step 2" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run") == read_metrics(finished[0])


def test_a_signal_while_episodes_are_played_saves_the_steps_before_them(finished, cache, tmp_path, monkeypatch):
    config, workdir = make_config(cache, STEPS), tmp_path / "run"
    config.train.save_every = 50
    play = GameEpisodes.next

    def play_with_signal(self, state, step):
        monkeypatch.setattr(preemption, "_is_requested", step == 1)
        return play(self, state, step)

    with monkeypatch.context() as patch:
        patch.setattr(GameEpisodes, "next", play_with_signal)
        with pytest.raises(preemption.Preempted):
            run_once(config, workdir)
    assert saved_steps(workdir / "opcd_retained" / "checkpoints") == [1]
    monkeypatch.setattr(preemption, "_is_requested", False)
    run_once(config, workdir)
    assert read_metrics(workdir) == read_metrics(finished[0])


def test_the_audit_plays_the_episodes_again(finished):
    checks = list(audit.check_folder(finished[0]))
    assert not [wrong for check in checks for wrong in check.wrong]
    seen = [seen for check in checks for seen in check.seen]
    assert "50 responses graded again" in seen and "4 retention rows a step, under contexts to train on" in seen


def test_the_preview_shows_turns(finished, cache):
    experiment = config_lib.experiment(make_config(cache, STEPS), jax.device_count())
    text = preview.format_first_batch(experiment, width=100, colour=False)
    assert text.count("sampled from the student") == 2 * preview.ROWS and "retention" in text
    assert f"{'bare':<10}{BOARDS * 5:>6}" in text


def test_arms_on_the_teachers_samples_are_refused(cache):
    config = make_config(cache, STEPS)
    config.run_arms = ("off_policy",)
    with pytest.raises(ValueError, match="arm 'off_policy' learns from the teacher's samples .*leave the arm out"):
        preview.format_first_batch(config_lib.experiment(config, jax.device_count()), width=100, colour=False)
