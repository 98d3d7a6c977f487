"""The metrics of removability, from per-question outcomes in several views.

    Acc_x, Acc_xc   accuracy without and with the context      Gap = Acc_xc - Acc_x
    Harm            P(wrong with c | right without c)
    Harm floor      E[p (1 - p)] / E[p], where p is how often samples of the bare view are right: what two of them
                    disagree on already. Harm less the floor is the excess.
    Benefit         P(right with c | wrong without c)
    BothCorrect     P(right in both views)
    dLen            relative change of the mean response length when c is added

Harm alone would reward a model that ignores every prompt; read it beside obedience.
"""

from __future__ import annotations

from collections import Counter
import dataclasses

import numpy as np

from ctxjax.evaluation import statistics

RESAMPLES = 2000  # of a bootstrap over questions


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What happened to n questions in one view: arrays [n]; ``length`` in tokens, end token included.

    With several ``samples`` of a question the arrays are [n * samples], a question's one after the other, and intervals
    are over questions. ``lenient`` is whether they are right for a reader who does without the format, None where there
    is no such reader; ``reasons`` says of each why no answer could be read, None where one could."""

    correct: np.ndarray
    parsed: np.ndarray
    truncated: np.ndarray
    length: np.ndarray
    lenient: np.ndarray | None = None
    reasons: list[str | None] = dataclasses.field(default_factory=list)
    samples: int = 1


def share(part: np.ndarray, whole: np.ndarray, axis: int = -1) -> np.ndarray:
    """sum(part) / sum(whole) along ``axis``; NaN where there is nothing to take a share of."""
    total = np.sum(whole, axis=axis)
    return np.where(total > 0, np.sum(part, axis=axis) / np.where(total > 0, total, 1), np.nan)


def rate(name: str, successes: np.ndarray, among: np.ndarray | None = None, samples: int = 1) -> dict:
    """{name, name_ci}: a share, None where there is nothing to take a share of, with its Wilson interval; with several
    samples of a question, which are not independent, with an interval by bootstrap over questions."""
    among = np.ones_like(successes) if among is None else among
    if samples > 1:
        return _by_bootstrap(name, _by_question(successes & among, samples), _by_question(among, samples))
    chosen = successes[among]
    n = len(chosen)
    return {
        name: float(np.mean(chosen)) if n else None,
        f"{name}_ci": statistics.wilson(int(np.sum(chosen)), n),
    }


def _by_question(values: np.ndarray, samples: int) -> np.ndarray:
    """Means over the samples of each question, [n]."""
    return np.mean(np.reshape(values, (-1, samples)), axis=1)


def _by_bootstrap(name: str, part_n: np.ndarray, whole_n: np.ndarray) -> dict:
    interval = statistics.paired_bootstrap(share, (part_n, whole_n), RESAMPLES)
    value = float(share(part_n, whole_n))
    return {name: value if np.isfinite(value) else None, f"{name}_ci": interval and interval[1:]}


def regime(right_x: np.ndarray, right_xc: np.ndarray) -> str:
    """ "perturbation" where the context significantly lowers accuracy, "scaffold" where it raises it (McNemar, 5 %),
    else "agreement"."""
    if statistics.mcnemar(right_x, right_xc) >= 0.05:
        return "agreement"
    return "perturbation" if np.mean(right_xc) < np.mean(right_x) else "scaffold"


def one_view(view: str, outcomes: Outcomes) -> dict:
    """Accuracy, length, truncated and readable shares of one view, "x" or "xc"."""
    samples = outcomes.samples
    result = {"n": len(outcomes.correct) // samples} | rate(f"acc_{view}", outcomes.correct, samples=samples)
    if outcomes.lenient is not None:
        result |= rate(f"acc_{view}_lenient", outcomes.lenient, samples=samples)
    return result | {
        f"length_{view}": float(np.mean(outcomes.length)),
        f"truncated_{view}": float(np.mean(outcomes.truncated)),
        f"parse_{view}": float(np.mean(outcomes.parsed)),
        f"unparsed_{view}": dict(Counter(reason for reason in outcomes.reasons if reason).most_common()),
    }


def removability(bare: Outcomes, context: Outcomes) -> dict:
    """The metrics of the two views on the same questions."""
    x, xc, samples = bare.correct, context.correct, bare.samples
    result = one_view("x", bare) | one_view("xc", context)
    result["gap"] = float(np.mean(xc) - np.mean(x))
    result |= rate("harm", ~xc, x, samples) | rate("benefit", xc, ~x, samples)
    result |= rate("both_correct", x & xc, samples=samples)
    result["dlen"] = float(np.mean(context.length) / np.mean(bare.length) - 1)
    result["flips"] = {
        "right_right": int(np.sum(x & xc)),
        "right_wrong": int(np.sum(x & ~xc)),
        "wrong_right": int(np.sum(~x & xc)),
        "wrong_wrong": int(np.sum(~x & ~xc)),
    }
    if samples > 1:
        return result | _sampled(x, xc, samples)
    return result | {"mcnemar_p": statistics.mcnemar(x, xc), "regime": regime(x, xc)}


def _sampled(x: np.ndarray, xc: np.ndarray, samples: int) -> dict:
    """The floor of harm and what is above it, and the regime by whether the gap's interval over questions has 0 in it:
    McNemar's test wants one response a question."""
    p_n, harmed_n = _by_question(x, samples), _by_question(x & ~xc, samples)
    disagreement_n = samples / (samples - 1) * p_n * (1 - p_n)  # of two different samples, without bias
    result = {"samples": samples} | _by_bootstrap("harm_floor", disagreement_n, p_n)
    result |= _by_bootstrap("excess_harm", harmed_n - disagreement_n, p_n)
    gap = _by_bootstrap("gap", _by_question(xc, samples) - p_n, np.ones_like(p_n))
    low, high = gap["gap_ci"] or (0.0, 0.0)
    return result | {"regime": "perturbation" if high < 0 else "scaffold" if low > 0 else "agreement"}


