"""Where the responses of a training step come from.

    Questions        single-turn questions: the step's own program samples y, and y' under the other contexts
    TeacherSamples   the same questions; off-policy steps get the frozen teacher's responses, sampled before the run

A game is a third source (training/game_episodes.py): it plays episodes on the host with the student's parameters, and
returns the turns as rows of batches together with their responses. ``train_step.update_step`` serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import itertools
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from ctxjax.sharding import put_batch
from ctxjax.types import Batch, Rollout, TrainState


class StepInputs(NamedTuple):
    """What a step reads besides the state, on the mesh. ``rollout`` is y and ``other_rollout`` is y'; None: the step's
    program samples it from ``batch``."""

    batch: Batch
    rollout: Rollout | None = None
    other_rollout: Rollout | None = None


class RolloutSource(Protocol):
    def next(self, state: TrainState, step: int) -> StepInputs:
        """The inputs of ``step`` (the first is 0), for the student in ``state``. Steps are asked for in order."""

    def examples(self, step: int) -> Iterable[StepInputs]:
        """Inputs of every shape that ``next`` may return at ``step``, so that programs are compiled before training."""


class Questions:
    """Single-turn questions from an iterator of host batches."""

    def __init__(self, batches: Iterator[Batch], mesh: Mesh):
        self._mesh = mesh
        self._first = put_batch(next(batches), mesh)
        self._batches = itertools.chain([self._first], (put_batch(batch, mesh) for batch in batches))

    def next(self, state: TrainState, step: int) -> StepInputs:
        return StepInputs(next(self._batches))

    def examples(self, step: int) -> list[StepInputs]:
        return [StepInputs(self._first)]


class TeacherSamples:
    """Wrap ``questions``: steps in ``samples`` (step -> Rollout, on the host) use the teacher's responses, others are
    sampled by the step's program."""

    def __init__(self, questions: Questions, samples: dict[int, Rollout], mesh: Mesh):
        self._questions, self._samples, self._mesh = questions, samples, mesh

    def next(self, state: TrainState, step: int) -> StepInputs:
        return self._with_samples(self._questions.next(state, step), step)

    def examples(self, step: int) -> list[StepInputs]:
        return [self._with_samples(inputs, step) for inputs in self._questions.examples(step)]

    def _with_samples(self, inputs: StepInputs, step: int) -> StepInputs:
        if step not in self._samples:
            return inputs
        return inputs._replace(rollout=put_batch(self._samples[step], self._mesh))
