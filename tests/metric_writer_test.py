"""Curves go on without gap or overlap, whatever an earlier process left behind."""

import json
from types import SimpleNamespace

import chaos
import numpy as np

from ctxjax.monitoring import metric_writer
from ctxjax.monitoring.alarms import Alarms, AlarmsConfig
from ctxjax.monitoring.metric_writer import Writer
from ctxjax.monitoring.trackers import LoggingConfig, Trackers


def writer(folder, from_step: int) -> Writer:
    off = Trackers(LoggingConfig("", ""), folder, {}, "")
    return Writer(folder, "arm", 9, from_step, 1, Alarms(AlarmsConfig(), "arm"), off)


def write(to: Writer, steps) -> None:
    for step in steps:
        to.step(step, {"loss": np.float32(step / 8), "response_tokens": np.float32(3)})
        if step == 2:
            to.flush()
            to.write(step, {"dev/acc_x": 0.5})


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_runs_rows_and_scalars_are_those_of_one_run(tmp_path, capsys):
    whole = writer(tmp_path / "whole", 0)
    write(whole, range(1, 6))
    whole.close()
    first = writer(tmp_path / "parts", 0)
    write(first, range(1, 5))
    first.sync()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed
    (tmp_path / "parts" / "events" / "events.out.tfevents.0.torn").write_bytes(b"\x18\0\0\0")
    second = writer(tmp_path / "parts", 3)
    write(second, (4, 5))
    second.close()
    expected, found = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 5]
    assert [chaos.drop_times(row) for row in found] == [chaos.drop_times(row) for row in expected]
    curves = [chaos.read_scalars(tmp_path / name / "events") for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert ("loss", 4, 0.5) in curves[1] and ("dev/acc_x", 2, 0.5) in curves[1]
    assert [row["step"] for row in second.kept] == [1, 2, 2, 3]
    assert "line 6 was not finished" in capsys.readouterr().err


def test_old_event_files_that_cannot_be_removed_do_not_end_the_run(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    monkeypatch.setattr(metric_writer.shutil, "rmtree", lambda folder, ignore_errors: None)
    writer(tmp_path, 0).close()


def test_what_was_synced_is_on_the_disk_with_the_last_step(tmp_path):
    running = writer(tmp_path, 0)
    write(running, (1, 2, 3))
    running.sync()
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 2, 3]
    assert max(step for _, step, _ in chaos.read_scalars(tmp_path / "events")) == 3
    running.close()


def test_tokens_per_second_are_those_of_the_time_since_the_step_before_or_the_last_pause(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 5000.0 + clock.now)
    monkeypatch.setattr(metric_writer, "time", fake)
    running = writer(tmp_path, 0)

    def take(step, seconds, tokens):
        clock.now += seconds
        running.step(step, {"loss": np.float32(1), "response_tokens": np.float32(tokens)})

    take(1, 2, 40)
    take(2, 2, 60)  # 4 s after the start, step 1 is done
    take(3, 5, 10)
    clock.now += 2
    running.flush()
    clock.now += 50  # an evaluation
    running.write(3, {"dev/acc_x": 0.5})
    running.pause()
    take(4, 1, 90)
    clock.now += 2
    running.close()
    rows = [row for row in read(tmp_path) if "loss" in row]
    assert [(row["step"], row["tokens_per_second"]) for row in rows] == [(1, 10), (2, 12), (3, 5), (4, 30)]
    assert [row["time"] for row in rows] == [5104, 5109, 5111, 5164]
