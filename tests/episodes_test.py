"""Episodes of one and of several turns, graded."""

import numpy as np
import pytest

from ctxjax.data.grading.grade import Grade
from ctxjax.data.task import Row
from ctxjax.evaluation.episodes import Episode, grade_episodes, single_turn_episodes
from ctxjax.types import Rollout

WORDS = ["<end>", "up", "left", "goal"]
ROWS = [Row(name, f"{name}?", None, "goal") for name in ("a", "b")]


@pytest.fixture(autouse=True)
def decode(monkeypatch):
    """Tokens are WORDS. tests/control_tokens_test.py decodes with tokenizers."""

    def join(tokenizer, token_lists, stop_ids):
        return [" ".join(WORDS[token] for token in ids if token not in stop_ids) for ids in token_lists]

    monkeypatch.setattr("ctxjax.data.responses.decode", join)


class LastWord:
    def grade(self, response, reference):
        word = response.split()[-1]
        return Grade(word, word == reference)


def grade(episodes):
    return grade_episodes(LastWord(), None, (0,), episodes, "bare")


def test_responses_become_episodes_of_one_turn_a_rows_samples_one_after_the_other():
    tokens = np.array([[1, 0, 9], [2, 3, 0], [3, 9, 9], [1, 1, 1]])
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
    episodes = single_turn_episodes(ROWS, Rollout(tokens, mask, np.zeros((4, 3))), 2, [False, True])
    assert [(e.row.id, e.sample, [list(ids) for ids in e.turns], e.opened) for e in episodes] == [
        ("a", 0, [[1, 0]], False), ("a", 1, [[2, 3, 0]], False), ("b", 0, [[3]], True), ("b", 1, [[1, 1, 1]], True),
    ]  # fmt: skip
    items = grade(episodes)
    assert [(i["id"], i["sample"], i["text"], i["length"]) for i in items] == [
        ("a", 0, "up", 2), ("a", 1, "left goal", 3), ("b", 0, "<think>goal", 1), ("b", 1, "<think>up up up", 3),
    ]  # fmt: skip
    assert [i["correct"] for i in items] == [False, True, False, False]
    assert [i["truncated"] for i in items] == [False, False, True, True]


def test_an_episode_of_several_turns_is_one_item_with_all_its_tokens():
    turns = tuple(np.array(ids) for ids in ([1, 0], [2, 2], [3, 0]))
    (item,) = grade([Episode(ROWS[0], 0, turns)])
    assert (item["text"], item["length"], item["truncated"]) == ("up\n\nleft left\n\ngoal", 6, True)
    assert item["correct"] and item["parsed"] == "goal"


def test_an_item_has_the_group_of_its_row_or_is_one_of_its_own():
    episodes = [Episode(row, 0, (np.array([3, 0]),)) for row in ROWS]
    assert not any("group" in item for item in grade(episodes))

    class Grouped(LastWord):
        def group(self, row):
            return {"a": "first", "b": ""}[row.id]

    items = grade_episodes(Grouped(), None, (0,), episodes, "bare")
    assert [item["group"] for item in items] == ["first", "b"]
