"""configs/debug.py from the command line to the exported folder: every part of a run once."""

import json

from forked import run

import ctxjax
from ctxjax import export


def test_a_run_trains_evaluates_reports_and_exports(tmp_path):
    workdir, cache, out = tmp_path / "run", tmp_path / "cache", tmp_path / "model"
    folders = [f"--workdir={workdir}", f"--config.base.cache={cache}", f"--config.compile_cache={cache / 'xla'}"]
    ended = run("ctxjax.main", ["--config=configs/debug.py", *folders])
    assert ended.returncode == 0, ended.stdout + ended.stderr

    assert list(json.loads((workdir / "results.json").read_text())) == ["base", "opcd_retained", "off_policy"]
    rows = {arm: (workdir / arm / "metrics.jsonl").read_text() for arm in ("opcd_retained", "off_policy")}
    names = {arm: {name for line in text.splitlines() for name in json.loads(line)} for arm, text in rows.items()}
    assert {"distill", "anchor", "retain", "dev/acc_x"} <= names["opcd_retained"]
    assert {"distill", "dev/acc_x"} <= names["off_policy"] and "logprob_gap" not in names["off_policy"]
    assert len((workdir / "teacher_samples.jsonl").read_text().splitlines()) == 3 * 8
    assert "opcd_retained" in (workdir / "report.html").read_text()

    assert export.export(workdir, out, "off_policy")[:2] == ("off_policy", 3)
    assert ctxjax.load_model(out).config.width == 32
