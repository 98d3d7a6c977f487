"""Checkpoints by orbax: everything that a run needs to go on exactly, saved in the background, checked when it is read.

checkpoints/<step>/state   what is trained, optimiser, moving average, step, root key; any mesh can read it
checkpoints/<step>/run     position in the data, configuration, manifest, checksums of the state
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import math
from pathlib import Path
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from ctxjax.host import processes
from ctxjax.host.checksum import compute_checksums
from ctxjax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class _LatestAndBest:
    """Keeps the ``latest`` checkpoints and the one of the best step, as ``scores`` stand when it is asked."""

    latest: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.latest :], best_step({s: self.scores[s] for s in steps if s in self.scores})}
        return [step in kept for step in steps]


def best_step(scores: Mapping[int, float]) -> int | None:
    """The step of the highest score, the latest of several; None without any. NaN is the lowest."""
    return max(scores, key=lambda step: (-math.inf if math.isnan(scores[step]) else scores[step], step), default=None)


class Checkpoints:
    """The checkpoints of one arm: the ``keep`` latest and the best one by ``scores``, which the caller fills (step ->
    higher is better). The frozen teacher is not saved, it comes from the model folder."""

    def __init__(self, folder: Path, keep: int, scores: Mapping[int, float]):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(keep, scores), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "run"))

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, run: dict[str, Any]) -> None:
        """Saves the state and, beside it, ``run``, which JSON can hold; returns once the arrays are copied.

        The one before stays until this one is complete. Raises OSError where an earlier save has failed, or this one.
        """
        if step == self.latest_step:
            return
        stored = _storable(state)
        run = run | {"checksums": compute_checksums(stored)}
        with self._failures():
            items = ocp.args.Composite(state=ocp.args.StandardSave(stored), run=ocp.args.JsonSave(run))
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest checkpoint that is whole, in the shardings of ``like``, and what was saved beside it; None where
        there is none yet.

        Later ones that cannot be read, or hold other values than were saved, are reported and renamed
        ``<step>.damaged``. Raises ValueError where all are damaged.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, like)
            except Exception as error:  # orbax, tensorstore and the JSON reader have each their own
                if processes.is_lost_process(error):
                    raise
                damaged[step] = error
                continue
            for bad in damaged:
                self._put_aside(bad, damaged[bad], step)
            return found
        if damaged:
            reasons = "; ".join(f"step {step}: {_line(error)}" for step, error in damaged.items())
            raise ValueError(
                f"no checkpoint in {self._folder} can be read ({reasons}); bring one back from a backup, or remove "
                f"{self._folder.parent} to train this arm again"
            )
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        state, run = found["state"], dict(found["run"])
        now, then = compute_checksums(state), run.pop("checksums")
        wrong = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if wrong:
            raise ValueError(f"{len(wrong)} arrays are not those that were saved, the first {wrong[0]}")
        return state.replace(key=jax.random.wrap_key_data(state.key)), run

    def _put_aside(self, step: int, error: Exception, used: int) -> None:
        place, aside = self._folder / str(step), self._folder / f"{step}.damaged"
        if processes.is_first():
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        processes.wait("checkpoint put aside")
        self._manager.reload()
        print(
            f"warning: the checkpoint {place} is damaged ({_line(error)}); it is now {aside.name}, and the one of step "
            f"{used} is used",
            file=sys.stderr,
            flush=True,
        )

    def wait(self) -> None:
        """Waits for what is being written. Raises OSError where that fails."""
        with self._failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, too, and ends orbax's threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever goes wrong while a checkpoint is written, as one message that says what is left; but the loss of
        another process, which shows wherever this one waits for it, is passed on as it is."""
        try:
            yield
        except Exception as error:  # a full disk is an OSError to Python, and a ValueError to tensorstore
            if processes.is_lost_process(error):
                raise
            steps = saved_steps(self._folder)
            left = f"the last complete one is of step {steps[-1]}" if steps else "there is no complete one yet"
            raise OSError(
                f"a checkpoint could not be written to {self._folder} ({_line(error)}); {left}. Make room or mend the "
                "folder, and give the same command again"
            ) from error


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a complete checkpoint, in order."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def read_params(folder: Path, step: int, like: Params) -> Params:
    """What was trained, as of ``step``, in the shapes, types and shardings of ``like``; the optimiser's state is not
    read. Raises ValueError where the checkpoint holds other parameters."""
    wanted = {"params": like}
    request = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as reader:  # a manager would tidy up after a run that may still be going on
        try:
            params = reader.restore(folder.absolute() / str(step) / "state", args=request)["params"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint of step {step} in {folder} does not fit the model: {error}") from None
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"the checkpoint of step {step} in {folder} lacks parameters of the model")
    return params


def _storable(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))


def _line(error: Exception) -> str:
    """The beginning of an error's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