def view_distance(kl_nxT: np.ndarray, mask_nxT: np.ndarray) -> dict:
    """View KL in nats per token, overall and by response position (None where no response reaches it)."""
    kl = np.where(mask_nxT, kl_nxT, 0.0)
    reached_T = mask_nxT.sum(axis=0)
    by_position = [float(total / count) if count else None for total, count in zip(kl.sum(axis=0), reached_T)]
    return {"view_kl": float(kl.sum() / max(mask_nxT.sum(), 1)), "view_kl_by_position": by_position}


def layer_cosines(cosines: dict[str, np.ndarray], mask_nxT: np.ndarray) -> dict:
    """Mean cosines by layer, index 0 the embedding's output, and the 5th percentile of the first kind."""
    tokens = {name: values[:, mask_nxT] for name, values in cosines.items()}
    return {
        "cosine_by_layer": tokens["cosine"].mean(axis=1).tolist(),
        "cosine_p5_by_layer": np.percentile(tokens["cosine"], 5, axis=1).tolist(),
        "cosine_control_by_layer": tokens["control"].mean(axis=1).tolist(),
        "cosine_centred_by_layer": tokens["centred"].mean(axis=1).tolist(),
    }


def harm_difference(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], resamples: int, samples: int = 1
) -> list | None:
    """[harm(a) - harm(b), low, high] for two arms, each (right_x, right_xc), by paired bootstrap over questions.

    The arms' denominators differ, since each is right without context on its own set of questions.
    """

    def difference(a_harmed, a_right, b_harmed, b_right, axis=-1):
        return share(a_harmed, a_right, axis) - share(b_harmed, b_right, axis)

    parts = [_by_question(values, samples) for x, xc in (a, b) for values in (x & ~xc, x)]
    interval = statistics.paired_bootstrap(difference, tuple(parts), resamples)
    return None if interval is None else list(interval)
