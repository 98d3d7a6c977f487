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
from ctxjax.evaluation.split import Split, have_same_questions
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
        """Return what came before the responses of the bare view's ``answers``: without the context, with it, and with
        the context of the control view (of the hidden-state comparison)."""


class Questions:
    """Episodes of one turn."""

    def __init__(self, split: Split, folder: ModelFolder, prompt: PromptConfig, mesh: Mesh):
        self._split, self._folder, self._prompt, self._mesh = split, folder, prompt, mesh
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
        split, view = self._split, _control_view(self._split)
        control = self._prompts[view]
        if not have_same_questions(split.rows[view], [row for _, row in answers.turns]):
            control = _read(answers, view, split, self._folder, self._prompt)
        return self._prompts["bare"], self._prompts["context"], control


def _control_view(split: Split) -> str:
    """Return the view whose contexts are the control: an unrelated one if the task has one, else others, else none."""
    return next(view for view in ("unrelated", "other", "empty") if view in split.rows)


def _read(answers: Answers, view: str, split: Split, folder: ModelFolder, prompt: PromptConfig) -> Prompts:
    """Return what the bare view read, with the contexts of ``view``.

    In a view whose first turns look different, such as that of the control, the shared prefix may differ.
    """
    rows = [row._replace(context=split.rows[view][i].context) for i, row in answers.turns]
    tokens = prompts_lib.encode(folder.tokenizer, rows, prompt)
    prefix, columns = split.prefixes[view], split.columns[view]
    if any(ids[: len(prefix)] != prefix for ids in tokens):
        prefix, columns = [], len(prefix) + columns
    columns = max(columns, max(map(len, tokens)) - len(prefix))
    return prompts_lib.left_pad(tokens, columns, folder.pad_id, prefix)


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
        views = ("bare", "context", _control_view(self._split))
        return tuple(_read(answers, view, self._split, self._folder, self._prompt) for view in views)
