"""SIGTERM ends a run in its own exit code: after a save where steps are trained, at once everywhere else."""

from pathlib import Path
import subprocess
import sys

import pytest

BEGIN = """
import os, signal, sys, time
from ctxjax.host import preemption
preemption.listen()
term = lambda: os.kill(os.getpid(), signal.SIGTERM)
try:
"""
END = """
except preemption.Preempted:
    print("ended")
    sys.exit(preemption.EXIT_CODE)
"""
CASES = {
    "at_once": ("term(); print('went on')", "ended"),
    "after_the_step": (
        "    with preemption.held():\n"
        "        for step in range(3):\n"
        "            term() if step == 1 else None\n"
        "            print('step', step)\n"
        "            if preemption.reached(step): raise preemption.Preempted",
        "step 0 step 1 ended",
    ),
    "an_evaluation_is_given_up_and_the_state_saved": (
        "    with preemption.held():\n"
        "        try:\n"
        "            with preemption.interruptible():\n"
        "                term(); print('evaluated')\n"
        "        except preemption.Interrupted: print('given up')\n"
        "        print('saved', preemption.reached(1))\n"
        "        raise preemption.Preempted",
        "given up saved True ended",
    ),
    "in_a_long_call_of_the_main_thread": (
        "    import ctypes, threading\n"
        "    preemption.PATIENCE = 0.1\n"
        "    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "    threading.Timer(0.1, term).start()\n"
        "    lock(mutex); lock(mutex)\n"
        "    print('went on')",
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_process_ends_as_it_should(name):
    body, printed = CASES[name]
    body = body if body.startswith(" ") else f"    {body}"
    script = BEGIN + body + END
    line = [sys.executable, "-c", script]
    result = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert result.returncode == 75, result.stderr
    assert result.stdout.split() == printed.split()
