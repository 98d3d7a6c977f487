"""Runs that are killed, or told to end, and started again come to the same numbers, bit for bit: a few of them."""

import json
from pathlib import Path
import subprocess
import sys


def test_runs_that_are_ended_at_random_moments_go_on_to_the_same_end():
    line = [sys.executable, "-m", "tests.chaos", "--kills=1", "--terms=1", "--arms=opcd_retained"]
    root = Path(__file__).parents[1]
    result = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["kills_alike"] == counts["terms_alike"] == 1
