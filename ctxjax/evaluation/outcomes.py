"""What is measured of a model in each view, and the values that metrics.py makes metrics of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

import numpy as np

from ctxjax.evaluation.statistics import (
    Rate,
    bootstrap_ratio,
    difference_interval,
    mcnemar,
    mean_by_question,
    rate,
    share,
    sign_flip_p,
)


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What happened to n questions in one view: arrays [n * samples], all samples of a question in a row.

    ``length`` is in tokens, end token included, of all ``turns`` (None: one each). ``lenient``: whether the answer is
    right if the required format is not demanded; None if the task has no such reader. ``reasons``: why no answer could
    be read from a response, None if one could. ``contexts``: the context of each response, if the contexts were drawn
    from a pool and questions share them; then the outcomes of a context, and not only those of a question, are not
    independent. ``groups``: the group of each response's question, if the task has groups (data.task.GroupedTask).
    """

    correct: np.ndarray
    parsed: np.ndarray
    truncated: np.ndarray
    length: np.ndarray
    lenient: np.ndarray | None = None
    reasons: list[str | None] = dataclasses.field(default_factory=list)
    samples: int = 1
    contexts: list[str] | None = None
    turns: np.ndarray | None = None
    groups: list[str] | None = None

    @property
    def clusters(self) -> np.ndarray:
        """The number of each outcome's cluster, [N]: of its context, group or question."""
        shared = self.groups if self.contexts is None else self.contexts
        if shared is None:
            return np.arange(len(self.correct)) // self.samples
        return np.unique(shared, return_inverse=True)[1]

    @property
    def crossed_clusters(self) -> np.ndarray:
        """``clusters`` or, if outcomes share both contexts and groups, the numbers of both, [2, N]."""
        if self.contexts is None or self.groups is None:
            return self.clusters
        return np.stack([self.clusters, np.unique(self.groups, return_inverse=True)[1]])

    def sum_outcomes(self, values: np.ndarray) -> np.ndarray:
        """Return the sums [K] of a value of each outcome over the clusters."""
        return np.bincount(self.clusters, values)

    def sum_clusters(self, values_n: np.ndarray) -> np.ndarray:
        """Return the sums [K] of a value of each question [n] over the clusters."""
        return np.bincount(self.clusters[:: self.samples], values_n)


MOST_CONTEXTS = 100  # in ``accuracy_by_context``: with more, each has few questions


class Comparison(NamedTuple):
    """The two views compared along the same n responses, of which ``mask_nxT`` marks the tokens.

    ``kl_nxT`` is KL(q_x || q_c) in nats. ``cosines`` has hidden-state cosines [N+1, n, T] by layer, index 0 the
    embedding: "cosine" of the bare and the context view, "control" of the bare view and one under an unrelated context,
    "centred" as "cosine" after subtracting each view's mean state. ``cka``: linear CKA [N+1] of the states of the bare
    view with those of the context view, "context", and of one under an unrelated context, "control".
    """

    kl_nxT: np.ndarray
    cosines: dict[str, np.ndarray]
    mask_nxT: np.ndarray
    cka: dict[str, np.ndarray] = {}


# --- One view ---


def count_questions(view: Outcomes) -> int:
    return len(view.correct) // view.samples


def accuracy(view: Outcomes) -> Rate:
    return rate(view.correct, view.crossed_clusters)


def accuracy_by_context(view: Outcomes) -> dict[str, list[float]] | None:
    """Return [accuracy, number of responses] by context, the lowest accuracy first; None if there are too many."""
    if view.contexts is None or len(set(view.contexts)) > MOST_CONTEXTS:
        return None
    correct: dict[str, list[bool]] = {}
    for context, outcome in zip(view.contexts, view.correct):
        correct.setdefault(context, []).append(bool(outcome))
    rows = sorted((float(np.mean(values)), len(values), context) for context, values in correct.items())
    return {context: [value, count] for value, count, context in rows}


def lenient_accuracy(view: Outcomes) -> Rate | None:
    return None if view.lenient is None else rate(view.lenient, view.crossed_clusters)


def mean_length(view: Outcomes) -> float:
    return float(np.mean(view.length))


def mean_turns(view: Outcomes) -> float | None:
    """None if every episode has one turn."""
    return None if view.turns is None or np.all(view.turns == 1) else float(np.mean(view.turns))


def truncated_share(view: Outcomes) -> float:
    return float(np.mean(view.truncated))


def readable_share(view: Outcomes) -> float:
    return float(np.mean(view.parsed))


def count_reasons(view: Outcomes) -> dict[str, int]:
    """Return how many responses had no readable answer for each reason, the most frequent first."""
    return dict(Counter(reason for reason in view.reasons if reason).most_common())


# --- Both views of the same questions ---


def gap(bare: Outcomes, context: Outcomes) -> float:
    return float(np.mean(context.correct) - np.mean(bare.correct))


def harm(bare: Outcomes, context: Outcomes) -> Rate:
    return rate(~context.correct, bare.clusters, bare.correct)


def benefit(bare: Outcomes, context: Outcomes) -> Rate:
    return rate(context.correct, bare.clusters, ~bare.correct)


def both_correct(bare: Outcomes, context: Outcomes) -> Rate:
    return rate(bare.correct & context.correct, bare.clusters)


def length_change(bare: Outcomes, context: Outcomes) -> float:
    return float(np.mean(context.length) / np.mean(bare.length) - 1)


def flips(bare: Outcomes, context: Outcomes) -> dict[str, int]:
    x, xc = bare.correct, context.correct
    return {
        "right_right": int(np.sum(x & xc)),
        "right_wrong": int(np.sum(x & ~xc)),
        "wrong_right": int(np.sum(~x & xc)),
        "wrong_wrong": int(np.sum(~x & ~xc)),
    }


