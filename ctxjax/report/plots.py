"""Draw small figures as inline SVG strings: pure functions of the numbers, without pyplot and its global state.

Each function returns one ``<svg>`` element, which scales to the width of its container and refers to nothing outside
itself. Labels stay text: the page's font applies, and a reader can select them. ``label`` says what the picture shows,
for readers who cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import hashlib
import html
import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ctxjax.evaluation.statistics import Rate

Numbers = Sequence[float | None]

INK, FAINT = "#3a3a3a", "#9a9a9a"
# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and markers say the same.
STYLES: Mapping[str, tuple[str, str, str]] = {
    "bare": ("#0072B2", "-", "o"),
    "context": ("#D55E00", "--", "s"),
    "obedience": ("#009E73", ":", "D"),
    "target": (FAINT, "-", ""),
    "loss": (INK, "-", ""),
    "distill": ("#0072B2", "-", ""),
    "anchor": ("#D55E00", "--", ""),
    "retain": ("#009E73", ":", ""),
    "mean": ("#0072B2", "-", "o"),
    "centred": ("#AA3377", ":", "D"),
    "control": (FAINT, "--", "s"),
}
ARM_STYLES = (
    ("#8a8a8a", "-"),
    ("#D55E00", "--"),
    ("#0072B2", "-"),
    ("#009E73", ":"),
    ("#AA3377", "-."),
    ("#E69F00", "--"),
)
MARKERS = "osD^vP*Xh<>"  # as many as have no divisor with the colours, so that no arm looks like one before it
# Marker -> its shape in a legend's key.
_MARKS = {
    "": "",
    "o": '<circle cx="14" cy="5" r="2.6" fill="{colour}"/>',
    "s": '<rect x="11.6" y="2.6" width="4.8" height="4.8" fill="{colour}"/>',
    "D": '<path d="M14 1.6 17.4 5 14 8.4 10.6 5Z" fill="{colour}"/>',
}
_DASHES = {"-": "none", "--": "4 2", ":": "1.2 2", "-.": "4 2 1 2"}

PANEL = (2.5, 1.85)  # inches, one of several small panels in a row
WIDE = (4.2, 2.2)
MAX_POINTS = 300  # longer series are averaged in blocks: more points than pixels only make the page larger


def swatch(style: tuple[str, str, str]) -> str:
    """Return a legend's key for a (colour, dash, marker) as SVG."""
    colour, dash, marker = style
    mark = _MARKS[marker].format(colour=colour)
    line = f'<path d="M1 5H27" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{_DASHES[dash]}"/>'
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{line}{mark}</svg>'


def accuracy_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    last_step: float,
    target: float | None,
    label: str,
) -> str:
    """Draw rates over training steps.

    ``series``: by name in STYLES, (steps, rates in 0..1) of equal length. ``last_step``: right end of the axis, which
    the panels share. ``target``: the teacher's accuracy in 0..1, drawn as a thin line; None leaves it out.
    """
    with _figure(PANEL) as (figure, axes):
        if target is not None:
            axes.axhline(100 * target, color=FAINT, linewidth=0.8)
        for name, (steps, rates) in series.items():
            colour, dash, marker = STYLES[name]
            heights = [100 * rate for rate in rates]
            axes.plot(steps, heights, dash, color=colour, marker=marker, markersize=3.2, clip_on=False)
        axes.set(xlim=(0, max(last_step, 1)), ylim=(0, 100), xlabel="step", ylabel="%")
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.xaxis.set_major_locator(_whole_numbers(4))
        axes.grid(axis="y")
        return _svg(figure, label)


