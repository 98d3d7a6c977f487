"""The processes that train together, one for every host as a rule: how they find each other, agree, and end.

Every process runs the same command on the same files, and does the same. The first one alone prints and writes, but for
checkpoints, which all write: the folder of a run must be one that all of them share.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

# A process that has not been heard of for so long counts as dead, and all others end.
HEARTBEAT_SECONDS = 30
EXIT_CODE = 4  # of a process that ends because another one has
_SIGNS = ("gloo", "connection", "unavailable", "deadline_exceeded", "heartbeat", "coordination", "barrier", "aborted")


def connect(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes: those that are named, or those that jax finds in the environment (TPU pods, Slurm,
    Open MPI, Kubernetes); ``processes`` = 1: none, whatever the environment says. Call it before devices are used.

    ``coordinator``: host:port of the first process. Raises ValueError where the three are not given together, and
    ConnectionError where the others are not there.
    """
    if processes == 1:
        return
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process_id go together; without them, jax finds the others")
    if all(given) and (processes < 1 or not 0 <= process_id < processes):
        raise ValueError(f"--process_id = {process_id} must be from 0 to --processes - 1 = {processes - 1}")
    if all(given) and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator = {coordinator!r} must be host:port of the first process")
    patience = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": HEARTBEAT_SECONDS}
    try:
        jax.distributed.initialize(coordinator, processes, process_id, **patience)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"the processes of this run did not come together ({_line(error)})") from None
    except (ValueError, RuntimeError):  # nothing found, or devices are in use already: this process is alone
        if any(given):
            raise


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def begin(facts: dict) -> None:
    """Compares what every process was told, and leaves the standard output to the first.

    Raises ValueError, in all processes, where the facts differ, with those that do.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps(_flat(facts)).encode(), np.uint8)
    lengths = _all_gather(np.int32(own.size))
    texts = _all_gather(np.pad(own, (0, lengths.max() - own.size)))
    told = [json.loads(bytes(text[:length])) for text, length in zip(texts, lengths)]
    different = []
    for name in sorted(set().union(*told)):
        by_value: dict[str, list[int]] = {}
        for process, facts in enumerate(told):
            by_value.setdefault(repr(facts.get(name)), []).append(process)
        if len(by_value) > 1:
            where = "; ".join(f"{value} in {', '.join(map(str, those))}" for value, those in by_value.items())
            different.append(f"{name}: {where}")
    if different:
        raise ValueError(
            "the processes of this run were told different things; give all the same command, code and packages. By "
            "process:\n  " + "\n  ".join(different)
        )
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def wait(place: str) -> None:
    """Returns when all processes have come to this ``place``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def of_first(answer: bool) -> bool:
    """The first process's answer, in all of them."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def of_all(answer: bool) -> bool:
    """Whether the answer is yes in all processes."""
    return answer if jax.process_count() == 1 else bool(_all_gather(np.array([answer])).all())


def is_lost_process(error: BaseException | None) -> bool:
    """Whether the error says that another process is gone, or was raised because of one that says so."""
    if not jax.distributed.is_initialized():
        return False
    while error is not None:
        text = str(error).lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__  # orbax makes a TimeoutError of a barrier's
    return False


def describe_lost_process(error: Exception) -> str:
    """Such an error, for its reader."""
    return (
        "another process of this run has ended or cannot be reached, and this one ends with it. What that one printed "
        f"says why; the same command goes on from the last checkpoint ({_line(error)})"
    )


def leave(code: int) -> NoReturn:
    """Ends this process. Where it is one of several, at once: the others notice, and end too, and jax would wait for
    them to come to the end of their run."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def _all_gather(row: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(row))


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
