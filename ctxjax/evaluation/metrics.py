"""The metrics of removability, from per-question outcomes in several views.

    Acc_x, Acc_xc   accuracy without and with the context      Gap = Acc_xc - Acc_x
    Harm            P(wrong with c | right without c)
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


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What happened to n questions in one view: arrays [n]; ``length`` in tokens, end token included.

    ``lenient`` is whether they are right for a reader who does without the format, None where there is no such reader;
    ``reasons`` says of each why no answer could be read, None where one could."""

    correct: np.ndarray
    parsed: np.ndarray
    truncated: np.ndarray
    length: np.ndarray
    lenient: np.ndarray | None = None
    reasons: list[str | None] = dataclasses.field(default_factory=list)


def harm_rate(right_x: np.ndarray, right_xc: np.ndarray, axis: int = -1) -> np.ndarray:
    """P(wrong with c | right without c) along ``axis``; NaN where nothing was right without c."""
    right = np.sum(right_x, axis=axis)
    harmed = np.sum(right_x & ~right_xc, axis=axis)
    return np.where(right > 0, harmed / np.maximum(right, 1), np.nan)


def rate(name: str, successes: np.ndarray, among: np.ndarray | None = None) -> dict:
    """{name, name_ci}: a share with its Wilson interval, None where there is nothing to take a share of."""
    chosen = successes if among is None else successes[among]
    n = len(chosen)
    return {
        name: float(np.mean(chosen)) if n else None,
        f"{name}_ci": statistics.wilson(int(np.sum(chosen)), n),
    }


def regime(right_x: np.ndarray, right_xc: np.ndarray) -> str:
    """ "perturbation" where the context significantly lowers accuracy, "scaffold" where it raises it (McNemar, 5 %),
    else "agreement"."""
    if statistics.mcnemar(right_x, right_xc) >= 0.05:
        return "agreement"
    return "perturbation" if np.mean(right_xc) < np.mean(right_x) else "scaffold"


def one_view(view: str, outcomes: Outcomes) -> dict:
    """Accuracy, length, truncated and readable shares of one view, "x" or "xc"."""
    result = {"n": len(outcomes.correct)} | rate(f"acc_{view}", outcomes.correct)
    if outcomes.lenient is not None:
        result |= rate(f"acc_{view}_lenient", outcomes.lenient)
    return result | {
        f"length_{view}": float(np.mean(outcomes.length)),
        f"truncated_{view}": float(np.mean(outcomes.truncated)),
        f"parse_{view}": float(np.mean(outcomes.parsed)),
        f"unparsed_{view}": dict(Counter(reason for reason in outcomes.reasons if reason).most_common()),
    }


def removability(bare: Outcomes, context: Outcomes) -> dict:
    """The metrics of the two views on the same questions."""
    x, xc = bare.correct, context.correct
    result = one_view("x", bare) | one_view("xc", context)
    result["gap"] = float(np.mean(xc) - np.mean(x))
    result |= rate("harm", ~xc, among=x) | rate("benefit", xc, among=~x) | rate("both_correct", x & xc)
    result["dlen"] = float(np.mean(context.length) / np.mean(bare.length) - 1)
    result["flips"] = {
        "right_right": int(np.sum(x & xc)),
        "right_wrong": int(np.sum(x & ~xc)),
        "wrong_right": int(np.sum(~x & xc)),
        "wrong_wrong": int(np.sum(~x & ~xc)),
    }
    return result | {"mcnemar_p": statistics.mcnemar(x, xc), "regime": regime(x, xc)}


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


def harm_difference(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], resamples: int) -> list | None:
    """[harm(a) - harm(b), low, high] for two arms, each (right_x, right_xc), by paired bootstrap over questions.

    The arms' denominators differ, since each is right without context on its own set of questions.
    """

    def difference(a_x, a_xc, b_x, b_xc, axis=-1):
        return harm_rate(a_x, a_xc, axis) - harm_rate(b_x, b_xc, axis)

    interval = statistics.paired_bootstrap(difference, (*a, *b), resamples)
    return None if interval is None else list(interval)
