"""Show the first training batch before a run. Nothing is trained, and no workdir is created or changed."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng, sharding
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.pipeline import shuffle_questions, training_batches
from ctxjax.data.task import GameTask
from ctxjax.distill import losses
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.inputs import teacher_samples
from ctxjax.inputs.decoding import decode
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import Inputs, make_sampling_config, open_inputs
from ctxjax.training import batch_text
from ctxjax.training.batch_text import Sampled
from ctxjax.training.game_episodes import GameEpisodes
from ctxjax.types import Batch, Prompts, Rollout, map_rows

ROWS = 2  # rows whose prompts and responses are shown


def format_first_batch(config: Experiment, width: int, colour: bool) -> str:
    """Return the run's first batch as text, in lines of ``width`` columns.

    The responses are those of the run's first step for these rows: the student's or, for arms that begin with them, the
    teacher's samples.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        inputs = open_inputs(config, mesh, {})
        student = inputs.student
        if isinstance(inputs.task, GameTask):
            batch, rollout, other = _play_first_step(config, inputs, mesh)
            sampled = _list_sampled(config, {False: rollout}, dict.fromkeys(config.arms, False), student)
            return _format(student, batch, sampled, other, config, width, colour)
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

        def sample_first_rows(
            prompts: Prompts, stream: str, folder: ModelFolder = student, sampling: SamplingConfig = sampling
        ) -> Rollout:
            first_rows = map_rows(lambda rows: rows[:ROWS], prompts)
            # A row's sampling key derives from its number. In the first batch the number is the row's index.
            key = rng.key_for(root, 0, stream)
            return decode(folder.params, folder.config, sampling, first_rows, key, -(-ROWS // ways) * ways, mesh)

        is_given = {name: 0 in teacher_samples.steps_with_samples(config, name) for name in config.arms}
        rollouts = {}  # by whether the teacher gives them
        if not all(is_given.values()):
            rollouts[False] = sample_first_rows(batch.bare, "rollout")
        if any(is_given.values()):
            teacher, own = inputs.teacher, make_sampling_config(config.teacher.decode, student)
            said = sample_first_rows(batch.context, "rollout", teacher, own)
            rows = [inputs.rows.rows[place] for place in shuffle_questions(len(inputs.rows.rows), config.seed)[:ROWS]]
            rollouts[True] = teacher_samples.cut_reasoning(config, teacher, rows, said)
        other = None if batch.other is None else sample_first_rows(batch.other, "retention")
        return _format(student, batch, _list_sampled(config, rollouts, is_given, student), other, config, width, colour)


def _list_sampled(
    config: Experiment, rollouts: dict[bool, Rollout], is_given: dict[str, bool], student: ModelFolder
) -> list[Sampled]:
    """Return the responses of the first step, once for all arms that learn from the same tokens of them."""
    arms: dict[tuple, list[str]] = {}
    for name, loss in config.arms.items():
        key = is_given[name], loss.skip_first, loss.masked_ids, loss.drop_truncated
        arms.setdefault(key, []).append(name)
    return [
        _mark(rollouts[key[0]], "the teacher" if key[0] else "the student", names, config, student)
        for key, names in arms.items()
    ]


def _mark(rollout: Rollout, speaker: str, names: list[str], config: Experiment, student: ModelFolder) -> Sampled:
    """Say who has said the responses, and mark the tokens that these arms are trained on."""
    trained_BxT = losses.trained_tokens(config.arms[names[0]], rollout, student.stop_ids)
    return Sampled(f"{speaker} for {', '.join(names)}", rollout, np.asarray(trained_BxT))


def _play_first_step(config: Experiment, inputs: Inputs, mesh: Mesh) -> tuple[Batch, Rollout, Rollout | None]:
    """Play the first step's episodes. Return its batch and the first responses; places without one come last."""
    source = GameEpisodes.of_run(config, inputs, config.has_retention, lambda params: params, mesh)
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
    responses: list[Sampled],
    other: Rollout | None,
    config: Experiment,
    width: int,
    colour: bool,
) -> str:
    views = {"bare": batch.bare, "context": batch.context, "other": batch.other}
    expanded = {
        name: prompts_lib.expand_prefix(view, student.pad_id) for name, view in views.items() if view is not None
    }
    if other is not None:
        retaining = [name for name, loss in config.arms.items() if loss.mu > 0]
        other = _mark(other, "the student", retaining, config, student)
    formatter = batch_text.Formatter(student.tokenizer, width, colour)
    return batch_text.format_batch(formatter, batch.replace(**expanded), student.stop_ids, responses, other)
