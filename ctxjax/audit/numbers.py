"""The metrics of an evaluation, computed a second time from items.jsonl, without the evaluation's code.

Only intervals, and the test of ``regime`` for several samples, are the library's own functions
(evaluation/statistics.py): a second implementation of a bootstrap would draw other numbers.
"""

from __future__ import annotations

from collections import Counter
import math

import numpy as np

from ctxjax.evaluation import statistics

MOST_CONTEXTS = 100  # with more, results.json has no accuracies by context
NAMES = {"bare": "x", "context": "xc"}


def recompute(
    items: list[dict], defaults: list[bool] | None, resamples: int, ignored: list[bool] | None = None
) -> dict:
    """Return the metrics that follow from the items, by their names in results.json.

    ``defaults``: whether each bare response is the base's default answer; None if the task has none. ``ignored``:
    whether it would be right under the other context of its question; None if that was not measured.
    """
    views: dict[str, list[dict]] = {}
    for item in items:
        views.setdefault(item["view"], []).append(item)
    samples = 1 + max(item["sample"] for item in views["bare"])
    result = {"n": len(views["bare"]) // samples}
    for view, suffix in NAMES.items():
        if view in views:
            result |= _describe_view(views[view], suffix, samples)
    if "context" in views:
        result |= _compare_views(views["bare"], views["context"], samples, resamples)
    for view in ("empty", "paraphrase", "unrelated"):
        if view in views:
            result |= _rate(f"acc_{view}", [item["correct"] for item in views[view]], _clusters(views[view], samples))
    if "other" in views:
        contexts = [item["context"] for item in views["other"]]
        right, clusters = [item["correct"] for item in views["other"]], _number(contexts)
        if "group" in views["other"][0]:
            clusters = np.stack([clusters, _number([item["group"] for item in views["other"]])])
        result |= _rate("obedience", right, clusters)
        if ignored is not None:
            result |= _rate("obedience_floor", ignored, clusters)
        if len(set(contexts)) <= MOST_CONTEXTS:
            result["obedience_by_context"] = {
                context: [_mean([r for r, c in zip(right, contexts) if c == context]), contexts.count(context)]
                for context in set(contexts)
            }
    if defaults is not None:
        result |= _rate("acc_default", defaults, _clusters(views["bare"], samples))
    return result


def _describe_view(items: list[dict], suffix: str, samples: int) -> dict:
    clusters = _clusters(items, samples)
    result = _rate(f"acc_{suffix}", [item["correct"] for item in items], clusters)
    if all(item["lenient"] is not None for item in items):
        result |= _rate(f"acc_{suffix}_lenient", [item["lenient"] for item in items], clusters)
    return result | {
        f"length_{suffix}": _mean([item["length"] for item in items]),
        f"truncated_{suffix}": _mean([item["truncated"] for item in items]),
        f"parse_{suffix}": _mean([item["parsed"] is not None for item in items]),
        f"unparsed_{suffix}": dict(Counter(item["reason"] for item in items if item["reason"])),
    }


def _compare_views(bare: list[dict], context: list[dict], samples: int, resamples: int) -> dict:
    x, xc = ([bool(item["correct"]) for item in items] for items in (bare, context))
    pairs, clusters = list(zip(x, xc)), _clusters(bare, samples)
    result = {
        "gap": _mean(xc) - _mean(x),
        "dlen": _mean([item["length"] for item in context]) / _mean([item["length"] for item in bare]) - 1,
        "flips": {
            "right_right": pairs.count((True, True)), "right_wrong": pairs.count((True, False)),
            "wrong_right": pairs.count((False, True)), "wrong_wrong": pairs.count((False, False)),
        },
    }  # fmt: skip
    result |= _rate("harm", [not with_context for with_context in xc], clusters, among=x)
    result |= _rate("benefit", xc, clusters, among=[not right for right in x])
    result |= _rate("both_correct", [a and b for a, b in pairs], clusters)
    better, worse = result["flips"]["wrong_right"], result["flips"]["right_wrong"]
    if samples > 1:
        result["samples"] = samples
        result |= _floor(x, xc, bare, samples, resamples)
    if samples == 1 and "group" not in bare[0]:
        p_value = result["mcnemar_p"] = _sign_test(better, worse)
    else:
        difference = _by_cluster(xc, bare, samples) - _by_cluster(x, bare, samples)
        p_value = statistics.sign_flip_p(difference, resamples)
    word = "perturbation" if result["gap"] < 0 else "scaffold"
    return result | {"regime": word if p_value < 0.05 else "agreement"}


def _floor(x: list[bool], xc: list[bool], bare: list[dict], samples: int, resamples: int) -> dict:
    """The harm that two samples of the bare view would have, and what the harm has above it."""
    right_n = _by_question(x, samples)
    harmed_n = _by_question([a and not b for a, b in zip(x, xc)], samples)
    floor_n = right_n * (1 - right_n) * samples / (samples - 1)
    result = {}
    for key, part_n in (("harm_floor", floor_n), ("excess_harm", harmed_n - floor_n)):
        result[key] = float(part_n.sum() / right_n.sum()) if right_n.sum() else None
        parts = (_sum_by(_clusters(bare, samples)[::samples], values) for values in (part_n, right_n))
        result[f"{key}_ci"] = _list(statistics.bootstrap_ratio(*parts, resamples).interval)
    return result


def harm_difference(arm: list[dict], first: list[dict]) -> list[float] | None:
    """Return [harm of the arm - harm of the first arm, low, high] from their items; the interval is the library's."""
    sums, harms = [], []
    for items in (arm, first):
        x, xc = ([bool(i["correct"]) for i in items if i["view"] == view] for view in ("bare", "context"))
        samples = 1 + max(item["sample"] for item in items)
        harmed = [a and not b for a, b in zip(x, xc)]
        bare = [item for item in items if item["view"] == "bare"]
        sums += [_sum_by(_clusters(bare, samples), np.array(values, float)) for values in (harmed, x)]
        harms.append(sum(harmed) / sum(x) if any(x) else None)
    if None in harms:
        return None
    return [harms[0] - harms[1], *_list(statistics.difference_interval(*sums))]


def _rate(key: str, successes: list, clusters: np.ndarray, among: list[bool] | None = None) -> dict:
    chosen = [True] * len(successes) if among is None else among
    hits = [bool(success) for success, counts in zip(successes, chosen) if counts]
    interval = statistics.rate(np.array(successes, bool), clusters, np.array(chosen, bool)).interval
    return {key: sum(hits) / len(hits) if hits else None, f"{key}_ci": _list(interval)}


def _sign_test(better: int, worse: int) -> float:
    """Two-sided exact test that ``better`` of better + worse is a fair coin's."""
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def _by_question(values: list[bool], samples: int) -> np.ndarray:
    return np.array([sum(values[i : i + samples]) / samples for i in range(0, len(values), samples)])


def _clusters(items: list[dict], samples: int) -> np.ndarray:
    """The number of each item's group, if the task has groups, else of its question."""
    if "group" in items[0]:
        return _number([item["group"] for item in items])
    return np.array([place // samples for place in range(len(items))])


def _by_cluster(values: list[bool], items: list[dict], samples: int) -> np.ndarray:
    """The sums over each cluster of the questions' means."""
    return _sum_by(_clusters(items, samples)[::samples], _by_question(values, samples))


def _sum_by(clusters: np.ndarray, values: np.ndarray) -> np.ndarray:
    sums: dict[int, float] = {}
    for cluster, value in zip(clusters, values):
        sums[cluster] = sums.get(cluster, 0.0) + value
    return np.array([sums[cluster] for cluster in sorted(sums)])


def _number(names: list[str]) -> np.ndarray:
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names])


def _mean(values: list) -> float:
    return sum(map(float, values)) / len(values)


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [float(end) for end in interval]
