"""Choose the best of many contexts with few questions: successive halving, and a test against no context at all.

All contestants answer the same questions. After every round the better half goes on and answers further ones; each
round costs about the same. The leader of the last round is then compared with the empty context on questions that took
no part in the choice: on those that did, the best of many looks better than it is.
"""

from __future__ import annotations

from collections.abc import Callable
import itertools
from typing import NamedTuple

import numpy as np

from ctxjax.evaluation.statistics import mcnemar

EMPTY = 0  # the number of the empty context; it is in every round
TEST_SHARE = 0.25  # of the questions: for the test alone

# Pairs of a candidate and a question -> whether each was answered rightly, [n] bool.
Score = Callable[[list[tuple[int, int]]], np.ndarray]


class Round(NamedTuple):
    """``contestants``: candidates, EMPTY first. All have answered the first ``asked`` questions. ``accuracy``: parallel
    to ``contestants``. ``kept``: those that go on."""

    contestants: list[int]
    asked: int
    accuracy: list[float]
    kept: list[int]


class Selection(NamedTuple):
    """``winner``: EMPTY if no context is better. ``leader``: the best candidate before the test. ``p``: of the test;
    None if the leader was no better than the empty context, so that there was nothing to test. ``gain``: the leader's
    accuracy minus the empty context's on the test's questions, of which there are ``tested``. ``spent``: answers that
    were asked for."""

    winner: int
    leader: int
    p: float | None
    gain: float | None
    tested: int
    rounds: list[Round]
    spent: int


def count_rounds(candidates: int) -> int:
    """Return the number of rounds until one of ``candidates``, without EMPTY, is left."""
    return max((candidates - 1).bit_length(), 1)


def count_test_questions(questions: int) -> int:
    """Return how many of the questions, the last ones, are for the test alone."""
    return round(questions * TEST_SHARE)


def smallest_budget(candidates: int, questions: int) -> int:
    """Return the answers that a choice needs: one question a round for everybody, and the test."""
    sizes = [candidates]
    while len(sizes) < count_rounds(candidates):
        sizes.append(-(-sizes[-1] // 2))
    return sum(size + 1 for size in sizes) + 2 * count_test_questions(questions)


def check_sizes(candidates: int, questions: int, budget: int) -> None:
    """Raise ValueError if the questions or the budget are too few for a choice among the candidates."""
    held, least = count_test_questions(questions), count_rounds(candidates)
    if held < 1 or questions - held < least:
        raise ValueError(
            f"{questions} questions are too few to choose among {candidates} candidates; a choice needs at least "
            f"{-(-4 * max(least, 2) // 3)}, of which a quarter is for the test alone"
        )
    if budget < smallest_budget(candidates, questions):
        raise ValueError(
            f"a budget of {budget} answers is too small for {candidates} candidates and {questions} questions; a "
            f"choice needs at least {smallest_budget(candidates, questions)}, of which {2 * held} are for the test"
        )


def check_level(questions: int, level: float) -> None:
    """Raise ValueError if the test has so few questions that no context could win."""

    def smallest_p(questions: int) -> float:
        return 2 * 0.5 ** count_test_questions(questions)  # all of them right, and none without a context

    if smallest_p(questions) >= level:
        least = next(n for n in itertools.count(questions) if smallest_p(n) < level)
        raise ValueError(
            f"of {questions} dev questions {count_test_questions(questions)} are for the test against the empty "
            f"context, whose p-value cannot be below {smallest_p(questions):.3g}, and extract.level = {level:g}; give "
            f"at least {least} dev questions, or raise extract.level"
        )


def select(candidates: int, questions: int, budget: int, level: float, score: Score) -> Selection:
    """Choose among candidates 1 to ``candidates`` and EMPTY with at most ``budget`` answers.

    The result is a function of the arguments alone. Candidates with equal accuracy are ranked by their number. The
    leader wins if it is better than EMPTY and the p-value of McNemar's exact test, two-sided, is below ``level``.
    Raises ValueError if the questions or the budget are too few.
    """
    check_sizes(candidates, questions, budget)
    held, spent, least = count_test_questions(questions), 0, count_rounds(candidates)
    contestants, rounds, asked = list(range(1, candidates + 1)), [], 0
    right = dict.fromkeys([EMPTY, *contestants], 0)
    for left in range(least, 0, -1):
        share = (budget - 2 * held - spent) // left
        until = min(asked + max(share // (len(contestants) + 1), 1), questions - held - (left - 1))
        answers = _ask(score, [EMPTY, *contestants], range(asked, until))
        for number, own in answers.items():
            right[number] += int(own.sum())
        spent += (until - asked) * (len(contestants) + 1)
        asked = until
        ranked = sorted(contestants, key=lambda number: (-right[number], number))
        kept = sorted(ranked[: -(-len(ranked) // 2)])
        accuracy = [right[number] / asked for number in (EMPTY, *contestants)]
        rounds.append(Round([EMPTY, *contestants], asked, accuracy, kept))
        contestants = kept
    (leader,) = contestants
    if right[leader] <= right[EMPTY]:
        return Selection(EMPTY, leader, None, None, 0, rounds, spent)
    ours, empty = _ask(score, [leader, EMPTY], range(questions - held, questions)).values()
    p, gain = mcnemar(ours, empty), float(np.mean(ours) - np.mean(empty))
    winner = leader if gain > 0 and p < level else EMPTY
    return Selection(winner, leader, p, gain, held, rounds, spent + 2 * held)


def _ask(score: Score, numbers: list[int], questions: range) -> dict[int, np.ndarray]:
    """Return whether each candidate answers each question rightly, [n] bool by candidate."""
    right = np.asarray(score([(number, question) for number in numbers for question in questions]), bool)
    return dict(zip(numbers, right.reshape(len(numbers), len(questions))))
