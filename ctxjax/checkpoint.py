"""Checkpoints by orbax: the trained state and the facts of the run, saved in the background."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from ctxjax.types import Params, TrainState


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
            params = reader.restore(folder.absolute() / str(step) / "default", args=request)["params"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint of step {step} in {folder} does not fit the model: {error}") from None
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"the checkpoint of step {step} in {folder} lacks parameters of the model")
    return params


def _storable(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))
