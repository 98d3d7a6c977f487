"""Ends small runs at random moments, gives the same command again, and compares with a run that nobody disturbed.

    python -m tests.chaos --kills=30 --terms=10 [--seed=0] [--arms=opcd,opcd_retained] [--keep]

Moments are drawn in turn from: a save (or its background part), an evaluation, a training step, training the base,
and, where more than these four are asked for, anywhere. A kill is SIGKILL (-9) and must leave what the same command
finishes; SIGTERM must moreover end in its own exit code. Compared are, bit for bit: every array of the last
checkpoints, all rows of metrics.jsonl and all TensorBoard scalars but for times, all items, and results.json. Prints
one JSON object as the last line; exit code 1 if any differs.

Runs are forked off a process that has imported everything and used no device yet, and leave out the report's page:
that saves most of their time.
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

if __name__ == "__main__":  # read when jax and tqdm are imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # small programs, compiled more than run
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
LIMIT = 600  # seconds after which a run hangs

# Where the signal comes: the call to wait for, how often it is called in a run of one arm, seconds to wait after it.
PLACES = {
    "save": ((checkpoint.Checkpoints, "save"), 5, 0.3),
    "evaluation": ((evaluator.Evaluator, "__call__"), 5, 0.5),
    "step": ((metric_writer.Writer, "step"), 8, 0.05),
    "base": ((base_model, "_base_step"), 12, 0.05),
}


class Moment:
    """When a signal comes: at the ``call``-th call at a place and ``delay`` seconds, or just after ``delay``."""

    def __init__(self, place: str, rng: random.Random, whole: float, arms: int):
        self.place = place
        _, calls, longest = PLACES.get(place, (None, 1, whole))
        calls *= 1 if place in ("base", "anywhere") else arms
        self.call, self.delay = rng.randint(1, calls), rng.uniform(0, longest)

    def arm(self, number: signal.Signals, sent: Path) -> None:
        """In the run's process: has it sent the signal, once, and the time noted."""

        def send():
            sent.write_text(repr(time.monotonic()))
            os.kill(os.getpid(), number)

        timer = threading.Timer(self.delay, send)
        timer.daemon = True
        if self.place not in PLACES:
            timer.start()
            return
        (owner, name), _, _ = PLACES[self.place]
        original, left = getattr(owner, name), [self.call]

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                timer.start()
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    def __str__(self) -> str:
        return f"{self.place}, call {self.call}, {self.delay:.3f} s"


def forked(function: Callable[[], object], log: Path) -> int:
    """The exit code of ``function`` in a process of its own, or minus the signal that ended it."""
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
    """A workdir, with a cache of its own for the base, below ``folder``."""

    def __init__(self, folder: Path, compiled: Path, arms: tuple[str, ...]):
        folder.mkdir()
        self._arms = arms
        self.workdir, self.log, self._sent = folder / "run", folder / "log.txt", folder / "sent"
        settings = SETTINGS | {"base.cache": folder / "cache", "compile_cache": compiled, "run_arms": arms}
        self._line = ["chaos", f"--config={ROOT}/configs/tiny.py", f"--workdir={self.workdir}"]
        self._line += [f"--config.{name}={value}" for name, value in settings.items()]

    def __call__(self, moment: Moment | None = None, number: signal.Signals = signal.SIGKILL) -> int:
        self._sent.unlink(missing_ok=True)

        def command():
            if moment is not None:
                moment.arm(number, self._sent)
            run.write_report = lambda workdir: workdir
            sys.argv = self._line
            main.command_line()

        return forked(command, self.log)

    @property
    def seconds_since_signal(self) -> float | None:
        return time.monotonic() - float(self._sent.read_text()) if self._sent.exists() else None

    def traces(self) -> dict[str, str]:
        """Everything that is compared, by name, as digests."""
        out = self.workdir.parent / "arrays.json"
        code = forked(lambda: out.write_text(json.dumps(arrays(self.workdir, self._arms))) * 0, self.log)
        assert code == 0, f"{self.workdir}: the checkpoints cannot be read, see {self.log}"
        found = json.loads(out.read_text())
        for path in sorted(self.workdir.rglob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(self.workdir))] = digest([without_times(row) for row in rows])
        for arm in self._arms:
            found[f"{arm}/events"] = digest(scalars(self.workdir / arm / "events"))
        return found | {"results.json": digest(json.loads((self.workdir / "results.json").read_text()))}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}


