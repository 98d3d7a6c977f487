"""Read an answer from a response and compare it with a reference.

Most graders read an answer twice. Strictly: only in the format that the prompt asks for. Leniently: wherever it can be
found. Both are reported, to separate a loss of format from a loss of knowledge. Reasoning between ``<think>`` and
``</think>`` is never an answer.
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


def normalize_width(text: str) -> str:
    """Replace letters and digits of other widths and styles by ordinary ones (NFKC)."""
    return unicodedata.normalize("NFKC", text)


def strip_reasoning(response: str) -> tuple[str, str | None]:
    """Return (the text outside of the reasoning, the reason if there is none)."""
    before, opened, after = response.partition("<think>")
    if opened and "</think>" not in after:
        return before, None if before.strip() else ENDLESS_REASONING
    said = response.rpartition("</think>")[2]
    if said.strip():
        return said, None
    return "", ONLY_REASONING if response.strip() else EMPTY


def read_tags(response: str) -> tuple[list[str], str, str | None]:
    """Return (contents of the <answer> tags, the text outside of the reasoning, the reason if there are no tags)."""
    said, reason = strip_reasoning(normalize_width(response))
    found = [content.strip() for content in TAGS.findall(said)]
    if found or reason:
        return found, said, reason
    if re.search(r"(?i)<answer>", said):
        return found, said, NOT_CLOSED
    return found, said, ONLY_REASONING if TAGS.search(normalize_width(response)) else NO_TAGS


def _agree(answers: list[str | None], what: str) -> tuple[str | None, str | None]:
    """Return (the answer that all tags agree on, the reason if there is none)."""
    if None in answers:
        return None, f"not {what}"
    return (answers[0], None) if len(set(answers)) == 1 else (None, TWO)


def _find_last_answer(contents: list[str], said: str) -> str:
    """Return the text in the last tag, closed or not; the whole text if there is no tag."""
    return contents[-1] if contents else re.split(r"(?i)<answer>", said)[-1]


def grade_yes_no(response: str, reference: str) -> Grade:
    """Grade ``<answer>yes</answer>`` against "yes" or "no".

    Leniently: the first word of the last tag, or of a response without tags, if it is "yes" or "no"; else whichever of
    the two occurs, if only one does.
    """
    contents, said, reason = read_tags(response)
    parsed = None
    if contents:
        words = [content.strip(" \n.!*_\"'").casefold() for content in contents]
        parsed, reason = _agree([word if word in ("yes", "no") else None for word in words], "yes or no")
    words = re.findall(r"[^\W_]+", _find_last_answer(contents, said).casefold())
    found = {word for word in words if word in ("yes", "no")}
    lenient = words[0] if words and words[0] in found else found.pop() if len(found) == 1 else None
    return Grade(parsed, parsed == reference, reason, lenient == reference)


def grade_letter(response: str, reference: str, letters: str = "ABCD") -> Grade:
    """Grade ``<answer>B</answer>``, also in the form "(b)" or "B. its text", against "B".

    Leniently: the letter after the last "answer", "option" or "choice"; else the only separate capital letter.
    """
    contents, said, reason = read_tags(response)
    parsed = None
    if contents:
        matches = [re.fullmatch(rf"(?is)[(*\s]*([{letters}])[)*\s]*(?:[.:)-].*)?", content) for content in contents]
        parsed, reason = _agree([match and match[1].upper() for match in matches], f"one of {letters}")
    text = _find_last_answer(contents, said)
    named = re.findall(rf"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)[\s:*(]*([{letters}])\b(?! [a-z])", text)
    # "A" before a lower-case word is an article.
    alone = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])(?! [a-z])", text))
    lenient = parsed or (named[-1] if named else alone.pop() if len(alone) == 1 else None)
    return Grade(parsed, parsed == reference, reason, lenient == reference)


def find_last_number(text: str) -> str | None:
    """Return the last number of a text in canonical form ("1,234.50" -> "1234.5"), or None.

    In GSM8K solutions ("#### 72") and in most chat answers the last number is the answer.
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = float(found[-1].replace(",", ""))
    return str(int(number)) if number.is_integer() else repr(number)


def grade_number(response: str, reference: str) -> Grade:
    """Grade the last number of the response against the last number of the reference."""
    said, reason = strip_reasoning(normalize_width(response))
    parsed = None if reason else find_last_number(said)
    reason = reason or (NO_NUMBER if parsed is None else None)
    return Grade(parsed, parsed is not None and parsed == find_last_number(reference), reason)


def grade_exact(response: str, reference: str) -> Grade:
    """Grade the whole response against the reference, ignoring white space and case."""
    said, reason = strip_reasoning(response)
    parsed = " ".join(said.split()).casefold() or None
    return Grade(parsed, parsed == " ".join(reference.split()).casefold(), reason)


def grade_math(response: str, reference: str) -> Grade:
    r"""Grade the value of the last ``\boxed{}``, else of the last ``####`` or "Answer:", against the reference's value.

    Leniently: also correct if the last number of the response has the reference's value.
    """
    text = normalize_width(response)
    said, reason = strip_reasoning(text)
    answers = [] if reason else math_answers.find_answers(said)
    parsed = None
    if not reason and not answers:
        reason = ONLY_REASONING if math_answers.find_answers(text) else NO_PLACE
    elif answers:
        values = [math_answers.parse_value(answer) for answer in answers]
        if None in values:
            reason = NO_VALUE
        elif any(not math_answers.is_same_value(values[0], value) for value in values[1:]):
            reason = TWO
        else:
            parsed = answers[-1]
    target = math_answers.parse_value(normalize_width(reference))
    correct = parsed is not None and math_answers.is_same_value(target, math_answers.parse_value(parsed))
    number = None if correct else find_last_number(said)
    return Grade(parsed, correct, reason, correct or number is not None and math_answers.is_same_value(target, number))


# name -> grader
GRADERS = {
    "numeric": grade_number,
    "exact": grade_exact,
    "yes_no": grade_yes_no,
    "letter": grade_letter,
    "letter_of_ten": functools.partial(grade_letter, letters="ABCDEFGHIJ"),
    "math": grade_math,
}
