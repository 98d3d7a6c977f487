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
        "            if preemption.reached(step):\n"
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
        "        print('saved', preemption.reached(1))\n"
        "        raise preemption.Preempted",
        "batch 0 given up saved True ended",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_process_ends_as_it_should(name):
    body, printed = CASES[name]
    body = body if body.startswith(" ") else f"    {body}"
    script = BEGIN + body + END
    line = [sys.executable, "-c", script]
    result = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert result.returncode == 75, result.stderr
    assert result.stdout.split() == printed.split()
