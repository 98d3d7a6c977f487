"""No phase is silent: bars for phases that take long, nothing for short ones, and no flood in log files. And a run that
is interrupted from the keyboard."""

import io
import json
import re
import signal
import sys
import time

import forked
import pytest
from tqdm import std

from ctxjax.host import compile_times, progress
from ctxjax.training.checkpoint import saved_steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """shown(stream): lets the bars write to ``stream``, in seconds that are shorter."""

    def patched(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # another test may have imported it
        monkeypatch.setattr(progress, "QUIET", 0.2)
        monkeypatch.setattr(progress, "TERMINAL", 0.1)
        monkeypatch.setattr(progress, "FILE", 0.5)
        return stream

    return patched


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_short_phase_shows_nothing(stream, monkeypatch):
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    with progress.Bar("short"):
        pass
    assert list(progress.track("abc", "counted", 3)) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="bad"), progress.Bar("failed", 3):
        raise ValueError("bad")
    assert written.getvalue().strip() == ""


def test_a_phase_without_a_count_says_what_goes_on_and_how_long_it_took(shown):
    written = shown(io.StringIO())
    with progress.Bar("compiling a step"):
        time.sleep(0.4)
        assert re.fullmatch(r"(compiling a step: 00:0\d\n)+", written.getvalue())
        time.sleep(1)
    assert re.fullmatch(r"(compiling a step: 00:0\d\n)+compiling a step: 00:0[1-9]\n", written.getvalue())


def test_a_log_file_gets_whole_lines_and_few_of_them(shown):
    written = shown(io.StringIO())
    started = time.monotonic()
    with progress.Bar("training", 1200) as outer:
        for _ in range(12):
            with progress.Bar("inner", 100, "response") as inner:
                for _ in range(100):
                    time.sleep(0.001)
                    inner.update()
                    outer.update()
    lines = written.getvalue().splitlines()
    most = 2 + (time.monotonic() - started) / progress.FILE
    assert 2 <= sum(line.startswith("training: ") for line in lines) <= most, lines
    assert "1200/1200" in lines[-1] and "<" in lines[0] and not {"\r", "\x1b"} & {*written.getvalue()}


def test_a_log_file_gets_the_last_state_once(shown):
    written = shown(io.StringIO())
    with progress.Bar("counted", 2, "response") as bar:
        for seconds in (0.3, 0.7):  # both are shown, the last one by update
            time.sleep(seconds)
            bar.update()
    with progress.Bar("clock"):
        time.sleep(0.3)
    lines = written.getvalue().splitlines()
    assert sum("2/2" in line for line in lines) == 1
    assert [line for line in lines if "clock" in line] == ["clock: 00:00"]


def test_a_terminal_sees_the_clock_tick_while_the_first_batch_is_compiled(shown):
    written = shown(Terminal())
    with progress.Bar("view", 2, "response", compiles=True) as bar:
        time.sleep(0.6)
        states = written.getvalue().split("\r")[1:]
        assert len(states) >= 3 and all("0/2" in state and "compiling" in state for state in states)
        bar.update()
        time.sleep(0.3)
    states = written.getvalue().split("\r")
    assert "1/2" in states[-1] and "compiling" not in states[-1] and states[-1].endswith("\n")


@pytest.mark.parametrize("total", [None, 2])
def test_a_terminal_that_has_no_size_sees_the_bar_too(shown, monkeypatch, total):
    monkeypatch.setattr(std, "_screen_shape_wrapper", lambda: lambda file: (-1, -1))
    written = shown(Terminal())
    with progress.Bar("training", total) as bar:
        time.sleep(0.3)
        bar.update()
    assert "training" in written.getvalue()


@pytest.fixture
def cache(tmp_path):
    """The folder of the compile cache, during a test."""
    before = progress.jax.config.jax_compilation_cache_dir
    progress.jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    yield tmp_path / "xla"
    progress.jax.config.update("jax_compilation_cache_dir", before)


def test_compiling_says_how_long_it_took_last_time(shown, cache):
    def compile_it(program) -> str:
        written = shown(io.StringIO())
        with compile_times.show("compiling", program):
            time.sleep(0.3)
        return written.getvalue()

    assert compile_it(("step", 8)).startswith("compiling: 00:00")
    (known,) = json.loads((cache / "seconds.json").read_text().replace("0.", "20.")).items()
    (cache / "seconds.json").write_text(json.dumps(dict([known])))
    assert compile_it(("step", 8)).startswith("compiling (last time 20 s): 00:00")
    assert "last" not in compile_it(("step", 16))
    (cache / "seconds.json").write_text("[1")
    assert "last" not in compile_it(("step", 8))


def test_a_bar_without_a_name_or_of_another_process_is_not_shown(shown, monkeypatch):
    written = shown(io.StringIO())
    with progress.Bar("", 3) as bar:
        time.sleep(0.3)
        bar.update()
    monkeypatch.setattr(progress.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(progress.processes, "is_first", lambda: False)
    with progress.Bar("training", 3, compiles=True) as bar:
        time.sleep(0.3)
        bar.set_postfix(loss=1.0)
        bar.update()
    assert written.getvalue() == ""


SMALL = {
    "cpu_devices": 1, "base.steps": 2, "base.warmup_steps": 1, "base.width": 16, "base.layers": 1,
    "base.query_heads": 2, "base.kv_heads": 1, "base.head_dim": 8, "base.mlp_width": 32, "base.batch_size": 8,
    "train.steps": 100_000, "train.batch_size": 8, "train.save_every": 2, "eval.every": 0, "eval.batch_size": 16,
    "eval.bootstrap": 20, "rules.train_questions": 64, "rules.dev_questions": 16, "rules.test_questions": 16,
    "rollout.max_tokens": 4,
}  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_during_training_saves_and_says_how_to_go_on(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    folders = [f"--workdir={tmp_path / 'run'}", f"--config.base.cache={tmp_path}", "--config.compile_cache="]
    out, err, checkpoints = tmp_path / "out", tmp_path / "err", tmp_path / "run" / "opcd" / "checkpoints"
    line = ["--config=configs/tiny.py", "--config.run_arms=('opcd',)", *flags, *folders]
    command = forked.Command("ctxjax.main", line, out, err)
    try:
        deadline = time.monotonic() + 240
        while not saved_steps(checkpoints) and command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130, err.read_text()
    finally:
        command.kill()
    said = err.read_text()
    assert "Ctrl-C: the run saves after this step" in said and "Traceback" not in said
    assert said.endswith("Ctrl-C: the run ends; the same command goes on\n")
    assert saved_steps(checkpoints)[-1] < 100_000
    # 8 questions of 4 tokens; what a step costs is compared with products counted by hand in plan_numbers_test.py.
    cost = next(text for text in out.read_text().splitlines() if text.startswith("opcd: 100000 steps"))
    assert "up to 32 response tokens and " in cost and "in all up to 3,200,000 response tokens and " in cost
    one, all_of_them = (part.split(" tokens and ")[-1] for part in cost.split("; in all "))
    assert one.endswith(" MFLOPs") and all_of_them.endswith(" GFLOPs")
    assert float(all_of_them.split()[0]) == pytest.approx(float(one.split()[0]) * 100, rel=0.01)
