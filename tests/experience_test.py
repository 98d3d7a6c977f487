"""Lessons as lines, successive halving, and the journal of an extraction: without a model."""

import itertools
import math

import numpy as np
import pytest

from ctxjax.data.task import LESSON
from ctxjax.evaluation.statistics import mcnemar
from ctxjax.experience import items, selection
from ctxjax.experience.journal import Journal

ONE, TWO, THREE = (f"{LESSON} {text}" for text in ("Walls do not move.", "Go right first.", "Water is deadly."))

# --- Items ---


def test_only_lines_with_a_lesson_are_kept():
    response = f"I played badly.\n\n  {ONE}  \n{LESSON}\n- EXPERIENCE: no\n{TWO}\ttoo\nIt says {LESSON} x\n{THREE}"
    assert items.read_items(response, is_cut=False) == [ONE, f"{TWO} too", THREE]
    assert items.read_items(response, is_cut=True) == [ONE, f"{TWO} too"]
    assert items.read_items(f"<think>\n{ONE}\n</think>\n{TWO}", is_cut=False) == [TWO]
    assert items.read_items("", is_cut=True) == items.read_items("No idea.", is_cut=False) == []


def test_the_oldest_whole_items_are_dropped_at_the_limit():
    def count(text):
        return len(text.split())

    assert [count(item) for item in (ONE, TWO, THREE)] == [7, 6, 6]
    assert items.append([ONE], [TWO, THREE], 19, count) == [ONE, TWO, THREE]
    assert items.append([ONE], [TWO, THREE], 18, count) == [TWO, THREE]
    assert items.append([ONE], [TWO, THREE], 6, count) == [THREE]
    assert items.append([ONE], [TWO, THREE], 5, count) == []
    assert items.append([], [], 5, count) == []


def test_near_duplicates_are_one_lesson_and_the_latest_stays():
    again = f"{LESSON} walls do NOT move"
    assert items.similarity(ONE, again) == 1.0
    assert items.append([ONE, TWO], [again], 100, len) == [TWO, again]
    assert items.remove_near_duplicates([ONE, TWO, again]) == [ONE, TWO]


def test_the_similarity_is_that_of_jaccard():
    # begin-a, a-b, b-c, c-end and begin-a, a-b, b-d, d-end: two of six.
    assert items.similarity("a b c", "A, b d!") == pytest.approx(2 / 6)
    assert items.similarity("up=mi;", "up=ka;") == 1 / 5 and items.similarity("", "!") == 1.0
    legend = "player=c;hole=d;up=mi;ground=a;left=nu;goal=b;right=lo;down=ka;"
    assert items.similarity(legend, legend.replace("player=c", "player=b")) < items.SIMILAR
    long = "Before you push a box into a corner look where it must go because it cannot come back from there"
    assert items.similarity(long, long.replace("cannot", "never")) >= items.SIMILAR


# --- Selection ---


class Pool:
    """Candidates with known accuracies on questions of different difficulty; answers differ by question.

    ``gains`` are logits: a gain of 0.45 is about ten points.
    """

    def __init__(self, seed: int, gains: np.ndarray, questions: int, bare: float = 0.4):
        rng = np.random.default_rng(seed)
        difficulty = rng.normal(0, 1.5, questions) + math.log(bare / (1 - bare))
        p = 1 / (1 + np.exp(-(difficulty + np.concatenate([[0], gains])[:, None])))
        self.accuracy, self.right, self.asked = p.mean(axis=1), rng.random(p.shape) < p, []

    def score(self, pairs):
        self.asked += pairs
        return self.right[tuple(np.transpose(pairs))]


def look_up(right):
    return lambda pairs: right[tuple(np.transpose(pairs))]


def choose(pool, budget, level=0.05):
    candidates, questions = len(pool.right) - 1, pool.right.shape[1]
    return selection.select(candidates, questions, budget, level, pool.score)