def rate_bars(rows: Sequence[tuple[str, float | None, tuple[float, float] | None, str]], style: str, label: str) -> str:
    """Draw one horizontal bar for each arm with its interval.

    ``rows``, from top to bottom: (arm, rate in 0..1 or None, (low, high) or None, text instead of a missing rate).
    ``style``: name in STYLES of the colour.
    """
    with _figure((4.2, 0.55 + 0.34 * len(rows))) as (figure, axes):
        tops = [100 * max(rate, spread[1] if spread else 0) for _, rate, spread, _ in rows if rate is not None]
        top = max([*tops, 4.0])
        for place, (_, rate, spread, absent) in enumerate(rows):
            if rate is None:
                axes.text(0.01 * top, place, absent, va="center", color=FAINT)
                continue
            axes.barh(place, 100 * rate, height=0.56, color=STYLES[style][0], alpha=0.75, linewidth=0)
            end = rate
            if spread is not None:
                axes.plot([100 * value for value in spread], [place, place], color=INK, linewidth=1.1)
                for value in spread:
                    axes.plot([100 * value] * 2, [place - 0.13, place + 0.13], color=INK, linewidth=1.1)
                end = max(rate, spread[1])
            axes.text(100 * end + 0.018 * top, place, f"{100 * rate:.1f}", va="center", color=INK)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.16 * top), xlabel="%")
        axes.set_yticks(range(len(rows)), [arm if len(arm) <= 28 else arm[:25] + "..." for arm, *_ in rows])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, label)


