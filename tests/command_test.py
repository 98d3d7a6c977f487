"""What a command prepares of its memory and of its caches, before its work begins."""

import gc
import os
import platform
import subprocess
import sys

import jax
import pytest

from ctxjax.host import command

# Three times 100 MiB taken, written and given back, in the main thread and in another: how many pages were new.
SCRIPT = """
import resource, threading
from ctxjax.host import command
import numpy as np

def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        np.ones(100 << 20, np.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

command.app.run = lambda main, flags_parser: main(None)
command.memory.count_cores = lambda: {cores}

def main(_):
    for _ in range(2):
        work()
    other = threading.Thread(target=work)
    other.start()
    other.join()

command.run(main, None)
"""
PAGES = (100 << 20) // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no mallopt")
def test_large_arrays_are_taken_from_the_system_once():
    def new_pages(cores: int) -> list[int]:
        line = [sys.executable, "-c", SCRIPT.format(cores=cores)]
        # Huge pages, where numpy asks for them, would be counted as one.
        environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
        output = subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout
        return [int(line) for line in output.split()]

    assert all(pages > 2.9 * PAGES for pages in new_pages(cores=64))
    first, again, other = new_pages(cores=2)
    assert first < 2 * PAGES and again < PAGES / 10 and other < PAGES / 10


def test_programs_that_compile_fast_are_kept_too(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(command.jax.config, "update", told.__setitem__)
    monkeypatch.setattr(command, "quieten", lambda: None)
    command.prepare(command.ConfigDict({"compile_cache": str(tmp_path), "cpu_devices": 2}))
    assert told["jax_compilation_cache_dir"] == str(tmp_path)
    assert told["jax_persistent_cache_min_compile_time_secs"] == 0


def test_more_than_the_machines_memory_is_warned_of_on_cpus_only(tmp_path, monkeypatch, capsys):
    (tmp_path / "max").write_text(f"{3 << 30}\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(command.memory, "CONTAINER_LIMITS", (tmp_path / "absent", tmp_path / "none", tmp_path / "max"))
    assert command.memory.count_bytes() == min(3 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    command.memory.warn_if_too_large(3 << 30, "weights")
    assert capsys.readouterr().err == ""
    command.memory.warn_if_too_large(int(3.5 * 2**30), "weights")
    assert "warning: weights need 3.5 GiB, and this machine has 3.0 GiB" in capsys.readouterr().err
    monkeypatch.setattr(command.memory.jax, "default_backend", lambda: "tpu")
    command.memory.warn_if_too_large(1 << 50, "weights")
    assert capsys.readouterr().err == ""


def test_devices_in_use_stay_as_they_are(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    before = jax.devices()
    command._split_cpu(len(before) + 1)
    assert jax.devices() == before


def test_objects_that_live_on_are_looked_through_rarely(monkeypatch):
    before, during = gc.get_threshold(), []
    monkeypatch.setattr(command.app, "run", lambda main, flags_parser: main(None))
    gc.set_threshold(700, 10, 10)
    try:
        command.run(lambda _: during.append(gc.get_threshold()), None)
    finally:
        gc.set_threshold(*before)
    assert during[0][0] >= 50_000


def test_objects_are_not_looked_through_at_the_end():
    script = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))  # what is registered first is called last
from ctxjax.host import command
command.app.run = lambda main, flags_parser: main(None)
command.run(lambda _: print(gc.get_freeze_count()), None)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    during, at_end = (int(line) for line in output.split())
    assert during == 0 and at_end > 10_000


def test_nothing_asks_for_a_library_that_is_not_needed():
    script = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("torch") else find(name, *rest)
import ctxjax.inputs.model_folder
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
