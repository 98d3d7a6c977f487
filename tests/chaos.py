"""Interrupt small runs at random moments, give the same command again, and compare with a run without interruption.

    python -m tests.chaos --kills=30 --terms=10 [--seed=0] [--arms=opcd,opcd_retained] [--keep]

The moments are, in rotation: during a save (or its background part), an evaluation, a training step, the training of
the base, and, if more than these four are asked for, any time of the run. After SIGKILL and after SIGTERM the same
command must finish the run; after SIGTERM the exit code must also be preemption.EXIT_CODE. Compared bit for bit: every
array of the last checkpoints, and, without their times, all rows of metrics.jsonl, all TensorBoard scalars, all items
and results.json. Prints one JSON object as the last line; the exit code is 1 if anything differs.

To save time, runs are forked off a process that has imported everything and used no device, and write no report.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import gc
import hashlib
import itertools
import json
import os
from pathlib import Path
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time

if __name__ == "__main__":  # before jax and tqdm are imported, which read these
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling takes longer than running
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["TQDM_DISABLE"] = "1"

from ctxjax import main
from ctxjax.evaluation import evaluator
from ctxjax.host import preemption
from ctxjax.inputs import base_model  # noqa: E402, F401
from ctxjax.monitoring import metric_writer
from ctxjax.training import checkpoint, run

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "cpu_devices": 1, "base.steps": 12, "base.warmup_steps": 2, "base.width": 16, "base.layers": 1,
    "base.query_heads": 2, "base.kv_heads": 1, "base.head_dim": 8, "base.mlp_width": 32, "base.batch_size": 8,
    "train.steps": 8, "train.batch_size": 8, "train.save_every": 2, "eval.every": 3, "eval.batch_size": 16,
    "eval.bootstrap": 20, "optim.warmup_steps": 1, "rules.train_questions": 64, "rules.dev_questions": 16,
    "rules.test_questions": 16, "loss.anchor": "ema",
}  # fmt: skip
TIMES = ("time", "tokens_per_second")
LIMIT = 600  # seconds; a run that takes longer is considered to hang

# When the signal is sent: the function to wait for, its number of calls in a run of one arm, and the maximum delay
# after the call in seconds.
PLACES = {
    "save": ((checkpoint.Checkpoints, "save"), 5, 0.3),
    "evaluation": ((evaluator.Evaluator, "__call__"), 5, 0.5),
    "step": ((metric_writer.Writer, "step"), 8, 0.05),
    "base": ((base_model, "_update"), 12, 0.05),
}


class Moment:
    """When a signal is sent: ``delay`` seconds after the ``call``-th call of a place's function, or, if ``place`` is
    "anywhere", after the run's start. ``duration``: seconds that a whole run takes."""

    def __init__(self, place: str, rng: random.Random, duration: float, arms: int):
        self.place = place
        _, calls, longest = PLACES.get(place, (None, 1, duration))
        calls *= 1 if place in ("base", "anywhere") else arms
        self.call, self.delay = rng.randint(1, calls), rng.uniform(0, longest)

    def schedule(self, number: signal.Signals, sent: Path) -> None:
        """Send the signal to this process at the moment, once, and write the time to the file ``sent``."""

        def send():
            sent.write_text(repr(time.monotonic()))
            os.kill(os.getpid(), number)

        timer = threading.Timer(self.delay, send)
        timer.daemon = True
        if self.place not in PLACES:
            timer.start()
            return
        (owner, name), _, _ = PLACES[self.place]
        original, remaining = getattr(owner, name), [self.call]

        def count_calls(*args, **kwargs):
            remaining[0] -= 1
            if remaining[0] == 0:
                timer.start()
            return original(*args, **kwargs)

        setattr(owner, name, count_calls)

    def __str__(self) -> str:
        return f"{self.place}, call {self.call}, {self.delay:.3f} s"


def run_in_fork(function: Callable[[], object], log: Path) -> int:
    """Run ``function`` in a forked process. Return its exit code, or minus the number of the signal that ended it."""
    child = os.fork()
    if not child:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 70
        try:
            code = function() or 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


class Run:
    """A run that can be started several times. Its workdir and its cache of the base are in ``folder``."""

    def __init__(self, folder: Path, compiled: Path, arms: tuple[str, ...]):
        folder.mkdir()
        self._arms = arms
        self.workdir, self.log, self._sent = folder / "run", folder / "log.txt", folder / "sent"
        settings = SETTINGS | {"base.cache": folder / "cache", "compile_cache": compiled, "run_arms": arms}
        self._line = ["chaos", f"--config={ROOT}/configs/tiny.py", f"--workdir={self.workdir}"]
        self._line += [f"--config.{name}={value}" for name, value in settings.items()]

    def start(self, moment: Moment | None = None, number: signal.Signals = signal.SIGKILL) -> int:
        """Run the command, with signal ``number`` at ``moment`` if one is given. Return the exit code."""
        self._sent.unlink(missing_ok=True)

        def command():
            if moment is not None:
                moment.schedule(number, self._sent)
            run.write_report = lambda workdir: workdir
            sys.argv = self._line
            main.command_line()

        return run_in_fork(command, self.log)

    @property
    def seconds_since_signal(self) -> float | None:
        return time.monotonic() - float(self._sent.read_text()) if self._sent.exists() else None

    def collect_digests(self) -> dict[str, str]:
        """Return digests of everything that is compared, by name."""
        out = self.workdir.parent / "arrays.json"
        code = run_in_fork(lambda: out.write_text(json.dumps(digest_arrays(self.workdir, self._arms))) * 0, self.log)
        assert code == 0, f"{self.workdir}: the checkpoints cannot be read, see {self.log}"
        found = json.loads(out.read_text())
        for path in sorted(self.workdir.rglob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(self.workdir))] = digest([drop_times(row) for row in rows])
        for arm in self._arms:
            found[f"{arm}/events"] = digest(read_scalars(self.workdir / arm / "events"))
        return found | {"results.json": digest(json.loads((self.workdir / "results.json").read_text()))}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def drop_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}


