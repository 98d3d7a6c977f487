"""configs/debug.py from the command line to the exported folder: every part of a run once."""

import json

import ctxjax


def test_a_run_trains_evaluates_reports_and_exports(debug_run):
    workdir, out = debug_run
    assert list(json.loads((workdir / "results.json").read_text())) == ["base", "opcd_retained", "off_policy"]
    rows = {arm: (workdir / arm / "metrics.jsonl").read_text() for arm in ("opcd_retained", "off_policy")}
    names = {arm: {name for line in text.splitlines() for name in json.loads(line)} for arm, text in rows.items()}
    assert {"distill", "anchor", "retain", "dev/acc_x"} <= names["opcd_retained"]
    assert {"distill", "dev/acc_x"} <= names["off_policy"] and "logprob_gap" not in names["off_policy"]
    assert len((workdir / "teacher_samples.jsonl").read_text().splitlines()) == 3 * 8
    assert "opcd_retained" in (workdir / "report.html").read_text()

    assert ctxjax.load_model(out).config.width == 32
