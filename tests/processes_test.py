"""Two real processes, with two forced CPU devices each, that train together over loopback."""

import json
from pathlib import Path
import re
import signal
import socket
import sys
import time

from forked import Command
import jax
import numpy as np
import pytest

from ctxjax import api
from ctxjax.audit import audit
from ctxjax.configs import tiny
from ctxjax.host import command, processes, workdir
from ctxjax.inputs import run_inputs
from ctxjax.training import run as run_lib
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
STEPS = 24
LONGER = [f"--config.train.steps={STEPS}"]


class Run:
    """The command in ``count`` processes that share four devices.

    ``only``: further arguments of single processes, by process number.
    """

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
            self.processes.append(Command("ctxjax.main", line, log))

    def wait(self, seconds: float = 600) -> list[int]:
        """Wait for the end of all processes. Return their exit codes."""
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def read_output(self, index: int) -> str:
        return self.logs[index].read_text()

    def wait_until(self, condition, seconds: float = 600) -> None:
        """Wait until ``condition()`` is true. Fail if a process ends before."""
        end = time.monotonic() + seconds
        while not condition():
            are_running = all(process.poll() is None for process in self.processes)
            assert are_running and time.monotonic() < end, self.read_output(0)
            time.sleep(0.1)


def read_rows(workdir: Path) -> dict[int, dict]:
    lines = (workdir / "opcd" / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, run): three steps in two processes, in folder/two, and in one process, in folder/one. ``run`` is the
    first."""
    folder = tmp_path_factory.mktemp("processes")
    both = Run(2, folder / "two", folder / "cache", "--config.train.steps=3")
    assert both.wait() == [0, 0], both.read_output(0) + both.read_output(1)
    alone = Run(1, folder / "one", folder / "cache", "--config.train.steps=3")
    assert alone.wait() == [0], alone.read_output(0)
    return folder, both


@pytest.mark.slow
def test_two_processes_have_the_same_metrics_as_one(runs):
    folder, both = runs
    one, two = read_rows(folder / "one"), read_rows(folder / "two")
    assert list(one) == list(two) == [0, 1, 2, 3]
    for step, row in one.items():
        for name, value in row.items():
            if name not in ("tokens_per_second", "time"):
                assert two[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
    for name in ("opcd/items.jsonl", "opcd/rows.jsonl", "data.jsonl"):
        assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text()
    assert [problem for check in audit.check_folder(folder / "two") for problem in check.wrong + check.unchecked] == []
    assert "Acc_x" in both.read_output(0) and "report:" in both.read_output(0)
    assert "Acc_x" not in both.read_output(1) and "step/s" not in both.read_output(1)
    assert (folder / "two" / "report.html").exists()


@pytest.fixture(scope="module")
def preempted(runs):
    """(run, workdir): two processes, one of which got SIGTERM during training."""
    folder, _ = runs
    run = Run(2, folder / "hit", folder / "cache", *LONGER)
    run.wait_until(lambda: saved_steps(folder / "hit" / "opcd" / "checkpoints"))
    run.processes[1].send_signal(signal.SIGTERM)
    run.exit_codes = run.wait(60)
    return run, folder / "hit"


@pytest.mark.slow
def test_sigterm_to_one_process_ends_both_after_they_saved_the_same_step(preempted):
    run, workdir = preempted
    assert run.exit_codes == [75, 75], run.read_output(0) + run.read_output(1)
    assert all("SIGTERM: the run ends; the same command goes on" in run.read_output(index) for index in range(2))
    assert not any("Traceback" in run.read_output(index) for index in range(2))
    last = max(read_rows(workdir))
    assert saved_steps(workdir / "opcd" / "checkpoints")[-1] == last < STEPS


@pytest.mark.slow
def test_if_one_process_dies_the_other_ends_with_the_reason_and_one_process_can_finish_the_run(preempted):
    _, workdir = preempted
    folder = workdir / "opcd" / "checkpoints"
    first = saved_steps(folder)[-1]
    run = Run(2, workdir, workdir.parent / "cache", *LONGER)
    run.wait_until(lambda: saved_steps(folder)[-1] > first)
    run.processes[1].send_signal(signal.SIGKILL)
    died = time.monotonic()
    codes = run.wait(60)
    assert time.monotonic() - died < 60 and codes[0] not in (0, 75) and codes[1] == -signal.SIGKILL
    assert re.search("another process of this run has ended|another task died", run.read_output(0)), run.read_output(0)
    assert f"opcd: continues from the checkpoint of step {first}" in run.read_output(0)
    last, seen = saved_steps(folder)[-1], read_rows(workdir)
    alone = Run(1, workdir, workdir.parent / "cache", *LONGER)
    assert alone.wait() == [0], alone.read_output(0)
    assert f"opcd: continues from the checkpoint of step {last}" in alone.read_output(0)
    lines = (workdir / "opcd" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS + 1))
    after = read_rows(workdir)
    for step in seen.keys() - {0}:  # the steps after the checkpoint were taken again
        assert after[step]["loss"] == pytest.approx(seen[step]["loss"], rel=1e-5), step
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_processes_with_different_configurations_end_with_the_difference(tmp_path):
    run = Run(2, tmp_path / "run", tmp_path, "--config.train.steps=3", only={1: ["--config.seed=7"]})
    assert run.wait() == [2, 2]
    for index in range(2):
        assert "config.seed: 0 in 0; 7 in 1" in run.read_output(index)
        assert "Traceback" not in run.read_output(index)
    assert not (tmp_path / "run").exists()


def test_processes_with_different_commits_are_refused(tmp_path, monkeypatch):
    def gather(row):
        other = np.frombuffer(row.tobytes().replace(b"aaaa", b"bbbb"), row.dtype).reshape(row.shape)
        return np.stack([row, other])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_all_gather", gather)
    monkeypatch.setattr(api.workdir_lib, "_find_commit", lambda package: "aaaa")
    monkeypatch.setattr("ctxjax.training.run.run", lambda *given: {})
    with pytest.raises(
        ValueError, match="the same command, code, packages and files.*\n  commit: 'aaaa' in 0; 'bbbb' in 1$"
    ):
        api.start_run(tiny.get_config(), tmp_path / "run", "auto")


def test_processes_with_other_data_or_weights_are_refused_before_the_first_common_computation(monkeypatch, tmp_path):
    """As if a file had the same path and another content on the second host."""
    digests = {"model": "aa", "rows": {"train": "bb", "dev": "cc"}}

    def gather(row):
        others = np.frombuffer(bytes(row).replace(b"bb", b"dd"), np.uint8) if row.ndim else row
        return np.stack([row, others])

    monkeypatch.setattr(processes, "_all_gather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(run_lib, "open_inputs", lambda *given: run_inputs.Inputs(*[None] * 5))
    monkeypatch.setattr(run_lib, "compute_digests", lambda inputs: digests)
    monkeypatch.setattr(run_lib, "DataRecord", lambda *given: None)
    monkeypatch.setattr(run_lib, "compute_teacher_prefix", None)
    monkeypatch.setattr(run_lib, "_describe_sizes", lambda *given: "")
    monkeypatch.setattr(run_lib.memory, "warn_if_too_large", lambda *given: None)
    monkeypatch.setattr(run_lib, "_count_held_bytes", lambda *given: 0)
    with pytest.raises(ValueError, match=r"different inputs(.|\n)*files(.|\n)*  rows.train: 'bb' in 0; 'dd' in 1$"):
        run_lib._open(None, tmp_path / "run", {}, None, None, 0.0)
    assert not (tmp_path / "run").exists()


def test_the_least_number_of_all_processes_is_found(monkeypatch):
    assert processes.find_least(5) == 5
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_all_gather", lambda number: np.stack([number, number - 2]))
    assert processes.find_least(5) == 3


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("is_shared", [True, False])
def test_every_host_gets_a_text_which_is_written_once_on_a_shared_disk(tmp_path, monkeypatch, is_first, is_shared):
    path, written, waits = tmp_path / "a.txt", [], []

    def wait(place):  # the other processes write
        waits.append(place)
        if is_shared and not is_first:
            path.write_text("new")

    write = workdir._write_whole
    monkeypatch.setattr(processes, "is_first", lambda: is_first)
    monkeypatch.setattr(processes, "wait", wait)
    monkeypatch.setattr(workdir, "_write_whole", lambda *given: written.append(given) or write(*given))
    path.write_text("old")
    workdir.write_text_on_every_host(path, "new")
    assert path.read_text() == "new" and len(waits) == 2
    assert len(written) == (is_first or not is_shared) and not list(tmp_path.glob("*.partial*"))


def test_invalid_flags_of_several_processes_are_refused():
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
        ("INTERNAL: a bug of the compiler", True, False),
        ("UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer", False, False),
    ],
)
@pytest.mark.parametrize("shown_as", [None, TimeoutError("Timed out while waiting for async_write_complete barrier.")])
def test_the_loss_of_another_process_is_distinguished_from_other_errors(
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
