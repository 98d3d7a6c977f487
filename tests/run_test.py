"""A whole run on forced devices: files, arms, resumption; and the same command on questions of one's own."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from ctxjax import config as config_lib, trainer, workdir as workdir_lib
from ctxjax.data import prompts

ARMS = ("opcd", "opcd_anchored", "opcd_retained")


def small(cache: Path):
    config = tiny.get_config()
    config.base.cache = str(cache)
    config.base.steps, config.base.warmup_steps, config.base.width, config.base.layers = 2, 1, 32, 1
    config.base.head_dim, config.base.mlp_width, config.base.batch_size = 8, 48, 16
    config.train.steps, config.train.batch_size, config.train.save_every, config.eval.every = 4, 8, 2, 2
    config.optim.warmup_steps = 1
    config.rules.train_questions, config.rules.dev_questions, config.rules.test_questions = 64, 8, 20
    config.eval.batch_size, config.eval.bootstrap = 16, 50
    return config


def start(config, workdir: Path) -> dict:
    facts = workdir_lib.facts(config)
    workdir_lib.check(workdir, facts["config"])
    return trainer.run(config_lib.experiment(config, jax.device_count()), workdir, facts)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache):
    """(workdir, results) of a run of three arms."""
    workdir = cache / "run"
    return workdir, start(small(cache), workdir)


def test_results_hold_the_base_and_every_arm(finished):
    workdir, results = finished
    assert list(results) == ["base", *ARMS]
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))
    wanted = {"acc_x", "acc_xc", "gap", "harm", "benefit", "both_correct", "dlen", "view_kl", "cosine_by_layer", "n"}
    for arm in results.values():
        assert wanted | {"obedience", "acc_empty", "acc_paraphrase", "distill"} <= set(arm)
        assert arm["n"] == 20 and len(arm["cosine_by_layer"]) == 2


def test_every_question_is_written_once_for_every_view(finished):
    workdir, _ = finished
    for arm in ("base", *ARMS):
        items = rows(workdir / arm / "items.jsonl")
        pairs = {(item["id"], item["view"]) for item in items}
        assert len(items) == len(pairs) == 20 * 5
        assert {view for _, view in pairs} == {"bare", "context", "empty", "other", "paraphrase"}


def test_metrics_have_each_step_once_and_the_evaluations(finished):
    workdir, _ = finished
    for arm in ARMS:
        written = rows(workdir / arm / "metrics.jsonl")
        assert [row["step"] for row in written if "loss" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in written if "dev/acc_x" in row] == [0, 2, 4]
        assert max(row.get("logprob_gap_max", 0) for row in written) < 1e-4
        assert list((workdir / arm / "events").glob("events.out.tfevents.*"))


def test_only_the_arms_that_need_a_term_pay_for_it(finished):
    workdir, _ = finished
    terms = {arm: set(rows(workdir / arm / "metrics.jsonl")[1]) & {"distill", "anchor", "retain"} for arm in ARMS}
    assert terms["opcd"] == {"distill"}
    assert terms["opcd_anchored"] == {"distill", "anchor"}
    assert terms["opcd_retained"] == {"distill", "anchor", "retain"}


def test_the_report_stands_beside_the_results(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert "opcd_anchored" in page and "http" not in page.replace("http://www.w3.org", "")


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_alike(finished, cache):
    workdir, uninterrupted = finished
    config = small(cache)
    config.run_arms = ("opcd_retained",)
    stopped = cache / "stopped"
    original = trainer.Writer.step

    def stop_after_two(self, step, metrics):
        if step == 3:
            raise KeyboardInterrupt
        original(self, step, metrics)

    trainer.Writer.step = stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            start(config, stopped)
    finally:
        trainer.Writer.step = original
    results = start(config, stopped)
    before = [row["loss"] for row in rows(workdir / "opcd_retained" / "metrics.jsonl") if "loss" in row]
    after = [row["loss"] for row in rows(stopped / "opcd_retained" / "metrics.jsonl") if "loss" in row]
    assert after == before
    assert results["opcd_retained"]["view_kl"] == uninterrupted["opcd_retained"]["view_kl"]


def test_a_run_whose_prompts_share_a_prefix_comes_to_the_same_numbers(finished, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SHORTEST_PREFIX", 2)
    config = small(cache)
    config.run_arms = ("opcd_retained",)
    start(config, tmp_path / "run")
    shared, expected = (rows(folder / "opcd_retained" / "metrics.jsonl") for folder in (tmp_path / "run", finished[0]))
    for ours, theirs in zip(shared, expected, strict=True):
        for name in {"loss", "distill", "retain", "dev/view_kl", "dev/distill"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_another_configuration_in_the_same_workdir_is_refused_and_nothing_changes(finished, cache):
    workdir, _ = finished
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = small(cache)
    config.optim.lr = 1e-2
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*optim.lr: 0.001 -> 0.01"):
        start(config, workdir)
    assert files == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_the_base_is_trained_once_and_is_an_ordinary_folder(finished, cache):
    folders = list(cache.glob("rules-base-*"))
    assert len(folders) == 1
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert expected <= {path.name for path in folders[0].iterdir()}


def test_questions_of_ones_own_are_distilled(finished, cache, tmp_path):
    """Held-out distillation KL falls by half on a JSONL file, with a folder that is not of our making."""
    data = tmp_path / "questions.jsonl"
    rng = np.random.default_rng(0)
    questions = {"#1:" + "".join(rng.choice(list("abcdef"), 4)) for _ in range(100)}
    data.write_text("".join(json.dumps({"q": q, "a": "no. 7"}) + "\n" for q in sorted(questions)))
    config = small(cache)
    config.task, config.run_arms, config.model.path = "qa_jsonl", ("opcd",), str(next(cache.glob("rules-base-*")))
    config.qa_jsonl.path, config.qa_jsonl.question, config.qa_jsonl.reference = str(data), "q", "a"
    config.qa_jsonl.context = "a>b;b>c;c>d;d>e;e>f;f>a;"
    config.qa_jsonl.dev_questions = config.qa_jsonl.test_questions = 16
    config.train.steps, config.optim.lr = 30, 1e-2
    results = start(config, tmp_path / "run")
    assert results["opcd"]["distill"] < 0.5 * results["base"]["distill"]