def length_histogram(lengths: Mapping[str, Sequence[float]], limits: tuple[float, float], label: str) -> str:
    """Draw the distribution of response lengths.

    ``lengths``: tokens of each response, by view ("bare", "context"). ``limits``: shortest and longest length over all
    arms, so that the panels share one axis.
    """
    low, high = limits
    # Whole-number bins: bins of 0.7 tokens would show gaps that are not in the data.
    width = max(1, -(-int(high - low + 1) // 24))
    count = int(high - low) // width + 1
    edges = [low - 0.5 + width * i for i in range(count + 1)]
    with _figure(PANEL) as (figure, axes):
        for view, values in lengths.items():
            colour, dash, _ = STYLES[view]
            shares = [100 / len(values)] * len(values)
            if view == "bare":
                axes.hist(values, edges, weights=shares, color=colour, alpha=0.25, linewidth=0)
            axes.hist(values, edges, weights=shares, histtype="step", color=colour, linestyle=dash, linewidth=1.3)
        axes.set(xlim=(edges[0], edges[-1]), xlabel="response tokens", ylabel="% of responses")
        axes.xaxis.set_major_locator(_whole_numbers(5))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, label)


def cosine_panel(layers: Mapping[str, Numbers], fifth: Numbers, bottom: float, label: str) -> str:
    """Draw hidden-state cosines by layer.

    ``layers``: by name in STYLES ("mean", "centred", "control"), one cosine for each layer, index 0 the embedding.
    ``fifth``: 5th percentile by layer, shaded below the mean; [] leaves it out. ``bottom``: lower end of the axis, the
    same for all panels.
    """
    with _figure(PANEL) as (figure, axes):
        mean = layers.get("mean", [])
        band = [
            (i, low, high)
            for i, (low, high) in enumerate(zip(fifth, mean, strict=False))
            if low is not None and high is not None
        ]
        if band:
            places, lows, highs = zip(*band, strict=True)
            axes.fill_between(places, lows, highs, color=STYLES["mean"][0], alpha=0.15, linewidth=0)
        for name, values in layers.items():
            colour, dash, marker = STYLES[name]
            points = [(i, value) for i, value in enumerate(values) if value is not None]
            if points:
                places, heights = zip(*points, strict=True)
                axes.plot(places, heights, dash, color=colour, marker=marker, markersize=2.8, clip_on=False)
        last = max([len(values) for values in layers.values()] + [2]) - 1
        axes.set(xlim=(0, last), ylim=(bottom, 1), xlabel="layer (0 = embedding)", ylabel="cosine")
        axes.xaxis.set_major_locator(_whole_numbers(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        return _svg(figure, label)


def position_lines(series: Mapping[str, Numbers], label: str) -> str:
    """Draw the view KL in nats over response positions, one line for each arm (in the order of ARM_STYLES)."""
    with _figure(WIDE) as (figure, axes):
        shown = []
        for index, values in enumerate(series.values()):
            colour, dash, marker = arm_style(index)
            points = [(i + 1, value) for i, value in enumerate(values) if value is not None]
            if points:
                places, heights = _thin(points)
                marks = {"marker": marker, "markersize": 4, "markevery": max(len(places) // 8, 1)}
                axes.plot(places, heights, dash, color=colour, linewidth=1.5, **marks)
                shown += heights
        _value_axis(axes, shown)
        axes.set(xlabel="response token", ylabel="view KL, nats")
        axes.xaxis.set_major_locator(_whole_numbers(8))
        axes.grid(axis="y")
        return _svg(figure, label)


def rate_scatter(points: Mapping[str, Sequence[tuple[Rate, Rate, bool]]], names: tuple[str, str], label: str) -> str:
    """Draw one rate against another, a point with both intervals for each pair, and a key of the colours.

    ``points``: by arm (in the order of ARM_STYLES), two rates in 0..1 and whether the point is hollow.
    ``names``: of the two axes.
    """
    with _figure((5.2, 3.6)) as (figure, axes):
        for index, (arm, own) in enumerate(points.items()):
            colour, marker = arm_style(index)[0], MARKERS[index % len(MARKERS)]
            for (x, x_ends), (y, y_ends), is_hollow in own:
                for ends in ((x_ends or (x, x), (y, y)), ((x, x), y_ends or (y, y))):
                    line = [[100 * value for value in side] for side in ends]
                    axes.plot(*line, color=colour, linewidth=0.6, alpha=0.5)
                fill = "white" if is_hollow else colour
                axes.plot(100 * x, 100 * y, marker, color=colour, markerfacecolor=fill, markersize=4.5, clip_on=False)
            axes.plot([], [], marker, color=colour, markersize=4.5, label=arm)  # the key is never hollow
        axes.set(xlim=(0, None), ylim=(0, 100), xlabel=f"{names[0]}, %", ylabel=f"{names[1]}, %")
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        return _svg(figure, label)


def standalone(svg: str) -> str:
    """Return an inline figure as the text of a file of its own."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f'<svg {spaces} style="background: white" ', 1) + "\n"


def loss_curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Draw training losses in nats per token; ``series``: by name in STYLES, (steps, losses) of equal length."""
    with _figure(PANEL) as (figure, axes):
        shown = []
        for name, (steps, losses) in series.items():
            colour, dash, _ = STYLES[name]
            places, heights = _thin(list(zip(steps, losses, strict=True)))
            axes.plot(places, heights, dash, color=colour, linewidth=0.9 if name == "loss" else 1.3)
            shown += heights
        _value_axis(axes, shown)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.xaxis.set_major_locator(_whole_numbers(4))
        axes.grid(axis="y")
        return _svg(figure, label)


def arm_style(index: int) -> tuple[str, str, str]:
    """Return the (colour, dash, marker) of the arm with this number in results.json. The first arms have no marker;
    arms of one colour have different ones."""
    turn, place = divmod(index, len(ARM_STYLES))
    return (*ARM_STYLES[place], tuple(_MARKS)[turn % len(_MARKS)])


def _thin(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Average a long series in equal blocks; return a short one unchanged."""
    block = -(-len(points) // MAX_POINTS)
    parts = [points[i : i + block] for i in range(0, len(points), block)]
    means = [[sum(axis) / len(part) for axis in zip(*part, strict=True)] for part in parts]
    return [place for place, _ in means], [height for _, height in means]


def _whole_numbers(count: int) -> MaxNLocator:
    return MaxNLocator(count, integer=True, steps=[1, 2, 5, 10])


def _value_axis(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis if positive values span more than two decades."""
    if values and min(values) > 0 and max(values) / min(values) > 100:
        axes.set_yscale("log")
        # matplotlib's own labels are formulas, and those are off (text.parse_math): arm names may hold dollar signs.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min([0.0, *values]))
        axes.yaxis.set_major_locator(MaxNLocator(4))


@contextlib.contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    settings = {
        "font.family": "sans-serif",
        "font.size": 8,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 8,
        "grid.color": "#e6e3dc",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "xtick.color": FAINT,
        "xtick.labelcolor": INK,
        "xtick.major.size": 2.5,
        "xtick.major.width": 0.6,
        "ytick.color": FAINT,
        "ytick.labelcolor": INK,
        "ytick.major.size": 0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "ctxjax",  # the same numbers give the same bytes
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    # savefig would draw twice, the first time for the layout; print_svg makes the layout too.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Ids must be unique in a page of many figures. Most are used by no reference and are removed.
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    used = {name for pair in used for name in pair if name}
    prefix = "f" + hashlib.sha1((label + text).encode()).hexdigest()[:8] + "-"
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", text)
    text = text.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    view_box = re.search(r'viewBox="([^"]+)"', text)[1]
    body = text[text.index(">") + 1 :]
    return f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label)}">{body}'.strip()
