"""Numbers as the report prints them. A missing, null or non-finite value is printed as a dash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import NamedTuple

DASH = "-"


def finite(value: object) -> float | None:
    """Return ``value`` as a float; None if it is not a finite number (booleans are not numbers here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def finite_list(values: object) -> list[float | None]:
    """Return the values as a list, with None for each missing one; [] if it is not a list."""
    return [finite(value) for value in values] if isinstance(values, list | tuple) else []


def pair(values: object) -> tuple[float, float] | None:
    """Return an interval (low, high); None unless both ends are finite."""
    ends = finite_list(values)
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are present; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def mean_over_layers(values: object) -> float | None:
    """Return the mean over the layers' outputs; None if there are none.

    Index 0, the embedding, is left out: a token has the same embedding in both views, so its cosine is always 1.
    """
    layers = finite_list(values)
    return mean(layers[1:] if len(layers) > 1 else layers)


def percent(rate: object) -> str:
    """Format a rate in 0..1 as percent with one decimal, without the sign: 0.25 -> '25.0'."""
    number = finite(rate)
    return DASH if number is None else f"{100 * number:.1f}"


def signed_percent(rate: object) -> str:
    """Format a difference of rates, or a relative change, with its sign: -0.25 -> '-25.0'."""
    number = finite(rate)
    if number is None:
        return DASH
    text = f"{100 * number:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def decimals(value: object, places: int = 3) -> str:
    """Format a number with a fixed number of decimals."""
    number = finite(value)
    return DASH if number is None else f"{number:.{places}f}"


def interval(values: object, signed: bool = False) -> str:
    """Format an interval of rates as '[21.4, 29.0]' in percent; '' if there is none."""
    ends = pair(values)
    if ends is None:
        return ""
    form = signed_percent if signed else percent
    return f"[{form(ends[0])}, {form(ends[1])}]"


def p_value(value: object) -> str:
    """Format a p-value; below 0.0001 only as a bound, since more digits mean nothing."""
    number = finite(value)
    if number is None:
        return DASH
    return "< 0.0001" if number < 1e-4 else f"{number:.4f}"


class Unit(NamedTuple):
    """How a metric is printed: ``suffix`` follows its header, ``form`` makes its text, ``words`` name the unit."""

    suffix: str
    form: Callable[[object], str]
    words: str


# The units of evaluation/metrics.py.
UNITS = {
    "share": Unit(" %", percent, "percent"),
    "points": Unit(" pp", signed_percent, "percentage points"),
    "change": Unit(" %", signed_percent, "percent"),
    "nats": Unit("", decimals, "nats per token"),
    "tokens": Unit("", lambda value: decimals(value, 1), "tokens"),
    "turns": Unit("", lambda value: decimals(value, 2), "turns"),
    "cosine": Unit("", lambda values: decimals(mean_over_layers(values)), "mean over layers"),
    "p-value": Unit("", p_value, "probability"),
    "word": Unit("", lambda value: str(value or DASH), "a word"),
}


def shorten(number: int) -> str:
    """Three digits and a prefix, to be followed by a unit: "8.03 G", "21 M", "512 "."""
    rounded = float(f"{number:.3g}")
    power = min((len(str(int(rounded))) - 1) // 3, 6)
    return f"{rounded / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
