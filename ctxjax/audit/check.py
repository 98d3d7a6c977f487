"""One check: what it looked at, what contradicts, and what it could not look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import math
from typing import Any

SHOWN = 5  # contradictions of one check that are printed; the others are counted
SUMS = 1e-4  # relative: sums of float32 numbers in another order
LONGEST = 160  # characters of a printed value


@dataclasses.dataclass
class Check:
    """``seen``: what was looked at, in words. ``wrong``: contradictions. ``unchecked``: what could not be checked."""

    name: str
    seen: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    unchecked: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def run(cls, name: str, function: Callable[[Check], None]) -> Check:
        """Return the check that ``function`` fills. A file that is missing or cannot be read is a contradiction."""
        check = cls(name)
        try:
            function(check)
        except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
            readable = str(error) if isinstance(error, (OSError, ValueError)) else f"cannot be read: {error!r}"
            check.wrong.append(" ".join(readable.split()))
        return check

    def expect(self, where: str, found: Any, expected: Any, rounding: float = 1e-9) -> None:
        """Note a contradiction unless ``found`` equals ``expected``, numbers up to a relative ``rounding``."""
        if not is_same(found, expected, rounding):
            self.wrong.append(f"{where} is {_show(found)}, expected {_show(expected)}")

    @property
    def text(self) -> str:
        """The lines to print."""
        lines = [f"WRONG {self.name}: {problem}" for problem in self.wrong[:SHOWN]]
        if len(self.wrong) > SHOWN:
            lines.append(f"WRONG {self.name}: and {len(self.wrong) - SHOWN} more")
        if not self.wrong and self.seen:
            lines.append(f"OK    {self.name}: {'; '.join(self.seen)}")
        return "\n".join(lines + [f"?     {self.name}: not checked: {reason}" for reason in self.unchecked])


def is_same(found: Any, expected: Any, rounding: float) -> bool:
    """Whether two JSON values are the same; NaN equals NaN."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(is_same(found[k], expected[k], rounding) for k in found)
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(is_same, found, expected, [rounding] * len(found)))
    if isinstance(found, float) or isinstance(expected, float):
        if not all(isinstance(value, (int, float)) for value in (found, expected)):
            return False
        both_nan = found != found and expected != expected
        return both_nan or math.isclose(found, expected, rel_tol=rounding, abs_tol=rounding)
    return type(found) is type(expected) and found == expected


def list_numbers(numbers: Iterable[int]) -> str:
    """Write numbers as "1-3, 7"; many are cut off."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:SHOWN]]
    return ", ".join(texts) + (", ..." if len(runs) > SHOWN else "")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
