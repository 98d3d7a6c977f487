"""What an evaluation grades: episodes of one or more turns.

A single-turn question is an episode of one turn. A game is an episode of several, and everything after it (grading,
harm, report) counts boards instead of questions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ctxjax.data import responses
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.reasoning import OPEN_REASONING
from ctxjax.data.task import GameTask, GroupedTask, Row, Task, describe_earlier, grade_response
from ctxjax.types import Rollout

TURN_BREAK = "\n\n"  # between the texts of an episode's turns


class Episode(NamedTuple):
    """Sample number ``sample`` of ``row``. ``turns``: the token ids of every response, end tokens included.
    ``opened``: the prompts end inside <think> (prompts.opens_reasoning)."""

    row: Row
    sample: int
    turns: tuple[np.ndarray, ...]
    opened: bool = False


def single_turn_episodes(rows: list[Row], rollout: Rollout, samples: int, opened: list[bool]) -> list[Episode]:
    """One episode for every response of ``rollout`` [n * samples, T], a row's samples one after the other.

    ``opened``: parallel to ``rows``.
    """
    turns = (tokens[mask] for tokens, mask in zip(rollout.tokens_BxT, rollout.mask_BxT))
    return [Episode(rows[i // samples], i % samples, (ids,), opened[i // samples]) for i, ids in enumerate(turns)]


def grade_episodes(task: Task, tokenizer, stop_ids: tuple[int, ...], episodes: list[Episode], view: str) -> list[dict]:
    """One item per episode, as items.jsonl has it. ``length``: tokens of all ``turns``. ``truncated``: a turn was cut.

    A game grades its episode, any other task the text.

    ``group``: of the row (data.task.GroupedTask), else the row itself; without groups there is none.

    If the prompts end inside <think>, each turn's text begins with it: graders then know that it begins with reasoning.
    """
    texts = iter(responses.decode(tokenizer, (ids for episode in episodes for ids in episode.turns), stop_ids))
    items, is_grouped = [], isinstance(task, GroupedTask)
    for row, sample, turns, opened in episodes:
        said = [f"{OPEN_REASONING * opened}{next(texts)}" for _ in turns]
        text = TURN_BREAK.join(said)
        grade = grade_turns(task, said, row)
        items.append({
            "id": row.id, "view": view, "sample": sample, "question": row.question, "context": row.context,
            "reference": str(row.check or row.reference), "text": text, **grade._asdict(),
            "turns": len(turns), "length": sum(len(ids) for ids in turns),
            "truncated": any(int(ids[-1]) not in stop_ids for ids in turns), **describe_earlier(row),
            **({"group": task.group(row) or row.id} if is_grouped else {}),
        })  # fmt: skip
    return items


def grade_turns(task: Task, said: list[str], row: Row) -> Grade:
    """Grade the responses of an episode: a game by playing them, any other task by their text."""
    if isinstance(task, GameTask):
        return task.play(row, said)
    return grade_response(task, TURN_BREAK.join(said), row)
