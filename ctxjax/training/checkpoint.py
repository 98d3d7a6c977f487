"""Checkpoints, written by orbax in the background and verified when they are read. A resumed run continues exactly.

    checkpoints/<taken>/state   parameters, optimiser state, moving average, step, root key; any mesh can read it
    checkpoints/<taken>/run     the record: position in the data, configuration, manifest; and checksums of the state

``taken`` is the number of steps taken before the checkpoint was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from ctxjax.host import memory, processes, progress, retry
from ctxjax.host.checksum import compute_checksums
from ctxjax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class _LatestAndBest:
    """Keep the ``latest`` checkpoints and the best one by the ``scores`` known when orbax asks."""

    latest: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        saved = [checkpoint.step for checkpoint in checkpoints]
        best = best_step({taken: self.scores[taken] for taken in saved if taken in self.scores})
        kept = {*sorted(saved)[-self.latest :], best}
        return [taken in kept for taken in saved]


def best_step(scores: Mapping[int, float]) -> int | None:
    """Return the step with the highest score, the latest among equal ones; None if there is no score. NaN is lowest."""

    def rank(taken: int) -> tuple[float, int]:
        score = scores[taken]
        return (-math.inf if math.isnan(score) else score, taken)

    return max(scores, key=rank, default=None)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never ask JAX, which would take the step for a number of host/preemption.py, and stop at none of those."""
        return False


class Checkpoints:
    """The checkpoints of one arm: the ``keep`` latest, and the best one by ``scores``.

    The caller fills ``scores`` during training: ``taken`` -> score, higher is better. Frozen weights are not saved; a
    resumed run reads them from the model folder.
    """

    def __init__(self, folder: Path, keep: int, scores: Mapping[int, float]):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(keep, scores), cleanup_tmp_directories=True
        )
        self._manager = _Manager(self._folder, options=options, item_names=("state", "run"))

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, taken: int, record: dict[str, Any]) -> None:
        """Save the state and ``record``, which must be valid JSON. Return as soon as the arrays are copied.

        The checkpoint before it stays until this one is complete. Raises OSError if this save or an earlier one failed.
        """
        if taken == self.latest_step:
            return
        stored = _make_storable(state)
        with progress.Bar(f"saving the checkpoint of step {taken}"):
            record = record | {"checksums": compute_checksums(stored)}
            with self._explain_failures():
                items = ocp.args.Composite(state=ocp.args.StandardSave(stored), run=ocp.args.JsonSave(record))
                self._manager.save(taken, args=items, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return (state, record) of the latest undamaged checkpoint, in the shardings of ``like``; None if there is no
        checkpoint.

        A checkpoint is damaged if it cannot be read or its checksums differ. Reading is tried again after an error that
        may pass by itself, as on network file systems. Damaged ones that are later than the returned one are renamed
        ``<taken>.damaged``, with a warning. Raises ValueError if all are damaged.
        """
        damaged: dict[int, Exception] = {}
        for taken in sorted(self._manager.all_steps(), reverse=True):
            try:
                with progress.Bar(f"reading the checkpoint of step {taken}"):
                    found = retry.retry(functools.partial(self._read, taken, like), f"the checkpoint of step {taken}")
            except Exception as error:  # orbax, tensorstore and the JSON reader raise different types
                if processes.is_lost_process(error) or memory.is_exhausted(error):
                    raise
                damaged[taken] = error
                continue
            for bad in damaged:
                self._put_aside(bad, damaged[bad], taken)
            return found
        if damaged:
            reasons = "; ".join(f"step {taken}: {_shorten(error)}" for taken, error in damaged.items())
            raise ValueError(
                f"no checkpoint in {self._folder} can be read ({reasons}); restore one from a backup, or delete "
                f"{self._folder.parent} to train this arm again"
            )
        return None

    def _read(self, taken: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _make_storable(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
        found = self._manager.restore(taken, args=items)
        state, record = found["state"], dict(found["run"])
        if wrong := _find_differences(compute_checksums(state), record.pop("checksums")):
            raise ValueError(wrong)
        return state.replace(key=jax.random.wrap_key_data(state.key)), record

    def _put_aside(self, taken: int, error: Exception, used: int) -> None:
        place, aside = self._folder / str(taken), self._folder / f"{taken}.damaged"
        if processes.is_first():
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        processes.wait("checkpoint put aside")
        self._manager.reload()
        print(
            f"warning: the checkpoint {place} is damaged ({_shorten(error)}); it was renamed {aside.name}, and the one "
            f"of step {used} is used",
            file=sys.stderr,
            flush=True,
        )

    def wait(self) -> None:
        """Wait until the last save is complete. Raises OSError if it failed."""
        with progress.Bar("writing the checkpoint to the disk"), self._explain_failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until the last save is complete, and end orbax's threads. Raises OSError if the save failed."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _explain_failures(self) -> Iterator[None]:
        """Turn any error in writing a checkpoint into an OSError that says which checkpoint is left.

        The loss of another process, which can show wherever this process waits for it, and memory that does not suffice
        are raised unchanged.
        """
        try:
            yield
        except Exception as error:  # for a full disk Python raises OSError, tensorstore ValueError
            if processes.is_lost_process(error) or memory.is_exhausted(error):
                raise
            steps = saved_steps(self._folder)
            left = f"the last complete one is of step {steps[-1]}" if steps else "there is no complete one yet"
            raise OSError(
                f"a checkpoint could not be written to {self._folder} ({_shorten(error)}); {left}. Make room on the "
                "disk or repair the folder, and give the same command again"
            ) from error


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, in ascending order."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def read_params(folder: Path, taken: int, like: Params) -> Params:
    """Read the trained parameters of one checkpoint, in the shapes, types and shardings of ``like``.

    The optimiser state is not read. Raises ValueError if the checkpoint holds other parameters, or others than were
    saved.
    """
    wanted = {"params": like}
    request = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    # Not a CheckpointManager: that would delete the unfinished checkpoints of a run that may still be active.
    with progress.Bar(f"reading the checkpoint of step {taken}"), ocp.PyTreeCheckpointer() as reader:
        try:
            params = reader.restore(folder.absolute() / str(taken) / "state", args=request)["params"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint of step {taken} in {folder} does not fit the model: {error}") from None
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"the checkpoint of step {taken} in {folder} lacks parameters of the model")
    record = json.loads((folder / str(taken) / "run" / "metadata").read_text(encoding="utf-8"))
    saved = {name: value for name, value in record["checksums"].items() if name.startswith("params/")}
    if wrong := _find_differences(compute_checksums({"params": params}), saved):
        raise ValueError(f"the checkpoint of step {taken} in {folder} is damaged: {wrong}; take another step")
    return params


def _find_differences(read: dict[str, int], saved: dict[str, int]) -> str:
    """Say which checksums differ; "" if none does."""
    wrong = sorted(name for name in read.keys() | saved.keys() if read.get(name) != saved.get(name))
    return f"the checksums of {len(wrong)} arrays differ from the saved ones, first {wrong[0]}" if wrong else ""


def _make_storable(state: TrainState) -> TrainState:
    """Replace the typed key by its data, an array that orbax can store."""
    return state.replace(key=jax.random.key_data(state.key))


def _shorten(error: Exception) -> str:
    """Return the beginning of an error's message, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
