"""Claims: one holder at a time, on a folder that processes and machines share."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from ctxjax.host import claim
from ctxjax.host.claim import Claim, find_holder


def grow_old(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_claim_has_one_holder_until_it_is_released(tmp_path):
    folder = tmp_path / "cell"
    assert Claim.take(folder).beat() and Claim.take(folder) is None
    assert find_holder(folder).startswith(f"process {os.getpid()} on ")
    mine = Claim(folder, 1)
    mine.release()
    assert find_holder(folder) is None and Claim.take(folder) is not None


def test_the_claim_of_a_holder_that_has_not_beaten_is_taken_over_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_is_alive", lambda process: True)
    sleeper = Claim.take(tmp_path)
    grow_old(tmp_path / "claim.1", claim.STALE - 20)
    assert Claim.take(tmp_path) is None
    grow_old(tmp_path / "claim.1", claim.STALE + 5)
    assert find_holder(tmp_path) is None
    heir = Claim.take(tmp_path)
    assert heir.beat() and Claim.take(tmp_path) is None
    assert not sleeper.beat()  # it wakes up, and stops
    sleeper.release()
    assert heir.beat()


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path):
    script = f"from pathlib import Path; from ctxjax.host.claim import Claim; Claim.take(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "claim.1").exists() and find_holder(tmp_path) is None
    assert Claim.take(tmp_path).beat()


def test_a_process_that_a_claim_was_lent_to_holds_it_after_its_holders_death(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    script = f"from pathlib import Path; from ctxjax.host.claim import Claim; Claim.take(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", f"{script}.lend({run.pid})"], check=True)
    grow_old(tmp_path / "claim.1", claim.STALE + 5)
    assert find_holder(tmp_path) is not None and Claim.take(tmp_path) is None
    text = (tmp_path / "claim.1").read_text()
    (tmp_path / "claim.1").write_text(text.replace(f"\n{run.pid} ", f"\n{run.pid} 1"))
    assert find_holder(tmp_path) is None  # another process with the same number
    (tmp_path / "claim.1").write_text(text)
    run.communicate(b"\n")
    assert find_holder(tmp_path) is None and Claim.take(tmp_path).beat()


def test_a_process_number_of_another_machine_says_nothing(tmp_path):
    (tmp_path / "claim.1").write_text("999999999 elsewhere pid:[1]\n")
    assert find_holder(tmp_path) == "process 999999999 on elsewhere" and Claim.take(tmp_path) is None


def _race(folder, barrier, queue):
    barrier.wait()
    queue.put(Claim.take(folder) is not None)
    barrier.wait()  # one that has ended holds nothing


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_the_same_time_one_takes_it(tmp_path, stale):
    if stale:
        (tmp_path / "claim.1").write_text("1 elsewhere pid:[1]\n")
        grow_old(tmp_path / "claim.1", claim.STALE + 60)
    context = multiprocessing.get_context("forkserver")
    barrier, queue = context.Barrier(6), context.Queue()
    workers = [context.Process(target=_race, args=(tmp_path, barrier, queue)) for _ in range(6)]
    for worker in workers:
        worker.start()
    won = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(won) == 1
