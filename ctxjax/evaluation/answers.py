"""How a model answers a split in one view: all questions at once, or episodes of a game turn by turn."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation.episodes import Episode, single_turn_episodes
from ctxjax.evaluation.player import Player, pad_responses
from ctxjax.evaluation.split import Split
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.types import Params, Prompts, Rollout


class Answers(NamedTuple):
    """``episodes``: all samples of a row one after the other. ``rollout``: the responses [n, T] of every row's first
    sample, one row for each turn. ``turns``: for each of these (the number of its row, what was read)."""

    episodes: list[Episode]
    rollout: Rollout
    turns: list[tuple[int, Row]]


class Asker(Protocol):
    def answer(self, params: Params, view: str, sampling: SamplingConfig, key: jax.Array, what: str = "") -> Answers:
        """Answer every row of a view; samples are drawn with ``key``. ``what``: of the progress bar; "" for none."""

    def prompts(self, answers: Answers) -> tuple[Prompts, Prompts, Prompts]:
        """Return what came before the responses of the bare view's ``answers``: without the context, with it, and under
        an unrelated context (the control of the hidden-state comparison)."""


class Questions:
    """Episodes of one turn."""

    def __init__(self, split: Split, folder: ModelFolder, mesh: Mesh):
        self._split, self._folder, self._mesh = split, folder, mesh
        self._prompts = {
            v: prompts_lib.left_pad(lists, split.columns[v], folder.pad_id, split.prefixes[v])
            for v, lists in split.tokens.items()
        }

    def answer(self, params: Params, view: str, sampling: SamplingConfig, key: jax.Array, what: str = "") -> Answers:
        prompts, split, model = self._prompts[view], self._split, self._folder.config
        rollout = decoding.decode(params, model, sampling, prompts, key, split.batch, self._mesh, what=what)
        episodes = single_turn_episodes(split.rows[view], rollout, sampling.samples, split.opened[view])
        first = jax.tree.map(lambda array: array[:: sampling.samples], rollout)
        return Answers(episodes, first, list(enumerate(split.rows[view])))

    def prompts(self, answers: Answers) -> tuple[Prompts, Prompts, Prompts]:
        return self._prompts["bare"], self._prompts["context"], self._prompts[_control_view(self._split)]


def _control_view(split: Split) -> str:
    return next(view for view in ("unrelated", "other", "empty") if view in split.rows)


class Games:
    """Episodes of several turns. The views are compared along all turns of the bare view."""

    def __init__(self, split: Split, folder: ModelFolder, prompt: PromptConfig, mesh: Mesh):
        self._split, self._folder, self._prompt = split, folder, prompt
        self._player = Player(split.task, folder, prompt, split.batch, mesh)

    def answer(self, params: Params, view: str, sampling: SamplingConfig, key: jax.Array, what: str = "") -> Answers:
        samples, rows = sampling.samples, self._split.rows[view]
        repeated = [row for row in rows for _ in range(samples)]
        one = dataclasses.replace(sampling, samples=1)
        played = self._player.play(params, one, repeated, key, prefix=self._split.prefixes[view], what=what)
        episodes = [
            Episode(row, i % samples, tuple(turn.tokens for turn in turns), turns[0].opened)
            for i, (row, turns) in enumerate(zip(repeated, played))
        ]
        first = [(i, turn) for i, turns in enumerate(played[::samples]) for turn in turns]
        return Answers(episodes, pad_responses([turn for _, turn in first], one), [(i, t.row) for i, t in first])

    def prompts(self, answers: Answers) -> tuple[Prompts, Prompts, Prompts]:
        return tuple(self._read(answers, view) for view in ("bare", "context", _control_view(self._split)))

    def _read(self, answers: Answers, view: str) -> Prompts:
        """Return what the bare view's players read, with the contexts of ``view``.

        In a view whose first turns look different, such as that of the control, the shared prefix may differ.
        """
        rows = [row._replace(context=self._split.rows[view][i].context) for i, row in answers.turns]
        tokens = prompts_lib.encode(self._folder.tokenizer, rows, self._prompt)
        prefix, columns = self._split.prefixes[view], self._split.columns[view]
        if any(ids[: len(prefix)] != prefix for ids in tokens):
            prefix, columns = [], len(prefix) + columns
        return prompts_lib.left_pad(tokens, columns, self._folder.pad_id, prefix)
