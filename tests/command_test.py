"""What a command prepares before it uses a device."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from ctxjax import command

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(20 << 20, np.uint8) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
if {keep}:
    command._keep_memory()
    faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no mallopt")
def test_memory_that_is_freed_is_not_taken_from_the_system_anew():
    def faults(keep: bool) -> int:
        line = [sys.executable, "-c", SCRIPT.format(keep=keep)]
        return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)

    assert faults(keep=True) < faults(keep=False) / 10
