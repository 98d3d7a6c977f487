"""What the first training step will read, for a look before the run. Nothing is trained and no workdir is touched."""

from __future__ import annotations

import dataclasses

import jax

from ctxjax import rng, sharding
from ctxjax.config import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.pipeline import training_batches
from ctxjax.evaluation.views import decode
from ctxjax.inputs.run_inputs import make_sampling_config, open_inputs
from ctxjax.training import batch_text
from ctxjax.types import Prompts, map_rows

ROWS = 2


def first_batch(config: Experiment, width: int, colour: bool) -> str:
    """The run's first batch as text, with the very responses that its first step samples for the first rows."""
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        inputs = open_inputs(config, mesh, {})
        student = inputs.student
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

        def responses(prompts: Prompts, stream: str):
            few = map_rows(lambda rows: rows[:ROWS], prompts)
            # In the first batch a row's place is its example id.
            key = rng.key_for(root, 0, stream)
            return decode(student.params, student.config, sampling, few, key, -(-ROWS // ways) * ways, mesh)

        other = None if batch.other is None else responses(batch.other, "retention")
        rollout = responses(batch.bare, "rollout")
        views = {"bare": batch.bare, "context": batch.context, "other": batch.other}
        whole = {
            name: prompts_lib.expand_prefix(view, student.pad_id) for name, view in views.items() if view is not None
        }
        pen = batch_text.Pen(student.tokenizer, width, colour)
        return batch_text.first_batch(pen, batch.replace(**whole), student.stop_ids, rollout, other)
