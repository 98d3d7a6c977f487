"""SIGTERM, SIGHUP and Ctrl-C end a run in exit codes of their own: after a save where steps are trained, at once
everywhere else. A second Ctrl-C ends it at once."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from ctxjax.host import preemption

BEGIN = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
from ctxjax.host import preemption
preemption.listen()
term = lambda: os.kill(os.getpid(), signal.{signal})
try:
"""
END = """
except preemption.Preempted as ended:
    print("ended")
    sys.exit(ended.code)
"""
CASES = {
    "at_once": ("term(); time.sleep(60); print('went on')", ""),
    "during_a_compilation_of_minutes": (
        "    import jax, threading\n"
        "    def chain(x):\n"
        "        for i in range(6000): x = jax.numpy.sin(x @ x) + i\n"
        "        return x\n"
        "    program = jax.jit(chain).lower(jax.numpy.ones((8, 8)))\n"
        "    threading.Timer(1, term).start()\n"
        "    threading.Timer(20, os._exit, (3,)).start()\n"
        "    program.compile()\n"
        "    print('went on')",
        "",
    ),
    "after_the_step_and_a_save_of_some_seconds": (
        "    with preemption.training():\n"
        "        for step in range(3):\n"
        "            term() if step == 1 else None\n"
        "            time.sleep(0.1)\n"
        "            print('step', step)\n"
        "            if preemption.is_due():\n"
        "                time.sleep(3)\n"
        "                print('saved')\n"
        "                raise preemption.Preempted",
        "step 0 step 1 saved ended",
    ),
    "after_the_last_step": (
        "    with preemption.training():\n        term(); time.sleep(0.1); print('saved')\n    print('went on')",
        "saved ended",
    ),
    "an_evaluation_is_given_up_and_the_state_saved": (
        "    with preemption.training():\n"
        "        try:\n"
        "            for batch in range(3):\n"
        "                preemption.raise_if_requested()\n"
        "                print('batch', batch)\n"
        "                term(); time.sleep(0.1)\n"
        "        except preemption.Preempted: print('given up')\n"
        "        print('saved', preemption.is_due())\n"
        "        raise preemption.Preempted",
        "batch 0 given up saved True ended",
    ),
}


@pytest.mark.parametrize("signal_after", [2, 3, 6], ids=["during_an_arm", "between_arms", "during_an_evaluation"])
def test_all_processes_end_at_one_call_whenever_the_signal_comes(signal_after, monkeypatch):
    """JAX names a call after all that the processes have made, and says so at this call alone."""
    numbers, named = [], []

    def reached(number: int) -> bool:
        numbers.append(number)
        named.extend([max(numbers) + 1] * (len(numbers) == signal_after))
        return number in named

    monkeypatch.setattr(preemption, "_is_requested", False)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached)
    steps = [preemption.is_due() for _ in range(2) for _ in range(3)]  # of two arms
    assert steps == [n >= signal_after for n in range(6)]
    with pytest.raises(preemption.Preempted):
        preemption.raise_if_requested()
    with pytest.raises(preemption.Preempted):
        preemption.raise_if_requested()


def run(body: str, signal: str) -> subprocess.CompletedProcess:
    body = body if body.startswith(" ") else f"    {body}"
    line = [sys.executable, "-c", BEGIN.format(signal=signal) + body + END]
    return subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("name", CASES)
def test_the_process_ends_as_it_should(name, signal, code):
    body, printed = CASES[name]
    result = run(body, signal)
    assert result.returncode == code, result.stderr
    assert result.stdout.split() == printed.split()
    assert "Traceback" not in result.stderr


TERMINAL = """
import fcntl, signal, sys, termios, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ctxjax.host import preemption
preemption.listen()
try:
    with preemption.training():
        for step in range(300):
            print("step", step, flush=True)
            print("bar", file=sys.stderr)
            time.sleep(0.1)
            if preemption.is_due():
                open({saved!r}, "w").close()
                print("saved", flush=True)
                raise preemption.Preempted
except preemption.Preempted as ended:
    print(ended, file=sys.stderr)
    sys.exit(ended.code)
"""


@pytest.mark.slow
def test_a_run_saves_after_its_terminal_was_closed(tmp_path):
    """Nothing can be written to a terminal that is gone: the first progress bar would end the run before it saves."""
    screen, terminal = os.openpty()
    line = [sys.executable, "-c", TERMINAL.format(saved=str(tmp_path / "saved"))]
    places = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True}
    with subprocess.Popen(line, cwd=Path(__file__).parents[1], **places) as process:
        os.close(terminal)
        os.read(screen, 1)  # the first step
        os.close(screen)
        assert process.wait(60) == 75
    assert (tmp_path / "saved").exists()


def test_a_hangup_that_is_ignored_stays_ignored():
    """As with nohup, and in tpu/run.sh."""
    line = "import signal; from ctxjax.host import preemption; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    line += "preemption.listen(); assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parents[1], check=True, timeout=120)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once():
    body = """
    with preemption.training():
        term(); time.sleep(0.1); print("goes on", flush=True)
        term(); time.sleep(60); print("too far")"""
    result = run(body, "SIGINT")
    assert (result.returncode, result.stdout) == (130, "goes on\n")
    first, second = result.stderr.strip().split("\n\n")
    assert (
        "saves after this step" in first and "Ctrl-C again" in first and second.startswith("Ctrl-C: the command ends")
    )


@pytest.mark.slow
def test_a_folder_that_is_not_complete_is_removed(tmp_path):
    body = f"""
    from pathlib import Path
    from ctxjax.host import workdir
    with workdir.new_folder(Path("{tmp_path}/model")) as partial:
        (partial / "weights").write_text("half")
        print(partial.name, flush=True)
        term(); time.sleep(60)"""
    result = run(body, "SIGINT")
    assert result.returncode == 130 and result.stdout.startswith("model.partial-")
    assert "nothing half-written is left" in result.stderr and not list(tmp_path.iterdir())
