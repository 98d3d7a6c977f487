"""Two real processes, two forced devices each, that train together over loopback."""

import json
from pathlib import Path
import re
import signal
import socket
import sys
import time

from forked import Command
import jax
import pytest

from ctxjax.host import command, processes
from ctxjax.training.checkpoint import saved_steps

SMALL = [
    "--config=configs/tiny.py", "--config.base.steps=1", "--config.base.warmup_steps=1", "--config.base.width=16",
    "--config.base.layers=1", "--config.base.query_heads=2", "--config.base.kv_heads=1", "--config.base.head_dim=8",
    "--config.base.mlp_width=16", "--config.base.batch_size=8", "--config.train.batch_size=8",
    "--config.train.save_every=1", "--config.train.log_every=1", "--config.eval.every=0", "--config.eval.batch_size=8",
    "--config.optim.schedule=constant", "--config.optim.warmup_steps=1", "--config.rules.train_questions=64",
    "--config.rules.dev_questions=8", "--config.rules.test_questions=8", "--config.eval.bootstrap=10",
    "--config.run_arms=('opcd',)",
]  # fmt: skip
SETTINGS = {"jax_use_shardy_partitioner": True}  # as in users' runs
STEPS = 24
LONGER = [f"--config.train.steps={STEPS}"]