def digest_arrays(workdir: Path, arms: tuple[str, ...]) -> dict[str, str]:
    """Return digests of the bytes of all arrays in every arm's last checkpoint. Uses a device."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    for arm in arms:
        folder = workdir / arm / "checkpoints"
        step = checkpoint.saved_steps(folder)[-1]
        place = folder.absolute() / str(step) / "state"
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(place).item_metadata.tree
            wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            state = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=wanted))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            value = np.asarray(leaf)
            name = f"{arm}/{step}{jax.tree_util.keystr(path)}"
            found[name] = hashlib.sha256(value.tobytes()).hexdigest()[:16] + str(value.shape)
    return found


def read_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Return (name, step, value) of all TensorBoard scalars in a folder, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.tag not in TIMES]
    return found


def interrupt(make_run: Callable[[], Run], number: signal.Signals, draw_moment: Callable[[], Moment]) -> dict:
    """Interrupt one run with signal ``number`` and return how it ended.

    A run that is over before its moment comes is discarded, and another one is made.
    """
    while True:
        run, moment = make_run(), draw_moment()
        code, seconds = run.start(moment, number), run.seconds_since_signal
        if seconds is not None and code != 0:
            return {"run": run, "moment": moment, "code": code, "seconds": seconds}
        if code != 0:
            raise RuntimeError(f"a run failed before its signal ({moment}): {run.log.read_text()[-2000:]}")
        shutil.rmtree(run.workdir.parent)


def find_differences(run: Run, expected: dict[str, str]) -> list[str]:
    """Start the run again, to its end. Return the names of what differs from ``expected``."""
    code = run.start()
    if code:
        return [f"the same command ended with exit code {code}"]
    found = run.collect_digests()
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def run_chaos(kills: int, terms: int, seed: int, arms: tuple[str, ...], root: Path) -> dict:
    """Return the number of runs that were interrupted, and how many of them ended equal to one that was not."""
    rng, compiled = random.Random(seed), root / "compiled"
    reference = Run(root / "reference", compiled, arms)
    if reference.start():
        raise RuntimeError(f"the run without interruption failed: {reference.log.read_text()[-2000:]}")
    expected, places, duration = reference.collect_digests(), [*PLACES], 0.0
    result = {"seed": seed, "arms": arms}
    if max(kills, terms) > len(PLACES):  # also moments anywhere in a run, which need its duration
        start = time.monotonic()
        different = find_differences(Run(root / "repeated", compiled, arms), expected)
        if different:
            raise RuntimeError(f"two runs without interruption differ in {different}; nothing can be compared")
        duration = time.monotonic() - start
        places.append("anywhere")
        result |= {"uninterrupted_seconds": round(duration, 1)}
        print(f"a run without interruption takes {duration:.1f} s", flush=True)
    places = itertools.cycle(places)
    print(f"{len(expected)} digests of each run are compared", flush=True)
    for name, count, number, wanted in (
        ("kills", kills, signal.SIGKILL, -signal.SIGKILL),
        ("terms", terms, signal.SIGTERM, preemption.EXIT_CODE),
    ):
        equal, slowest = 0, 0.0
        for index, place in zip(range(count), places):
            folder = root / f"{name}-{index}"
            found = interrupt(
                lambda: Run(folder, compiled, arms),  # noqa: B023
                number,
                lambda: Moment(place, rng, duration, len(arms)),  # noqa: B023
            )
            wrong = [] if found["code"] == wanted else [f"exit code {found['code']} and not {wanted}"]
            wrong += find_differences(found["run"], expected)
            slowest = max(slowest, found["seconds"])
            verdict = f"DIFFERS: {wrong}, see {folder}" if wrong else "equal"
            print(f"{name} {index + 1}: {found['moment']}; ended after {found['seconds']:.2f} s; {verdict}", flush=True)
            if not wrong:
                equal += 1
                shutil.rmtree(folder)
        result |= {name: count, f"{name}_equal": equal, f"{name}_slowest_seconds": round(slowest, 2)}
    return result


def run_command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="runs to end with SIGKILL")
    parser.add_argument("--terms", type=int, default=0, help="runs to end with SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--arms", default="opcd,opcd_retained", help="arms of the runs, separated by commas")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    options = parser.parse_args()
    gc.freeze()  # so that no run's garbage collection scans the imported modules
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    result = run_chaos(options.kills, options.terms, options.seed, tuple(options.arms.split(",")), root)
    good = result["kills_equal"] == options.kills and result["terms_equal"] == options.terms
    if good and not options.keep:
        shutil.rmtree(root)
    print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run_command())
