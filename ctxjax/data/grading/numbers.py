r"""Read the numbers of a text, each as one value in canonical form: "1,234.50" -> "1234.5", "3/4" -> "0.75".

A sign, a currency, a fraction, a mixed number and a power belong to the number; the power of a unit does not: "25 m²"
is 25. A hyphen after a letter, a digit or a bracket is no sign: the numbers of "10-12" are 10 and 12.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction
import re
import unicodedata

LONGEST_EXPONENT = 1000  # of numbers that are written out, and digits of fractions and powers that are computed

_SUPERSCRIPTS, _VULGAR = "⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱ", "¼-¾⅐-⅞"
_DIGITS = r"(?:\d++(?:,\d{2,3}(?!\d))*+(?:\.\d++)?+|\.\d++)"
_TIMES = r"(?:[x×*·⋅]|\\times|\\cdot)"
_NUMBER = (
    r"(?<![\w.)\]}%°/])(?P<sign>-)?(?:\\?[$€£¥])?(?:"
    rf"(?P<whole>\d++ )?(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})(?! ?/ ?\d)|"
    rf"(?P<number>{_DIGITS}(?:[eE][-+]?\d+(?!\w))?)"
    rf"(?:\^\{{?(?P<power>-?\d++)\}}?| ?{_TIMES} ?10 ?\^ ?\{{?(?P<ten>-?\d++)\}}?)?)"
    r"|(?P<inner>\d[\d,]*(?:\.\d+)?)"
)
NUMBER = re.compile(_NUMBER)
_NUMBER_OR_WORD = re.compile(rf"{_NUMBER}|(?P<word>[^\W_]+)")
# A unit after a number, and its power, with which "2" and "3" may be written without a mark. One letter that is often a
# variable, or the e of 1e3, is no unit.
_UNIT_POWER = re.compile(
    r"(?<=\d)(?P<unit>(?:\s|\\[,; ]|~)*"
    r"(?:\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?=\^)|"
    r"(?![enxyzE](?![^\W\d_]))[^\W\d_]+(?:[/*·⋅][^\W\d_]+)*))"
    r"(?:\^\{?(?P<marked>-?\d+)\}?|(?P<unmarked>[23])(?!\w|[.,]\d))"
)
# What comes before or after a number that is only a part of what is written: 10:30, 2024-05-17, x^2, \sqrt{2}, 2\pi.
_PART_BEFORE = re.compile(
    r"(?:(?:\d[^\W\d_]*|[%°)\]}])(?:[-\u2010-\u2015:.'\u2019]|\s*[/^×÷]\s*)|\^|\}\{|\\[dt]?frac|\\sqrt|√)\{?-?$"
)
_PART_AFTER = re.compile(r"\s*(?:\^|√|π|\\sqrt|\\pi)")
_NO_WORDS = re.compile(r"[\d\s.,;+±*·×÷/()\[\]{}|$€£¥%°-]+")  # several numbers in such a text are a list or a sum
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{2,3})*,\d{3}")


def normalize_width(text: str) -> str:
    """Replace letters and digits of other widths and styles by ordinary ones (NFKC), and the minus sign by a hyphen."""
    return unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")


def normalize_powers(text: str) -> str:
    """``normalize_width`` that keeps values: 10² becomes 10^{2}, and 1½ becomes 1 1/2."""
    text = re.sub(rf"(?<=\d)(?=[{_VULGAR}]|[{_SUPERSCRIPTS}]+\N{{FRACTION SLASH}})", " ", text)
    text = re.sub(rf"[{_SUPERSCRIPTS}]++(?!\N{{FRACTION SLASH}})", lambda power: f"^{{{power[0]}}}", text)
    return normalize_width(text).replace("\N{FRACTION SLASH}", "/")


def _simplify(text: str) -> str:
    """Write powers, fractions and thousands as NUMBER reads them."""
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))", ",", normalize_powers(text))
    frac = re.compile(r"(\d?)\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
    return frac.sub(lambda found: f"{found[1]}{found[1] and ' '}{found[2]}/{found[3]}", text)


def find_numbers(text: str) -> list[str]:
    """Return the numbers of a text in canonical form, with all their digits."""
    return [number for match in NUMBER.finditer(_drop_unit_powers(_simplify(text))) for number in _read(match)]


def find_last_number(text: str) -> str | None:
    """Return the last number of a text, or None.

    In GSM8K solutions ("#### 72") and in most chat answers the last number is the answer.
    """
    found = find_numbers(text)
    return found[-1] if found else None


def find_separate_number(text: str) -> str | None:
    """Return the last number of a text; None if there is none, or if it is a part of something else, such as a time, a
    date, a range, a list or an expression."""
    text = _drop_unit_powers(_simplify(text))
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    last, read = matches[-1], _read(matches[-1])
    before, groups = text[: last.start()], re.findall(r"\d[\d,]*\d", last[0])
    is_spaced = re.match(r"\d{3}(?!\d)", last[0]) and re.search(r"(?<![\d.])\d{1,3} $", before)  # 1 000
    is_part = len(read) != 1 or is_spaced or _PART_BEFORE.search(before) or _PART_AFTER.match(text, last.end())
    is_list = len(matches) > 1 and _NO_WORDS.fullmatch(text)
    is_grouped = all("," not in group or _THOUSANDS.fullmatch(group) for group in groups)
    return read[0] if is_grouped and not is_part and not is_list else None


def is_number(text: str) -> bool:
    """Whether the text is one number and nothing else."""
    return NUMBER.fullmatch(_simplify(text).strip()) is not None


def find_numbers_and_words(text: str) -> list[str]:
    """Return the numbers of a text in canonical form and its words, in order. A unit keeps its power: "m2"."""
    text = _UNIT_POWER.sub(lambda found: found["unit"] + (found["marked"] or found["unmarked"]), _simplify(text))
    matches = _NUMBER_OR_WORD.finditer(text)
    return [token for match in matches for token in ([match["word"]] if match["word"] else _read(match))]


def _drop_unit_powers(text: str) -> str:
    return _UNIT_POWER.sub(r"\g<unit>", text)


def _read(match: re.Match) -> list[str]:
    """Return the number of a match of NUMBER, or its parts if they make no number that can be computed (5/0)."""
    found = {name: text.strip().replace(",", "") for name, text in match.groupdict().items() if text}
    sign = found.pop("sign", "")
    parts = list(found.values())
    if len(parts) > 1:
        try:
            return [_format_fraction(_compute(**found) * (-1 if sign else 1))]
        except (ZeroDivisionError, OverflowError):
            pass
    try:
        return [format_number(Decimal(part)) for part in (sign + parts[0], *parts[1:])]
    except InvalidOperation:  # an exponent of 19 digits and more: no number that can be held
        return []


def _compute(
    number: str = "0", power: str = "1", ten: str = "0", whole: str = "0", top: str = "0", bottom: str = "1"
) -> Fraction:
    """Return number ** power * 10 ** ten + whole + top / bottom. Raises OverflowError if it is too long."""
    values = [Decimal(text) for text in (number, power, ten, whole, top, bottom)]
    sizes = [len(value.as_tuple().digits) + abs(value.as_tuple().exponent) for value in values]
    if max(*sizes, sizes[0] * abs(values[1]), abs(values[2])) > LONGEST_EXPONENT:
        raise OverflowError("too long to compute")
    base, exponent, ten_exponent, *rest = map(Fraction, values)
    return base ** int(exponent) * Fraction(10) ** int(ten_exponent) + rest[0] + rest[1] / rest[2]


def _format_fraction(value: Fraction) -> str:
    """Return "0.75", or "1/3" if the decimals do not end."""
    rest, counts = value.denominator, []
    for prime in (2, 5):
        counts.append(0)
        while rest % prime == 0:
            rest, counts[-1] = rest // prime, counts[-1] + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(counts)
    return format_number(Decimal(f"{(value * 10**places).numerator}e-{places}"))


def format_number(number: Decimal) -> str:
    """Format a number in one way, whatever way it was written: "1234.5", "0.0000001", "1E+999999999" if too long."""
    if not number:
        return "0"
    _, digits, exponent = number.as_tuple()
    while digits[-1] == 0:  # Decimal.normalize would round to the context's precision
        digits, exponent = digits[:-1], exponent + 1
    exact = Decimal((number.is_signed(), digits, exponent))
    return f"{exact:f}" if abs(exponent) <= LONGEST_EXPONENT else str(exact)
