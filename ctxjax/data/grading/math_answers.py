r"""Mathematical answers: where they stand in a response, and whether two have the same value.

Values are compared by math-verify (sympy behind it): 1/2 is 0.5 and \frac{1}{2}, 1,234 is 1234, sets and tuples go by
their members. What is done here is to find the answer and to take off what is not its value: units, currency, words.
"""

from __future__ import annotations

import functools
import re
import threading

NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
# Names that are values or functions; any other word of three letters says that there is no value.
NAMES = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan", "infty", "inf"}
SECONDS = 5  # for one parse or one comparison: some expressions are too large to evaluate


def answers(text: str) -> list[str]:
    r"""The answer as the text gives it, more than one where its last line has several: the contents of ``\boxed{}``,
    or else what follows the last ``####``, or else the last "Answer:" that begins a line."""
    boxes = _boxes(text)
    if boxes:
        last_line = text.rfind("\n", 0, boxes[-1][0]) + 1
        return [content for start, content in boxes if start >= last_line]
    after = re.findall(r"####[ \t]*(.+)", text) or re.findall(
        r"(?im)^[*_\s>]*(?:final )?answer[*_]*:[*_]*[ \t]*(.+)", text
    )
    return [after[-1].strip()] if after else []


def _boxes(text: str) -> list[tuple[int, str]]:
    """(place, content) of every box that is closed; braces in it are counted."""
    found = []
    for opening in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for place in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found.append((opening.start(), text[opening.end() : place].strip()))
                break
    return found


def bare(answer: str) -> str:
    r"""An answer without delimiters, currency, units and words: "\$1,234.50 per year." -> "1234.50"."""
    text = answer.strip().strip("*_`").strip()
    text = re.sub(r"^(?:\$\$|\\\(|\\\[|\$)(?=.)|(?:\$\$|\\\)|\\\]|(?<!\\)\$)\.?$", "", text.rstrip(". "))
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", " ").replace("\\ ", " ").replace("~", " ")
    text = re.sub(r"^\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}$", r"\1", text)
    text = re.sub(r"\\?\$|€|£|¥", "", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|°", "", text)
    # Words behind a number or a closing brace are its unit.
    text = re.sub(r"(?<=[\d}%])\s*\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", "", text)
    if match := re.fullmatch(rf"({NUMBER}(?:\s*/\s*{NUMBER})?)\s*(\\?%)?(?:\s+[^\d\s=+*/^\\-][^\d=+*/^\\]*)?", text):
        text = match[1] + ("%" if match[2] else "")
    if re.fullmatch(r"[-+]?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?%?", text):
        text = re.sub("[, ]", "", text)
    text = re.sub(r"^(-?)(\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1(\2+\3/\4)", text)  # 1 1/2
    return text.strip()


def value(answer: str):
    """The value of an answer's text, in a form for ``same``; None where it is not a number or an expression."""
    text = bare(answer)
    words = set(re.findall(r"[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", text).casefold()))
    if not re.search(r"\w", text) or words - NAMES:
        return None
    if re.fullmatch(rf"{NUMBER}", text) and "," not in text:
        return text  # most answers: nothing to parse
    return _parsed(text)


def _timeout() -> int | None:
    """math-verify interrupts itself with a signal, which reaches the main thread alone."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(maxsize=4096)
def _parsed(text: str):
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse  # sympy takes seconds to import

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    found = parse(f"${text}$", configs, fallback_mode="no_fallback", parsing_timeout=_timeout())
    return tuple(found) or None


def same(a, b) -> bool:
    """Whether two values are equal: exactly, or as numbers that differ by rounding in the sixth decimal place."""
    if a is None or b is None:
        return False
    if isinstance(a, str) and isinstance(b, str):
        return abs(float(a) - float(b)) < 5e-7 or a == b
    from math_verify import verify

    gold, answer = (list(_parsed(v) or ()) if isinstance(v, str) else list(v) for v in (a, b))
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=_timeout())
