"""Numbers as the report prints them. Missing, null and non-finite values all become a dash."""

from collections.abc import Sequence
import math

DASH = "-"


def finite(value: object) -> float | None:
    """Returns `value` as a float, or None where it is not a finite number (booleans are not numbers here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def finite_list(values: object) -> list[float | None]:
    """Returns a list with None at the missing places, so that indices keep their meaning."""
    return [finite(value) for value in values] if isinstance(values, list | tuple) else []


def pair(values: object) -> tuple[float, float] | None:
    """Returns an interval (low, high), or None unless both ends are finite."""
    ends = finite_list(values)
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def percent(rate: object) -> str:
    """Formats a rate in 0..1 as percent with one decimal, without the sign: 0.25 -> '25.0'."""
    number = finite(rate)
    return DASH if number is None else f"{100 * number:.1f}"


def signed_percent(rate: object) -> str:
    """Formats a difference of rates (or a relative change) with its sign: -0.25 -> '-25.0'."""
    number = finite(rate)
    if number is None:
        return DASH
    text = f"{100 * number:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def decimals(value: object, places: int = 3) -> str:
    """Formats a number with a fixed count of decimals."""
    number = finite(value)
    return DASH if number is None else f"{number:.{places}f}"


def interval(values: object, signed: bool = False) -> str:
    """Formats an interval of rates as '[21.4, 29.0]' in percent, or '' where there is none."""
    ends = pair(values)
    if ends is None:
        return ""
    form = signed_percent if signed else percent
    return f"[{form(ends[0])}, {form(ends[1])}]"


def p_value(value: object) -> str:
    """Formats a p-value; tiny ones as a bound, since their digits carry no meaning."""
    number = finite(value)
    if number is None:
        return DASH
    return "< 0.0001" if number < 1e-4 else f"{number:.4f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the entries that are present, or None where there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
