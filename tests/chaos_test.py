"""Runs that are interrupted by SIGKILL or SIGTERM and resumed have the same numbers, bit for bit: one run of each."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def test_runs_that_are_interrupted_at_random_moments_resume_to_the_same_numbers():
    line = [sys.executable, "-m", "tests.chaos", "--kills=1", "--terms=1", "--arms=opcd_retained"]
    root = Path(__file__).parents[1]
    result = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["kills_equal"] == counts["terms_equal"] == 1
