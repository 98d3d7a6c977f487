"""Checkpoints by orbax: the trained state and the facts of the run, saved in the background."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from ctxjax.types import TrainState


class Checkpoints:
    """The checkpoints of one arm. The data position is the step; the frozen teacher is not saved, it comes
    from the model folder."""

    def __init__(self, folder: Path, keep: int, every: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, last: bool) -> None:
        """Saves where ``step`` is due, and at the last one always; returns once the arrays are copied."""
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.StandardSave(_storable(state)), force=last)

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, in the shardings of ``like``."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        stored = self._manager.restore(self.latest_step, args=ocp.args.StandardRestore(abstract))
        return stored.replace(key=jax.random.wrap_key_data(stored.key))

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _storable(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))
