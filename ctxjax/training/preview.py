"""Show the first training batch before a run. Nothing is trained, and no workdir is created or changed."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng, sharding
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.pipeline import training_batches
from ctxjax.data.task import GameTask
from ctxjax.inputs.decoding import decode
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import Inputs, make_sampling_config, open_inputs
from ctxjax.training import batch_text
from ctxjax.training.game_episodes import GameEpisodes
from ctxjax.types import Batch, Prompts, Rollout, map_rows

ROWS = 2  # rows whose prompts and responses are shown


def format_first_batch(config: Experiment, width: int, colour: bool) -> str:
    """Return the run's first batch as text, in lines of ``width`` columns.

    The responses are those that the run's first step will sample for these rows.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        inputs = open_inputs(config, mesh, {})
        student = inputs.student
        if isinstance(inputs.task, GameTask):
            return _format(student, *_play_first_step(config, inputs, mesh), width, colour)
        batch = next(
            training_batches(
                inputs.rows,
                inputs.retention,
                seed=config.seed,
                batch_size=config.train.batch_size,
                retention_rows=config.train.retention_rows,
                pad_id=student.pad_id,
            )
        )
        root, sampling = jax.random.key(config.seed), make_sampling_config(config.rollout, student)
        ways = sharding.batch_ways(mesh)

        def sample_first_rows(prompts: Prompts, stream: str) -> Rollout:
            first_rows = map_rows(lambda rows: rows[:ROWS], prompts)
            # A row's sampling key derives from its number. In the first batch the number is the row's index.
            key = rng.key_for(root, 0, stream)
            return decode(student.params, student.config, sampling, first_rows, key, -(-ROWS // ways) * ways, mesh)

        other = None if batch.other is None else sample_first_rows(batch.other, "retention")
        rollout = sample_first_rows(batch.bare, "rollout")
        return _format(student, batch, rollout, other, width, colour)


def _play_first_step(config: Experiment, inputs: Inputs, mesh: Mesh) -> tuple[Batch, Rollout, Rollout | None]:
    """Play the first step's episodes. Return its batch and the first responses; places without one come last."""
    retains = any(loss.mu > 0 for loss in config.arms.values())
    source = GameEpisodes.of_run(config, inputs, retains, lambda params: params, mesh)
    batch, rollout, other = sharding.to_host(source.next(inputs.student.params, 0))

    def order(tree, responses: Rollout | None):
        if responses is None:
            return None
        places = np.argsort(~responses.mask_BxT.any(axis=1), kind="stable")
        return map_rows(lambda rows: rows[places], tree)

    batch = batch.replace(
        bare=order(batch.bare, rollout), context=order(batch.context, rollout), other=order(batch.other, other)
    )
    first = (
        None if rows is None else map_rows(lambda array: array[:ROWS], order(rows, rows)) for rows in (rollout, other)
    )
    return batch, *first


def _format(
    student: ModelFolder,
    batch: Batch,
    rollout: Rollout,
    other: Rollout | None,
    width: int,
    colour: bool,
) -> str:
    views = {"bare": batch.bare, "context": batch.context, "other": batch.other}
    expanded = {
        name: prompts_lib.expand_prefix(view, student.pad_id) for name, view in views.items() if view is not None
    }
    formatter = batch_text.Formatter(student.tokenizer, width, colour)
    return batch_text.format_batch(formatter, batch.replace(**expanded), student.stop_ids, rollout, other)