def simulate(spread: float, trials: int = 100) -> dict:
    """Choose among 64 candidates whose gains are normal with this standard deviation in logits, at a tenth of the
    budget of asking everybody 900 questions. ``exhaustive``: of the best answers to all questions."""
    spreads, lost, won, found = [], [], 0, {"halving": 0, "exhaustive": 0}
    for seed in range(trials):
        pool = Pool(seed, np.random.default_rng([seed, 1]).normal(0, spread, 64), 900)
        done = choose(pool, 64 * 900 // 10)
        assert len(pool.asked) == len(set(pool.asked)) == done.spent <= 5760
        chosen = {"halving": done.leader, "exhaustive": 1 + np.argmax(pool.right[1:].sum(axis=1))}
        for name, number in chosen.items():
            found[name] += int(np.sum(pool.accuracy[1:] > pool.accuracy[number]) < 3)
        spreads.append(pool.accuracy[1:].std())
        lost.append(pool.accuracy[1:].max() - pool.accuracy[done.leader])
        won += done.winner == done.leader
    points = {"spread": spreads, "lost": lost}
    return found | {"beats_empty": won} | {name: round(100 * float(np.mean(own)), 1) for name, own in points.items()}


@pytest.mark.slow
def test_a_tenth_of_the_budget_finds_one_of_the_best_three_of_64():
    """The numbers of docs/experience.md."""
    assert {spread: simulate(spread) for spread in (0.25, 0.5, 0.75)} == {
        0.25: {"halving": 75, "exhaustive": 87, "beats_empty": 63, "spread": 4.3, "lost": 1.2},
        0.5: {"halving": 93, "exhaustive": 100, "beats_empty": 99, "spread": 8.4, "lost": 0.5},
        0.75: {"halving": 99, "exhaustive": 100, "beats_empty": 100, "spread": 12.3, "lost": 0.1},
    }


def test_without_any_gain_the_empty_context_wins():
    """The best of 64 equal candidates looks better than it is; questions of its own keep the test honest."""
    wrong, naive = 0, 0
    for seed in range(200):
        pool = Pool(seed, np.zeros(64), 200)
        done = choose(pool, 64 * 200 // 5)
        wrong += done.winner != selection.EMPTY
        asked = done.rounds[-1].asked
        naive += mcnemar(pool.right[done.leader, :asked], pool.right[0, :asked]) < 0.05
    assert wrong <= 10 < naive, (wrong, naive)


def test_the_rounds_by_hand():
    """Four candidates: two rounds, then the test on the last quarter of 16 questions."""
    right = np.zeros((5, 16), bool)
    right[2, :] = right[3, ::2] = right[4, :3] = True
    asked = []

    def score(pairs):
        asked.append(pairs)
        return look_up(right)(pairs)

    done = selection.select(4, 16, 40, 0.2, score)
    # 32 answers are left for two rounds: 16 // 5 questions, then 17 // 3.
    first = selection.Round([0, 1, 2, 3, 4], 3, [0, 0, 1, 2 / 3, 1], [2, 4])
    assert done.rounds == [first, selection.Round([0, 2, 4], 8, [0, 1, 3 / 8], [2])]
    places = (range(5), range(3)), ((0, 2, 4), range(3, 8)), ((2, 0), range(12, 16))
    assert asked == [list(itertools.product(*place)) for place in places]
    assert (done.winner, done.leader, done.p, done.gain, done.spent) == (2, 2, 0.125, 1.0, 15 + 15 + 8)
    assert selection.select(4, 16, 40, 0.05, score).winner == selection.EMPTY  # p = 1/8


def test_all_worse_than_the_empty_context_and_a_single_candidate():
    right = np.zeros((4, 20), bool)
    right[0, ::2] = True
    done = selection.select(3, 20, 60, 0.05, look_up(right))
    assert (done.winner, done.p, done.gain) == (selection.EMPTY, None, None) and len(done.rounds) == 2
    right[1] = True
    done = selection.select(1, 20, 40, 0.3, look_up(right))
    assert (done.winner, done.leader, len(done.rounds), done.spent) == (1, 1, 1, 40)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((8, 3, 100), "3 questions are too few to choose among 8 candidates; a choice needs at least 4"),
        ((8, 20, 26), "a budget of 26 answers is too small for 8 candidates .* at least 27, of which 10"),
    ],
)
def test_too_little_to_choose_from(numbers, message):
    with pytest.raises(ValueError, match=message):
        selection.select(*numbers, 0.05, look_up(np.zeros((9, 20))))


def test_a_test_that_no_context_could_win_is_refused():
    """Five questions, all of them right and none without a context: p = 2 / 32."""
    assert [mcnemar(np.ones(n, bool), np.zeros(n, bool)) for n in (5, 6)] == [0.0625, 0.03125]
    with pytest.raises(ValueError, match="5 are for the test .* below 0.0625, and extract.level = 0.05; .* least 22 "):
        selection.check_level(20, 0.05)
    selection.check_level(22, 0.05)
    selection.check_level(20, 0.1)


@pytest.mark.parametrize("candidates", [1, 2, 3, 5, 8, 64])
def test_no_budget_is_exceeded(candidates):
    for questions in (12, 50):
        least = selection.smallest_budget(candidates, questions)
        for budget in (least, least + 7, 10 * least):
            pool = Pool(0, np.linspace(-1, 1, candidates), questions)
            done = choose(pool, budget)
            assert len(pool.asked) == len(set(pool.asked)) == done.spent <= budget
            assert all(round.contestants[0] == selection.EMPTY for round in done.rounds)


# --- The journal ---


def test_a_journal_goes_on_where_it_was_killed(tmp_path):
    path, calls = tmp_path / "journal.jsonl", []

    def run(steps):
        journal = Journal(path)
        return [journal.do(name, lambda name=name: calls.append(name) or {"value": len(name)}) for name in steps]

    whole = run(["a", "bb", "ccc"])
    text = path.read_bytes()
    assert [line["value"] for line in whole] == [1, 2, 3] and calls == ["a", "bb", "ccc"]
    for cut in range(len(text)):
        path.write_bytes(text[:cut])
        calls.clear()
        assert run(["a", "bb", "ccc"]) == whole and path.read_bytes() == text
        assert calls == ["a", "bb", "ccc"][text[:cut].count(b"\n") :]
    with pytest.raises(ValueError, match="has step 'a' where 'other' is due"):
        Journal(path).do("other", dict)
    path.write_text("[\n")
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        Journal(path)
