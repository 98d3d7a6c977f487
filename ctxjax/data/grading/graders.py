"""Reading an answer from a response and comparing it with a reference.

A strict reader takes the answer from the place that the prompt asked for. A lenient one takes it from wherever it can,
so that a drift of format and a loss of knowledge can be told apart: both are reported. Reasoning between ``<think>``
and ``</think>`` is never an answer.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from ctxjax.data.grading import math_answers
from ctxjax.data.grading.grade import Grade

EMPTY, NO_TAGS, NOT_CLOSED, TWO = "empty", "no <answer> tags", "<answer> is not closed", "two different answers"
ONLY_REASONING, ENDLESS_REASONING = "answer only in the reasoning", "reasoning is not closed"
NO_NUMBER, NO_PLACE, NO_VALUE = "no number", "no boxed, #### or Answer:", "not a number or an expression"
TAGS = re.compile(r"(?is)<answer>(.*?)</answer>")


def plain(text: str) -> str:
    """With letters and digits of other widths and styles as the ordinary ones."""
    return unicodedata.normalize("NFKC", text)


def visible(response: str) -> tuple[str, str | None]:
    """(what stands outside of the reasoning, why there is nothing)."""
    before, opened, after = response.partition("<think>")
    if opened and "</think>" not in after:
        return before, None if before.strip() else ENDLESS_REASONING
    said = response.rpartition("</think>")[2]
    if said.strip():
        return said, None
    return "", ONLY_REASONING if response.strip() else EMPTY


def tagged(response: str) -> tuple[list[str], str, str | None]:
    """(contents of the <answer> tags, the visible text, why there are none)."""
    said, reason = visible(plain(response))
    found = [content.strip() for content in TAGS.findall(said)]
    if found or reason:
        return found, said, reason
    if re.search(r"(?i)<answer>", said):
        return found, said, NOT_CLOSED
    return found, said, ONLY_REASONING if TAGS.search(plain(response)) else NO_TAGS


def _agreed(answers: list[str | None], what: str) -> tuple[str | None, str | None]:
    """(the one answer that all tags give, why there is none)."""
    if None in answers:
        return None, f"not {what}"
    return (answers[0], None) if len(set(answers)) == 1 else (None, TWO)


def _last_answer(contents: list[str], said: str) -> str:
    """The text within the last tag, closed or not; where there is none, the whole."""
    return contents[-1] if contents else re.split(r"(?i)<answer>", said)[-1]


def yes_no(response: str, reference: str) -> Grade:
    """``<answer>yes</answer>`` against "yes" or "no". Leniently: the first word of the last tag, or of a response
    without tags, where it is one of the two; or else the only one of the two that is said at all."""
    contents, said, reason = tagged(response)
    parsed = None
    if contents:
        words = [content.strip(" \n.!*_\"'").casefold() for content in contents]
        parsed, reason = _agreed([word if word in ("yes", "no") else None for word in words], "yes or no")
    words = re.findall(r"[^\W_]+", _last_answer(contents, said).casefold())
    found = {word for word in words if word in ("yes", "no")}
    lenient = words[0] if words and words[0] in found else found.pop() if len(found) == 1 else None
    return Grade(parsed, parsed == reference, reason, lenient == reference)


def letter(response: str, reference: str, letters: str = "ABCD") -> Grade:
    """``<answer>B</answer>``, also as "(b)" or "B. its text", against "B". Leniently: the letter after the last
    "answer" or "option", or else the only capital one that stands alone."""
    contents, said, reason = tagged(response)
    parsed = None
    if contents:
        matches = [re.fullmatch(rf"(?is)[(*\s]*([{letters}])[)*\s]*(?:[.:)-].*)?", content) for content in contents]
        parsed, reason = _agreed([match and match[1].upper() for match in matches], f"one of {letters}")
    text = _last_answer(contents, said)
    named = re.findall(rf"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)[\s:*(]*([{letters}])\b(?! [a-z])", text)
    # "A" before a word in small letters is an article.
    alone = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])(?! [a-z])", text))
    lenient = parsed or (named[-1] if named else alone.pop() if len(alone) == 1 else None)
    return Grade(parsed, parsed == reference, reason, lenient == reference)


def last_number(text: str) -> str | None:
    """The last number of a text in a canonical form ("1,234.50" -> "1234.5"), or None.

    It stands where a solution's answer stands in GSM8K ("#### 72") and in most chat answers.
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = float(found[-1].replace(",", ""))
    return str(int(number)) if number.is_integer() else repr(number)


def numeric(response: str, reference: str) -> Grade:
    """The last number of the response against the last number of the reference."""
    said, reason = visible(plain(response))
    parsed = None if reason else last_number(said)
    reason = reason or (NO_NUMBER if parsed is None else None)
    return Grade(parsed, parsed is not None and parsed == last_number(reference), reason)


def exact(response: str, reference: str) -> Grade:
    """The whole response against the reference, white space and case aside."""
    said, reason = visible(response)
    parsed = " ".join(said.split()).casefold() or None
    return Grade(parsed, parsed == " ".join(reference.split()).casefold(), reason)


def math(response: str, reference: str) -> Grade:
    r"""The last ``\boxed{}``, or else the last ``####`` or "Answer:", by its value against an answer's text.

    Leniently: right as well where the response's last number has the reference's value.
    """
    text = plain(response)
    said, reason = visible(text)
    answers = [] if reason else math_answers.answers(said)
    parsed = None
    if not reason and not answers:
        reason = ONLY_REASONING if math_answers.answers(text) else NO_PLACE
    elif answers:
        values = [math_answers.value(answer) for answer in answers]
        if None in values:
            reason = NO_VALUE
        elif any(not math_answers.same(values[0], value) for value in values[1:]):
            reason = TWO
        else:
            parsed = answers[-1]
    target = math_answers.value(plain(reference))
    correct = parsed is not None and math_answers.same(target, math_answers.value(parsed))
    number = None if correct else last_number(said)
    return Grade(parsed, correct, reason, correct or number is not None and math_answers.same(target, number))


# name -> what reads a response and compares it with a reference
GRADERS = {
    "numeric": numeric,
    "exact": exact,
    "yes_no": yes_no,
    "letter": letter,
    "letter_of_ten": functools.partial(letter, letters="ABCDEFGHIJ"),
    "math": math,
}