class Run:
    """The command in ``count`` processes, four devices in all."""

    def __init__(
        self, count: int, workdir: Path, cache: Path, *arguments: str, only: dict[int, list[str]] | None = None
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [workdir.with_name(f"{workdir.name}.{index}.log") for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            line = [*SMALL, f"--workdir={workdir}", f"--config.base.cache={cache}"]
            line += [f"--config.compile_cache={cache / 'xla'}", f"--config.cpu_devices={4 // count}"]
            line += [*arguments, *(only or {}).get(index, [])]
            if count > 1:
                line += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process_id={index}"]
            self.processes.append(Command("ctxjax.main", line, log, **SETTINGS))

    def codes(self, seconds: float = 600) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def output(self, index: int) -> str:
        return self.logs[index].read_text()

    def until(self, condition, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(process.poll() is None for process in self.processes), self.output(0)
            time.sleep(0.1)


def rows(workdir: Path) -> dict[int, dict]:
    lines = (workdir / "opcd" / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of three steps in two processes, and of the same in one."""
    folder = tmp_path_factory.mktemp("processes")
    both = Run(2, folder / "two", folder / "cache", "--config.train.steps=3")
    assert both.codes() == [0, 0], both.output(0) + both.output(1)
    alone = Run(1, folder / "one", folder / "cache", "--config.train.steps=3")
    assert alone.codes() == [0], alone.output(0)
    return folder, both


def test_two_processes_take_the_steps_of_one(runs):
    folder, both = runs
    one, two = rows(folder / "one"), rows(folder / "two")
    assert list(one) == list(two) == [0, 1, 2, 3]
    for step, row in one.items():
        for name, value in row.items():
            if name not in ("tokens_per_second", "time"):
                assert two[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
    assert (folder / "one/opcd/items.jsonl").read_text() == (folder / "two/opcd/items.jsonl").read_text()
    assert "Acc_x" in both.output(0) and "report:" in both.output(0)
    assert "Acc_x" not in both.output(1) and "step/s" not in both.output(1)
    assert (folder / "two" / "report.html").exists()


@pytest.fixture(scope="module")
def preempted(runs):
    """(run, its workdir): two processes, one of which was sent SIGTERM while they trained."""
    folder, _ = runs
    run = Run(2, folder / "hit", folder / "cache", *LONGER)
    run.until(lambda: saved_steps(folder / "hit" / "opcd" / "checkpoints"))
    run.processes[1].send_signal(signal.SIGTERM)
    run.ended_with = run.codes(60)
    return run, folder / "hit"


def test_sigterm_to_one_process_saves_the_same_step_in_all_and_ends_them_to_go_on(preempted):
    run, workdir = preempted
    assert run.ended_with == [75, 75], run.output(0) + run.output(1)
    assert all("SIGTERM: the run ends; the same command goes on" in run.output(index) for index in range(2))
    assert not any("Traceback" in run.output(index) for index in range(2))
    last = max(rows(workdir))
    assert saved_steps(workdir / "opcd" / "checkpoints")[-1] == last < STEPS


def test_where_one_process_dies_the_other_ends_with_the_reason_and_one_alone_goes_on_to_the_end(preempted):
    _, workdir = preempted
    folder = workdir / "opcd" / "checkpoints"
    first = saved_steps(folder)[-1]
    run = Run(2, workdir, workdir.parent / "cache", *LONGER)
    run.until(lambda: saved_steps(folder)[-1] > first)
    run.processes[1].send_signal(signal.SIGKILL)
    died = time.monotonic()
    codes = run.codes(60)
    assert time.monotonic() - died < 60 and codes[0] not in (0, 75) and codes[1] == -signal.SIGKILL
    assert re.search("another process of this run has ended|another task died", run.output(0)), run.output(0)
    assert f"opcd: continues from the checkpoint of step {first}" in run.output(0)
    last, seen = saved_steps(folder)[-1], rows(workdir)
    alone = Run(1, workdir, workdir.parent / "cache", *LONGER)
    assert alone.codes() == [0], alone.output(0)
    assert f"opcd: continues from the checkpoint of step {last}" in alone.output(0)
    lines = (workdir / "opcd" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS + 1))
    after = rows(workdir)
    for step in seen.keys() - {0}:  # those that the two had taken beyond the checkpoint were taken again
        assert after[step]["loss"] == pytest.approx(seen[step]["loss"], rel=1e-5), step
    assert (workdir / "report.html").exists()


def test_processes_that_are_told_different_things_end_with_what_differs(tmp_path):
    run = Run(2, tmp_path / "run", tmp_path, "--config.train.steps=3", only={1: ["--config.seed=7"]})
    assert run.codes() == [2, 2]
    for index in range(2):
        assert "config.seed: 0 in 0; 7 in 1" in run.output(index)
        assert "Traceback" not in run.output(index)
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_other_processes_is_said_in_full():
    with pytest.raises(ValueError, match="--coordinator, --processes and --process_id go together"):
        processes.connect("localhost:1234")
    with pytest.raises(ValueError, match="--process_id = 2 must be from 0 to --processes - 1 = 1"):
        processes.connect("localhost:1234", 2, 2)
    with pytest.raises(ValueError, match="'localhost' must be host:port of the first process"):
        processes.connect("localhost", 2, 0)
    processes.connect(processes=1)
    assert not jax.distributed.is_initialized() and processes.is_first()


@pytest.mark.parametrize(
    ("message", "together", "is_loss"),
    [
        ("UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer", True, True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True, True),
        ("RESOURCE_EXHAUSTED: out of memory", True, False),
        ("UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer", False, False),
    ],
)
@pytest.mark.parametrize("shown_as", [None, TimeoutError("Timed out while waiting for async_write_complete barrier.")])
def test_the_loss_of_another_process_is_told_from_errors_of_ones_own(
    shown_as, message, together, is_loss, monkeypatch, capsys
):
    def fail(_):
        try:
            raise jax.errors.JaxRuntimeError(message)
        except jax.errors.JaxRuntimeError:
            if shown_as is None:
                raise
            raise shown_as  # noqa: B904, as orbax does

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: together)
    monkeypatch.setattr(command.app, "run", lambda main, flags_parser: main(None))
    monkeypatch.setattr(command.processes, "exit_process", sys.exit)
    with pytest.raises(SystemExit if is_loss or shown_as else jax.errors.JaxRuntimeError) as ended:
        command.run(fail, None)
    if is_loss or shown_as:
        assert ended.value.code == (processes.EXIT_CODE if is_loss else 2)
    assert ("the same command goes on from the last checkpoint" in capsys.readouterr().err) == is_loss