def count_samples(bare: Outcomes, context: Outcomes) -> int | None:
    """None for one sample a question."""
    return bare.samples if bare.samples > 1 else None


def harm_floor(bare: Outcomes, context: Outcomes, resamples: int) -> Rate | None:
    """None for one sample a question, from which p (1 - p) cannot be estimated."""
    if bare.samples == 1:
        return None
    right_n = mean_by_question(bare.correct, bare.samples)
    return bootstrap_ratio(*map(bare.sum_clusters, (_disagreement(bare), right_n)), resamples)


def excess_harm(bare: Outcomes, context: Outcomes, resamples: int) -> Rate | None:
    """None for one sample a question, as for ``harm_floor``."""
    if bare.samples == 1:
        return None
    right_n, harmed_n = (mean_by_question(v, bare.samples) for v in (bare.correct, bare.correct & ~context.correct))
    return bootstrap_ratio(*map(bare.sum_clusters, (harmed_n - _disagreement(bare), right_n)), resamples)


def _disagreement(bare: Outcomes) -> np.ndarray:
    """Return p (1 - p) of each question [n], estimated without bias: p is the probability of a right answer."""
    p_n = mean_by_question(bare.correct, bare.samples)
    return bare.samples / (bare.samples - 1) * p_n * (1 - p_n)


def mcnemar_p(bare: Outcomes, context: Outcomes) -> float | None:
    """None for several samples a question, and for groups of questions: the test assumes independent pairs."""
    return mcnemar(bare.correct, context.correct) if bare.samples == 1 and bare.groups is None else None


def regime(bare: Outcomes, context: Outcomes, resamples: int) -> str:
    """Return the sign of a gap that is significant at 5 %, in words.

    The test is McNemar's or, with several samples a question or groups of questions, its like for the accuracies of
    these (statistics.sign_flip_p).
    """
    p_value = mcnemar_p(bare, context)
    if p_value is None:
        bare_n, context_n = (mean_by_question(view.correct, view.samples) for view in (bare, context))
        p_value = sign_flip_p(bare.sum_clusters(context_n - bare_n), resamples)
    if p_value >= 0.05:
        return "agreement"
    return "perturbation" if gap(bare, context) < 0 else "scaffold"


# --- Along the same responses ---


def view_kl(comparison: Comparison) -> float:
    kl, mask = comparison.kl_nxT, comparison.mask_nxT
    return float(np.where(mask, kl, 0.0).sum() / max(mask.sum(), 1))


def view_kl_by_position(comparison: Comparison) -> list[float | None]:
    """None at a position that no response reaches."""
    total_T = np.where(comparison.mask_nxT, comparison.kl_nxT, 0.0).sum(axis=0)
    reached_T = comparison.mask_nxT.sum(axis=0)
    return [float(total / count) if count else None for total, count in zip(total_T, reached_T)]


def mean_cosine(comparison: Comparison) -> list[float]:
    return _tokens(comparison, "cosine").mean(axis=1).tolist()


def fifth_percentile_of_cosine(comparison: Comparison) -> list[float]:
    return np.percentile(_tokens(comparison, "cosine"), 5, axis=1).tolist()


def mean_control_cosine(comparison: Comparison) -> list[float]:
    return _tokens(comparison, "control").mean(axis=1).tolist()


def mean_centred_cosine(comparison: Comparison) -> list[float]:
    return _tokens(comparison, "centred").mean(axis=1).tolist()


def context_cka(comparison: Comparison) -> list[float | None] | None:
    return _list_cka(comparison, "context")


def control_cka(comparison: Comparison) -> list[float | None] | None:
    return _list_cka(comparison, "control")


def _list_cka(comparison: Comparison, kind: str) -> list[float | None] | None:
    """Return linear CKA by layer, None for a layer in which nothing varies; None if it was not computed."""
    if kind not in comparison.cka:
        return None
    return [float(value) if np.isfinite(value) else None for value in comparison.cka[kind]]


def _tokens(comparison: Comparison, kind: str) -> np.ndarray:
    """Return one kind of cosine for all response tokens, [N+1, tokens]."""
    return comparison.cosines[kind][:, comparison.mask_nxT]


# --- Two arms ---


class Learning(NamedTuple):
    """Acc_xc on dev while an arm is trained: of the base, and at each evaluation of the arm."""

    base: float
    accuracies: tuple[float, ...]


def lowest_accuracy(learning: Learning) -> float | None:
    """Return the lowest accuracy of the arm; None if it was not evaluated while it was trained."""
    return min(learning.accuracies, default=None)


def context_loss(learning: Learning) -> float | None:
    """Return how far the arm's lowest accuracy lies below the base's, 0 if it does not."""
    return max(learning.base - min(learning.accuracies), 0.0) if learning.accuracies else None


def harm_difference(arm: Mapping[str, Outcomes], first: Mapping[str, Outcomes]) -> list[float] | None:
    """Return [harm(arm) - harm(first), low, high], both over the same questions, or groups of them.

    It is None if either has no harm. The denominators differ: each arm is right without the context on its own set of
    questions (statistics.difference_interval).
    """
    sums = []
    for views in (arm, first):
        bare, context = views["bare"], views["context"]
        if not bare.correct.any():
            return None
        sums += [bare.sum_outcomes(bare.correct & ~context.correct), bare.sum_outcomes(bare.correct)]
    value = share(sums[0], sums[1]) - share(sums[2], sums[3])
    return [float(value), *map(float, difference_interval(*sums))]
