"""Simulate how often the interval of a rate covers the rate, if outcomes come in clusters, and how wide it is.

    python -m benchmarks.intervals [--quick]

Each question has its own chance of an event, from a beta distribution with mean p and the given intra-cluster
correlation, and a number of samples. An interval of ``statistics.clustered_interval`` is compared with the needed one:
Wilson's for the true design effect 1 + (samples - 1) correlation, which a run does not know. ``width`` is the quotient
of the mean widths. ``least`` is that quotient for an interval that knows the design effect except in runs without any
event (or without any other outcome), which say nothing about it: there the interval has to allow for equal samples.
The obedience cells have few clusters of many questions, as other contexts are. ``crossed``: outcomes share facts, in
several wordings each, and contexts, in rotation; ``coverage_by_context`` is that of contexts alone. ``differences``: of
the harm of two arms on the same facts and wordings, each arm right on its own 80 %; ``width`` is relative to 1.96
standard deviations of the difference on both sides. Prints one JSON object as the last line.
Then intervals of means over seeds (``over_seeds.mean_rate``): each seed has its own rate, from a beta distribution, and
many questions. ``coverage_of_two_thirds`` is that of an interval of two thirds of the width around the same value; if
it were 95 %, the interval would be half wider than needed. Recorded numbers: benchmarks/README.md.
"""

import argparse
import itertools
import json

import numpy as np
from scipy import stats

from ctxjax.evaluation import over_seeds, statistics

CORRELATIONS = (0.0, 0.2, 0.5, 1.0)
QUESTIONS = [*itertools.product((0.01, 0.05, 0.3), (20, 50, 128, 500), (1, 2, 4, 8), CORRELATIONS)]
OBEDIENCE = [*itertools.product((0.05, 0.3, 0.5, 0.95), (12, 24, 60), (8, 25), CORRELATIONS)]
# Seeds, questions of each, mean and intra-cluster correlation of the seeds' rates.
SEEDS = [
    *((seeds, 512, p, c) for seeds in (3, 5) for p in (0.15, 0.5) for c in (0.0, 0.01, 0.1)),
    (3, 512, 0.02, 0.0), (3, 512, 0.02, 0.01), (3, 512, 0.5, 0.3), (5, 512, 0.98, 0.01), (10, 128, 0.3, 0.1),
]  # fmt: skip
SKEWED = [(3, 512, 0.15, 0.3), (3, 512, 0.02, 0.05), (5, 512, 0.98, 0.05), (10, 512, 0.02, 0.05)]
# Facts, wordings of each, contexts, mean, and the shares of variance that facts and contexts have.
CROSSED = [
    (*shape, p, *shares)
    for shape in ((12, 16, 24), (12, 16, 12), (40, 4, 8))
    for p in (0.02, 0.3, 0.75)
    for shares in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.9, 0.0), (0.0, 0.9), (0.4, 0.4))
]  # fmt: skip
# Facts, wordings of each, the share of variance that facts have, harm of both arms, correlation of the arms.
DIFFERENCES = [
    (*shape, *harms, shared)
    for shape in ((12, 16, 0.5), (12, 16, 1.0), (60, 8, 0.3), (24, 1, 0.0), (192, 1, 0.0), (512, 1, 0.0))
    for harms in ((0.01, 0.0), (0.01, 0.01), (0.1, 0.1), (0.3, 0.05), (0.5, 0.5), (0.9, 0.1))
    for shared in (0.0, 0.5, 0.9)
]  # fmt: skip
QUICK = [(0.01, 20, 8, 1.0), (0.05, 50, 2, 0.5), (0.3, 20, 4, 0.2), (0.3, 50, 8, 0.0)]


def draw_events(rng: np.random.Generator, p: float, correlation: float, shape: tuple[int, int], size: int):
    """Return beta-binomial counts of events among ``size`` outcomes, [runs, clusters]."""
    if correlation in (0.0, 1.0):
        chance = rng.random(shape) < p if correlation else np.full(shape, p)
    else:
        spread = (1 - correlation) / correlation
        chance = rng.beta(p * spread, (1 - p) * spread, shape)
    return rng.binomial(size, chance)


def simulate(p: float, clusters: int, size: int, correlation: float, runs: int) -> dict:
    """Return coverage and relative widths of one cell."""
    rng = np.random.default_rng([round(1000 * p), clusters, size, round(10 * correlation)])
    part = draw_events(rng, p, correlation, (runs, clusters), size)
    low, high = statistics.clustered_interval(part, np.full(part.shape, size))
    effect, total, n = 1 + (size - 1) * correlation, part.sum(axis=1), clusters * size
    needed = np.subtract(*statistics.wilson(total / effect, n / effect)[::-1])
    known = np.where((total == 0) | (total == n), size, effect)
    least = np.subtract(*statistics.wilson(total / known, n / known)[::-1])
    return {
        "p": p, "clusters": clusters, "size": size, "correlation": correlation,
        "coverage": round(float(np.mean((low <= p) & (p <= high))), 4),
        "width": round(float(np.mean(high - low) / np.mean(needed)), 2),
        "least": round(float(np.mean(least) / np.mean(needed)), 2),
        "narrowest": round(float(np.min(high - low)), 5),
    }  # fmt: skip