def arrays(workdir: Path, arms: tuple[str, ...]) -> dict[str, str]:
    """Digests of the bytes of all arrays of every arm's last checkpoint. Uses a device."""
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


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of all TensorBoard scalars in a folder, in the order in which they were written."""
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


def disturb(run: Callable[[], Run], number: signal.Signals, moment: Callable[[], Moment]) -> dict:
    """One run that is sent a signal at a moment that it lives to see: how it ended. It is not started again yet."""
    while True:
        new, when = run(), moment()
        code, seconds = new(when, number), new.seconds_since_signal
        if seconds is not None and code != 0:
            return {"run": new, "moment": when, "code": code, "seconds": seconds}
        shutil.rmtree(new.workdir.parent)


def differences(run: Run, expected: dict[str, str]) -> list[str]:
    """Starts the run again, to its end: what of it is not as expected."""
    code = run()
    if code:
        return [f"the same command ended with exit code {code}"]
    found = run.traces()
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def chaos(kills: int, terms: int, seed: int, arms: tuple[str, ...], root: Path) -> dict:
    """The counts of the runs that were disturbed, and of those of them that ended as if they had not been."""
    rng, compiled = random.Random(seed), root / "compiled"
    undisturbed = Run(root / "undisturbed", compiled, arms)
    if undisturbed():
        raise RuntimeError(f"the undisturbed run failed: {undisturbed.log.read_text()[-2000:]}")
    expected, places, whole = undisturbed.traces(), [*PLACES], 0.0
    result = {"seed": seed, "arms": arms}
    if max(kills, terms) > len(PLACES):  # moments anywhere in a run as well, for which its length must be known
        start = time.monotonic()
        different = differences(Run(root / "repeated", compiled, arms), expected)
        if different:
            raise RuntimeError(f"two undisturbed runs differ in {different}: there is nothing to compare with")
        whole = time.monotonic() - start
        places.append("anywhere")
        result |= {"undisturbed_seconds": round(whole, 1)}
        print(f"an undisturbed run takes {whole:.1f} s", flush=True)
    places = itertools.cycle(places)
    print(f"{len(expected)} traces of a run are compared", flush=True)
    for name, count, number, wanted in (
        ("kills", kills, signal.SIGKILL, -signal.SIGKILL),
        ("terms", terms, signal.SIGTERM, preemption.EXIT_CODE),
    ):
        alike, slowest = 0, 0.0
        for index, place in zip(range(count), places):
            folder = root / f"{name}-{index}"
            found = disturb(
                lambda: Run(folder, compiled, arms),  # noqa: B023
                number,
                lambda: Moment(place, rng, whole, len(arms)),  # noqa: B023
            )
            wrong = [] if found["code"] == wanted else [f"exit code {found['code']} and not {wanted}"]
            wrong += differences(found["run"], expected)
            slowest = max(slowest, found["seconds"])
            verdict = f"DIFFERS: {wrong}, see {folder}" if wrong else "alike"
            print(f"{name} {index + 1}: {found['moment']}; ended after {found['seconds']:.2f} s; {verdict}", flush=True)
            if not wrong:
                alike += 1
                shutil.rmtree(folder)
        result |= {name: count, f"{name}_alike": alike, f"{name}_slowest_seconds": round(slowest, 2)}
    return result


def run_command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="runs to kill")
    parser.add_argument("--terms", type=int, default=0, help="runs to send SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--arms", default="opcd,opcd_retained", help="arms of the runs, with commas between them")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    options = parser.parse_args()
    gc.freeze()  # what has been imported is not looked through in every run
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    result = chaos(options.kills, options.terms, options.seed, tuple(options.arms.split(",")), root)
    good = result["kills_alike"] == options.kills and result["terms_alike"] == options.terms
    if good and not options.keep:
        shutil.rmtree(root)
    print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run_command())
