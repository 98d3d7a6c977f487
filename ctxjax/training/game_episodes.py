"""A game as the source of a run's responses: every step plays whole episodes with the student."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.pipeline import Drawn, EncodedRows, RetentionRows, shuffle_questions
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.shapes import ViewShape
from ctxjax.data.task import Row
from ctxjax.distill.rollouts import StepInputs
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation.player import Player, Turn, pad_responses
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import Inputs, make_sampling_config
from ctxjax.sharding import put_batch
from ctxjax.types import Batch, Params, Prompts, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class GameEpisodes:
    """The batches of steps (distill.rollouts.RolloutSource): all turns of ``boards`` episodes, ``max_turns`` rows each.

    An episode that ends early leaves rows without a response, which count nowhere. ``retained``: episodes played under
    other contexts, whose turns are the retention rows. ``student``: state -> the student's whole parameters.
    ``note`` gets the number of each step, the first is 1, and the first turns that it begins with.
    """

    player: Player
    student: Callable[[TrainState], Params]
    folder: ModelFolder
    rows: EncodedRows
    retention: RetentionRows | None
    prompt: PromptConfig
    sampling: SamplingConfig
    boards: int
    retained: int
    max_turns: int
    seed: int
    mesh: Mesh
    note: Callable[[int, Drawn], None]

    @classmethod
    def of_run(
        cls,
        config: Experiment,
        inputs: Inputs,
        retains: bool,
        student: Callable[[Any], Params],
        mesh: Mesh,
        note: Callable[[int, Drawn], None] = lambda number, drawn: None,
    ) -> GameEpisodes:
        """Return the source of an arm; ``retains``: whether its loss has retention rows."""
        train, folder = config.train, inputs.student
        most = max(train.batch_size, train.retention_rows)
        return cls(
            player=Player(inputs.task, folder, config.prompt, most, mesh),
            student=student,
            folder=folder,
            rows=inputs.rows,
            retention=inputs.retention if retains else None,
            prompt=config.prompt,
            sampling=make_sampling_config(config.rollout, folder),
            boards=train.batch_size,
            retained=train.retention_rows,
            max_turns=inputs.task.max_turns,
            seed=config.seed,
            mesh=mesh,
            note=note,
        )

    def next(self, state: TrainState, step: int) -> StepInputs:
        boards, others, drawn = self._draw(step)
        self.note(step + 1, drawn)
        params = self.student(state)
        bare = [row._replace(context=None) for row in boards]
        played = self._play(params, bare, step, "rollout", self.rows.prefixes["bare"])
        other = self._play(params, others, step, "retention", self.retention.prefix) if others else None
        return self._assemble(step, boards, played, others, other)

    def examples(self, step: int) -> list[StepInputs]:
        return [self._example]

    @functools.cached_property
    def _example(self) -> StepInputs:
        """Inputs of the first step without responses; those of all steps have their shapes."""
        boards, others, _ = self._draw(0)
        return self._assemble(0, boards, [[] for _ in boards], others, [[] for _ in others])

    def _draw(self, step: int) -> tuple[list[Row], list[Row], Drawn]:
        """Return the boards of a step, those under other contexts, and the first turns of all."""
        order, first = shuffle_questions(len(self.rows.rows), self.seed), step * self.boards
        boards = [self.rows.rows[order[first + i]] for i in range(self.boards)]
        places = range(self.retained) if self.retention else ()
        pairs = [self.retention.draw(self.seed, first + i)[1] for i in places]
        others = [self.retention.find_row(pair) for pair in pairs]
        batch = Batch(*self._pad_views(boards), self._pad_others(others) if others else None, np.arange(self.boards))
        return boards, others, Drawn(batch, pairs)

    def _play(self, params: Params, rows: list[Row], step: int, stream: str, prefix: list[int]) -> list[list[Turn]]:
        key = rng.key_for(jax.random.key(self.seed), step, stream)
        return self.player.play(params, self.sampling, rows, key, step * self.boards, prefix)

    def _assemble(self, step: int, boards, played, others, other) -> StepInputs:
        turns, rows = self._fill(boards, played)
        bare, context = self._pad_views(rows)
        first = step * self.boards * self.max_turns
        numbers = np.asarray([(first + i) % 2**31 for i in range(len(rows))], np.int32)
        other_turns, other_rows = self._fill(others, other) if others else ([], [])
        other_prompts = self._pad_others(other_rows) if others else None
        batch = Batch(bare, context, other_prompts, numbers)
        rollouts: tuple[Rollout | None, ...] = (pad_responses(turns, self.sampling),)
        rollouts += (pad_responses(other_turns, self.sampling) if others else None,)
        return StepInputs(*put_batch((batch, *rollouts), self.mesh))

    def _fill(self, rows: list[Row], played: list[list[Turn]]) -> tuple[list[Turn | None], list[Row]]:
        """Return ``max_turns`` places of every episode: its turns and what they read, under the episode's context. A
        place without a turn has the first prompt."""
        places = [turns + [None] * (self.max_turns - len(turns)) for turns in played]
        read = [
            row._replace(question=turn.row.question) if turn else row
            for row, turns in zip(rows, places)
            for turn in turns
        ]
        return [turn for turns in places for turn in turns], read

    def _pad_views(self, rows: list[Row]) -> tuple[Prompts, Prompts]:
        views = {"bare": [row._replace(context=None) for row in rows], "context": rows}
        return tuple(self._pad(own, self.rows.shapes[v], self.rows.prefixes[v]) for v, own in views.items())

    def _pad_others(self, rows: list[Row]) -> Prompts:
        return self._pad(rows, self.retention.shape, self.retention.prefix)

    def _pad(self, rows: list[Row], shape: ViewShape, prefix: list[int]) -> Prompts:
        tokens = prompts_lib.encode(self.folder.tokenizer, rows, self.prompt)
        return prompts_lib.left_pad(tokens, shape.columns, self.folder.pad_id, prefix)
