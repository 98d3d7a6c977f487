r"""Find mathematical answers in a response, and decide whether two have the same value.

math-verify (which uses sympy) compares values: 1/2 equals 0.5 and \frac{1}{2}, 1,234 equals 1234, and sets and tuples
are compared member by member. This module finds the answer and removes units, currency and words.
"""

from __future__ import annotations

import dataclasses
from decimal import Decimal, localcontext
import functools
import re
import threading
from typing import NamedTuple

from ctxjax.data.grading.numbers import find_last_number

NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
# Names of values and functions. A text with any other word of three or more letters has no value.
NAMES = {
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan", "infty", "inf",
    "pmatrix", "bmatrix", "vmatrix", "matrix",
}  # fmt: skip
TEXT = re.compile(r"(?s)\\(?:text|textbf|textrm|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
UNIT_WITH_POWER = r"(?:(?:[cdkm]?m|in|ft|yd|mi)\^\{?[23]\}?|k?m/s\^\{?2\}?)"
# Decimal places from which a number may be a rounding of another, and up to which that is tried.
ROUNDED_PLACES, LONGEST_PLACES = 6, 1000
SECONDS = 5  # time limit of one parse or comparison: some expressions are too large to evaluate


def find_answers(text: str) -> list[str]:
    r"""Return the answers as text: all ``\boxed{}`` in the line of the last one; else the text after the last ``####``
    or the last "Answer:" at the beginning of a line, whichever is later."""
    boxes = _find_boxes(text)
    if boxes:
        last_line = text.rfind("\n", 0, boxes[-1][0]) + 1
        return [content for start, content in boxes if start >= last_line]
    # "#### Step 2: ..." is a heading.
    after = re.findall(
        r"(?im)####[ \t]*(?:(?:final )?answer[*_]*:[*_]*[ \t]*)?(?![ \t]*step\b)(.+)"
        r"|^[-*_#\s>]*(?:final )?answer[*_]*:[*_]*[ \t]*(.+)",
        text,
    )
    return ["".join(after[-1]).strip()] if after else []


def _find_boxes(text: str) -> list[tuple[int, str]]:
    """Return (position, content) of every box with matching braces."""
    found = []
    for opening in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append((opening.start(), text[opening.end() : end].strip()))
                break
    return found


def strip_units(answer: str) -> str:
    r"""Remove delimiters, currency, units and words from an answer: "\$1,234.50 per year." -> "1234.50"."""
    text = answer.strip().strip("*_`").strip()
    text = re.sub(r"^(?:\$\$|\\\(|\\\[|\$)(?=.)|(?:\$\$|\\\)|\\\]|(?<!\\)\$)\.?$", "", text.rstrip(". "))
    text = text.replace("{,}", ",").replace("~", " ")
    text = re.sub(r"(?<!\\)\\!", "", text)
    text = re.sub(r"(?<!\\)\\[, ]", " ", text)  # a space, not a matrix's next row
    text = re.sub(r"^\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}$", r"\1", text)
    text = re.sub(r"\\?\$|€|£|¥", "", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|°", "", text)
    # Words after a number or a closing brace are a unit.
    text = re.sub(r"(?<=[\d}%])\s*\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", "", text)
    unit = rf"\s+(?:{UNIT_WITH_POWER}|[^\d\s=+*/^\\-][^\d=+*/^\\]*)"
    if match := re.fullmatch(rf"({NUMBER}(?:\s*/\s*{NUMBER})?)\s*(\\?%)?(?:{unit})?", text):
        text = match[1] + ("%" if match[2] else "")
    if re.fullmatch(r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?%?", text):
        text = re.sub("[, ]", "", text)
    text = re.sub(r"^(-?)(\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1(\2+\3/\4)", text)  # 1 1/2
    return text.strip()


class Text(NamedTuple):
    """The value of an answer in words."""

    words: str


def parse_text(answer: str) -> Text | None:
    r"""Parse an answer in words, inside ``\text{}`` or not: case, white space and brackets do not count."""
    inner = TEXT.fullmatch(answer.strip().strip("$. "))
    words = " ".join((inner[1] if inner else answer).split()).strip("()[]. ").casefold()
    return Text(words) if words else None


def parse_value(answer: str):
    r"""Parse an answer for ``is_same_value``. None if it is not a number, an expression or a ``\text{}``."""
    inner = TEXT.fullmatch(answer.strip().strip("$. "))
    if inner and not re.search(r"\d", inner[1]):
        return parse_text(answer)
    text = strip_units(answer)
    words = set(re.findall(r"[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", text).casefold()))
    if not re.search(r"\w", text) or words - NAMES:
        return None
    if re.fullmatch(rf"{NUMBER}", text) and "," not in text:
        return text if find_last_number(text) else None  # a plain number needs no parser
    return _parse(text)


def _timeout() -> int | None:
    """Return the time limit, or None outside the main thread: math-verify's signal reaches only the main thread."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(maxsize=4096)
def _parse(text: str):
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse  # sympy takes seconds to import

    usual = LatexExtractionConfig()
    # Its units are single letters, too: the "h" of \pi r^2 h. ``strip_units`` has removed those after a number.
    configs = [
        dataclasses.replace(usual, normalization_config=dataclasses.replace(usual.normalization_config, units=False)),
        ExprExtractionConfig(),
    ]
    found = parse(f"${text}$", configs, fallback_mode="no_fallback", parsing_timeout=_timeout())
    return tuple(found) or None


def is_same_value(a, b) -> bool:
    """Whether two values are equal.

    Plain numbers are compared digit by digit; a number with at least six decimal places may be a rounding of the other.
    Expressions are compared by their value, rounded to six places and to 0.2 %.
    """
    if a is None or b is None:
        return False
    if isinstance(a, Text) or isinstance(b, Text):
        return a == b
    if isinstance(a, str) and isinstance(b, str):
        return _is_same_number(Decimal(a), Decimal(b))
    from math_verify import verify

    gold, answer = (list(_parse(v) or ()) if isinstance(v, str) else list(v) for v in (a, b))
    if not (gold and answer and verify(gold, answer, timeout_seconds=_timeout())):
        return False
    one, two = _to_float(gold[0]), _to_float(answer[0])
    return None in (one, two) or abs(one - two) <= 2e-3 * max(abs(one), abs(two))


def _is_same_number(a: Decimal, b: Decimal) -> bool:
    shorter, longer = sorted((a, b), key=lambda number: -number.as_tuple().exponent)
    places = -shorter.as_tuple().exponent
    if a == b or places < ROUNDED_PLACES or places > LONGEST_PLACES or longer.adjusted() > LONGEST_PLACES:
        return a == b
    with localcontext(prec=3 * LONGEST_PLACES):
        return longer.quantize(Decimal(1).scaleb(-places)) == shorter


def _to_float(value) -> float | None:
    """Return the value of a real number of sympy, None for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
