"""The processes that train together, usually one per host: connect them, compare their inputs, end them.

All processes run the same command on the same files. Only the first one prints and writes files, except checkpoints,
which all processes write: they must share the workdir. Bases and questions, in a cache, are written on every host.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
from pathlib import Path
import re
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as dead, and all others end
EXIT_CODE = 4  # of a process that ends because another one has
_SIGNS = ("gloo", "connection", "unavailable", "deadline_exceeded", "heartbeat", "coordination", "barrier", "aborted")


def connect(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes. Call it before devices are used.

    Without arguments, jax finds the processes in the environment (TPU pods, Slurm, Open MPI, Kubernetes).
    ``coordinator``: host:port of the first process. ``processes`` = 1: this process stays alone in any environment.
    Raises ValueError if only some of the three are given, and ConnectionError if the others cannot be reached.
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
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": HEARTBEAT_SECONDS}
    gpus = choose_gpus(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    try:
        jax.distributed.initialize(coordinator, processes, process_id, gpus, **timeouts)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"the processes of this run did not connect ({_shorten(error)})") from None
    except (ValueError, RuntimeError):  # jax found no others, or devices are already in use: this process is alone
        if any(given):
            raise


def choose_gpus(environment: Mapping[str, str], installed: int = 0) -> list[int] | None:
    """Return the GPUs of this Slurm task, as places among those that it sees; None if jax is to choose.

    ``installed``: number of GPUs of the node, which the task sees unless CUDA_VISIBLE_DEVICES is set.

    jax would take one per task. Tasks of a node that all see its GPUs share them equally; a task that Slurm has bound
    to some takes these. Raises ValueError if the GPUs do not split among the tasks.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = installed if visible is None else len([gpu for gpu in visible.split(",") if gpu])
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # by node, such as "2(x3),1"
    if not seen or not tasks or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    by_node = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    count = by_node[int(environment["SLURM_NODEID"])]
    is_bound = "SLURM_GPUS_PER_TASK" in environment or seen < int(environment.get("SLURM_GPUS_ON_NODE", seen))
    if is_bound or count == 1:
        return list(range(seen))
    if seen % count:
        raise ValueError(
            f"{seen} GPUs of a node do not split among its {count} Slurm tasks; start one task per node with all of "
            "them: --ntasks-per-node=1"
        )
    first = int(environment["SLURM_LOCALID"]) * (seen // count)
    return list(range(first, first + seen // count))


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return jax.process_index() == 0


def check_same_facts(facts: dict) -> None:
    """Raise ValueError in all processes, with the differences, if ``facts`` is not the same in all of them."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps(_flatten(facts)).encode(), np.uint8)
    lengths = _all_gather(np.int32(own.size))
    texts = _all_gather(np.pad(own, (0, lengths.max() - own.size)))
    all_facts = [json.loads(bytes(text[:length])) for text, length in zip(texts, lengths)]
    different = []
    for name in sorted(set().union(*all_facts)):
        by_value: dict[str, list[int]] = {}
        for process, facts in enumerate(all_facts):
            by_value.setdefault(repr(facts.get(name)), []).append(process)
        if len(by_value) > 1:
            where = "; ".join(f"{value} in {', '.join(map(str, those))}" for value, those in by_value.items())
            different.append(f"{name}: {where}")
    if different:
        raise ValueError(
            "the processes of this run have different inputs; give all the same command, code, packages and files. "
            "Values and processes:\n  " + "\n  ".join(different)
        )


def check_alone(command: str) -> None:
    """Raise ValueError if ``command``, which writes files as a single process, runs in several."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{command} runs in one process, and jax found {jax.process_count()}; give it on a machine with all of its "
            "devices, such as a slice of one host (v5e:2x4), and take what it writes to the others"
        )


def silence_others() -> None:
    """Discard what this process prints to the standard output from now on, unless it is the first."""
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def wait(place: str) -> None:
    """Return when all processes have called this with the same ``place``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def ask_first(answer: bool) -> bool:
    """Return the first process's answer, in all processes. All must call it."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def ask_all(answer: bool) -> bool:
    """Return whether the answer is True in all processes. All must call it."""
    return answer if jax.process_count() == 1 else bool(_all_gather(np.array([answer])).all())


def find_least(number: int) -> int:
    """Return the smallest of all processes' numbers. All must call it."""
    return number if jax.process_count() == 1 else int(_all_gather(np.array([number], np.int32)).min())


def is_lost_process(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that another process is gone."""
    if not jax.distributed.is_initialized():
        return False
    while error is not None:
        text = str(error).lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__  # orbax raises a TimeoutError from a barrier's error
    return False


def describe_lost_process(error: Exception) -> str:
    """Return the message of an error for which ``is_lost_process`` holds."""
    return (
        "another process of this run has ended or cannot be reached, so this one ends too. The output of that one says "
        f"why; the same command goes on from the last checkpoint ({_shorten(error)})"
    )


def exit_process(code: int) -> NoReturn:
    """End this process; if it is one of several, at once, since jax would wait until the others end their run.

    The others notice and end too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def _all_gather(row: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(row))


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _shorten(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
