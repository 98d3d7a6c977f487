"""Episodes of one and of several turns, graded."""

import numpy as np

from ctxjax.data.grading.grade import Grade
from ctxjax.data.task import Row
from ctxjax.evaluation.episodes import Episode, grade_episodes, single_turn_episodes
from ctxjax.types import Rollout

WORDS = ["<end>", "up", "left", "goal"]
ROWS = [Row(name, f"{name}?", None, "goal") for name in ("a", "b")]


class Tokenizer:
    def batch_decode(self, lists, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(WORDS[i] for i in ids if i) for ids in lists]


class LastWord:
    def grade(self, response, reference):
        word = response.split()[-1]
        return Grade(word, word == reference)


def grade(episodes):
    return grade_episodes(LastWord(), Tokenizer(), (0,), episodes, "bare")


def test_responses_become_episodes_of_one_turn_a_rows_samples_one_after_the_other():
    tokens = np.array([[1, 0, 9], [2, 3, 0], [3, 9, 9], [1, 1, 1]])
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
    episodes = single_turn_episodes(ROWS, Rollout(tokens, mask, np.zeros((4, 3))), samples=2)
    assert [(e.row.id, e.sample, [list(ids) for ids in e.turns]) for e in episodes] == [
        ("a", 0, [[1, 0]]), ("a", 1, [[2, 3, 0]]), ("b", 0, [[3]]), ("b", 1, [[1, 1, 1]]),
    ]  # fmt: skip
    items = grade(episodes)
    assert [(i["id"], i["sample"], i["text"], i["length"]) for i in items] == [
        ("a", 0, "up", 2), ("a", 1, "left goal", 3), ("b", 0, "goal", 1), ("b", 1, "up up up", 3),
    ]  # fmt: skip
    assert [i["correct"] for i in items] == [False, True, True, False]
    assert [i["truncated"] for i in items] == [False, False, True, True]


def test_an_episode_of_several_turns_is_one_item_with_all_its_tokens():
    turns = tuple(np.array(ids) for ids in ([1, 0], [2, 2], [3, 0]))
    (item,) = grade([Episode(ROWS[0], 0, turns)])
    assert (item["text"], item["length"], item["truncated"]) == ("up\n\nleft left\n\ngoal", 6, True)
    assert item["correct"] and item["parsed"] == "goal"