def simulate_seeds(seeds: int, questions: int, p: float, correlation: float, runs: int) -> dict:
    """Return coverage and width of the interval over seeds of one cell."""
    rng, found = np.random.default_rng([seeds, questions, round(1000 * p), round(100 * correlation)]), []
    right = draw_events(rng, p, correlation, (runs, seeds), questions)
    for counts in right:
        sums = [over_seeds.Sums((np.arange(questions) < count).astype(float), np.ones(questions)) for count in counts]
        value, (low, high) = over_seeds.mean_rate(sums, 100)
        narrow = value - (value - low) / 1.5 <= p <= value + (high - value) / 1.5
        found.append((low <= p <= high, narrow, high - low))
    covered, narrow, width = np.mean(found, axis=0)
    return {
        "seeds": seeds, "questions": questions, "p": p, "correlation": correlation, "coverage": round(covered, 4),
        "coverage_of_two_thirds": round(narrow, 4), "width": round(width, 4),
    }  # fmt: skip


def simulate_crossed(
    facts: int, wordings: int, contexts: int, p: float, of_facts: float, of_contexts: float, runs: int
) -> dict:
    """Return coverage and relative width of one cell, whose outcomes share facts and contexts."""
    rng = np.random.default_rng([facts, contexts, *(round(100 * share) for share in (p, of_facts, of_contexts))])
    n, found = facts * wordings, []
    fact_n, context_n = np.arange(n) % facts, rng.permutation(n) % contexts
    for _ in range(runs):
        chance_n = np.sqrt(of_facts) * rng.standard_normal(facts)[fact_n]
        chance_n += np.sqrt(of_contexts) * rng.standard_normal(contexts)[context_n]
        chance_n += np.sqrt(1 - of_facts - of_contexts) * rng.standard_normal(n)
        outcomes = chance_n < stats.norm.ppf(p)
        value, (low, high) = statistics.rate(outcomes, np.stack([context_n, fact_n]))
        by_context = statistics.rate(outcomes, context_n).interval
        found.append((low <= p <= high, by_context[0] <= p <= by_context[1], high - low, value))
    covered, by_context, width, _ = np.mean(found, axis=0)
    return {
        "facts": facts, "wordings": wordings, "contexts": contexts, "p": p, "of_facts": of_facts,
        "of_contexts": of_contexts, "coverage": round(covered, 4), "coverage_by_context": round(by_context, 4),
        "width": round(width / (2 * statistics.Z * np.std([value for *_, value in found])), 2),
    }  # fmt: skip


def simulate_difference(
    facts: int, wordings: int, of_facts: float, harm: float, first: float, shared: float, runs: int
) -> dict:
    """Return coverage and relative width of one cell: harm of an arm minus harm of the first one."""
    rng = np.random.default_rng([facts, wordings, *(round(100 * share) for share in (of_facts, harm, first, shared))])

    def draw_pair() -> list[np.ndarray]:
        """Standard normal variables [runs, facts, wordings] of both arms."""
        parts = []
        for size, share in ((1, of_facts), (wordings, 1 - of_facts)):
            both, *own = rng.standard_normal((3, runs, facts, size))
            parts.append([np.sqrt(share) * (np.sqrt(shared) * both + np.sqrt(1 - shared) * x) for x in own])
        return [sum(arm) for arm in zip(*parts)]

    sums = []
    for harmed, right, rate in zip(draw_pair(), draw_pair(), (harm, first), strict=True):
        is_right = right < stats.norm.ppf(0.8)
        sums += [np.sum((harmed < stats.norm.ppf(rate)) & is_right, axis=-1), np.sum(is_right, axis=-1)]
    low, high = statistics.difference_interval(*sums)
    spread = np.std(statistics.share(*sums[:2]) - statistics.share(*sums[2:]))
    return {
        "facts": facts, "wordings": wordings, "of_facts": of_facts, "harm": harm, "first": first, "shared": shared,
        "coverage": round(float(np.mean((low <= harm - first) & (harm - first <= high))), 4),
        "width": round(float(np.mean(high - low) / (2 * statistics.Z * spread)), 2),
    }  # fmt: skip


def summarise(cells: list[tuple], runs: int) -> dict:
    found = [simulate(*cell, runs) for cell in cells]
    return {
        "cells": len(found),
        "least coverage": min(cell["coverage"] for cell in found),
        "below 93 %": [cell for cell in found if cell["coverage"] < 0.93],
        "median width": float(np.median([cell["width"] for cell in found])),
        "wider than 1.5": [cell for cell in found if cell["width"] > 1.5],
        "narrowest": min(cell["narrowest"] for cell in found),
        "by size and correlation": [
            {"size": size, "correlation": correlation}
            | {
                "least coverage": min(cell["coverage"] for cell in own),
                "most width": max(cell["width"] for cell in own),
            }
            for size, correlation in sorted({(cell["size"], cell["correlation"]) for cell in found})
            if (own := [c for c in found if (c["size"], c["correlation"]) == (size, correlation)])
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four cells, 300 runs of each")
    options = parser.parse_args()
    if options.quick:
        result = {"questions": summarise(QUICK, 300), "seeds": [simulate_seeds(*SEEDS[0], 50)]}
        result["crossed"] = [simulate_crossed(*CROSSED[9], 100)]
        result["differences"] = [simulate_difference(*DIFFERENCES[0], 300)]
    else:
        result = {"questions": summarise(QUESTIONS, 4000), "obedience": summarise(OBEDIENCE, 4000)}
        result["crossed"] = [simulate_crossed(*cell, 1000) for cell in CROSSED]
        result["differences"] = [simulate_difference(*cell, 4000) for cell in DIFFERENCES]
        result["seeds"] = [simulate_seeds(*cell, 4000) for cell in (*SEEDS, *SKEWED)]
    print(json.dumps({"benchmark": "intervals", **result, "versions": {"numpy": np.__version__}}))


if __name__ == "__main__":
    main()
