"""What the first training step will read, for a look before the run. Nothing is trained and no workdir is touched."""

from __future__ import annotations

import jax

from ctxjax import rng, sharding
from ctxjax.config import Experiment
from ctxjax.data import show
from ctxjax.data.pipeline import training_batches
from ctxjax.evaluation import views
from ctxjax.trainer import open_inputs, sampling_config
from ctxjax.types import Prompts

ROWS = 2


def first_batch(config: Experiment, width: int, colour: bool) -> str:
    """The run's first batch as text, with the very responses that its first step samples for the first rows."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
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
        root, sampling = jax.random.key(config.seed), sampling_config(config.rollout, student)
        ways = mesh.shape["data"] * mesh.shape["fsdp"]

        def responses(prompts: Prompts, stream: str):
            few = Prompts(prompts.tokens_BxP[:ROWS], prompts.mask_BxP[:ROWS])
            # In the first batch a row's place is its example id.
            key = rng.key_for(root, 0, stream)
            return views.decode(student.params, student.config, sampling, few, key, -(-ROWS // ways) * ways, mesh)

        other = None if batch.other is None else responses(batch.other, "retention")
        pen = show.Pen(student.tokenizer, width, colour)
        return show.first_batch(pen, batch, student.stop_ids, responses(batch.bare, "rollout"), other)
