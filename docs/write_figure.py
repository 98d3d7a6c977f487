"""Draw docs/figure.svg from a run: accuracy without the context, with it, and under other contexts, by arm.

python docs/write_figure.py runs/tiny
"""

import json
from pathlib import Path
import sys

import matplotlib
from matplotlib.figure import Figure

from ctxjax.evaluation.metrics import METRICS

SHOWN = (
    ("acc_x", "without the context", "#0072B2"),
    ("acc_xc", "with the context", "#D55E00"),
    ("obedience", "under other contexts", "#009E73"),
)


def draw(results: dict[str, dict]) -> Figure:
    """Draw one group of bars for each row of results.json, with 95 % intervals."""
    known = {metric.key for metric in METRICS}
    figure = Figure((7.2, 2.9), layout="constrained")
    axes = figure.subplots()
    for offset, (key, label, colour) in enumerate(SHOWN):
        if key not in known:
            raise ValueError(f"{key} is no metric of results.json")
        for place, row in enumerate(results.values()):
            height, (low, high) = 100 * row[key], (100 * value for value in row[f"{key}_ci"])
            x = place + 0.27 * (offset - 1)
            axes.bar(x, height, 0.24, color=colour, alpha=0.8, label=label if not place else None)
            axes.plot([x, x], [low, high], color="#3a3a3a", linewidth=1.1)
            axes.text(x, max(height, high) + 1.5, f"{height:.0f}", ha="center", color="#3a3a3a", fontsize=8)
    axes.set_xticks(range(len(results)), results)
    axes.set(ylim=(0, 112), yticks=[0, 25, 50, 75, 100], ylabel="right answers, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(SHOWN), frameon=False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "ctxjax"  # the same file for the same numbers
    figure = draw(json.loads((Path(sys.argv[1]) / "results.json").read_text()))
    figure.savefig(Path(__file__).with_name("figure.svg"), facecolor="white", metadata={"Date": None})
