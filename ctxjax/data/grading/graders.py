"""Read an answer from a response and compare it with a reference; read references from the values that data files have.

Most graders read an answer twice. Strictly: only in the format that the prompt asks for. Leniently: wherever it can be
found. Both are reported, to separate a loss of format from a loss of knowledge. Reasoning between ``<think>`` and
``</think>`` is never an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from decimal import Decimal
import functools
import re
from typing import NamedTuple

from ctxjax.data.grading import math_answers
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.numbers import (
    find_last_number,
    find_numbers,
    find_numbers_and_words,
    find_separate_number,
    format_number,
    is_number,
    normalize_powers,
    normalize_width,
)
from ctxjax.data.grading.reasoning import (
    CLOSE_REASONING,
    ONLY_REASONING,
    OPEN_REASONING,
    OTHER_REASONING,
    strip_reasoning,
)

NO_TAGS, NOT_CLOSED, TWO = "no <answer> tags", "<answer> is not closed", "two different answers"
NO_YES_NO, NO_WORDS = "neither yes nor no", "no words"
NO_NUMBER, NO_PLACE, NO_VALUE = "no number", "no boxed, #### or Answer:", "not a number or an expression"
READ_TAGS = (OPEN_REASONING, CLOSE_REASONING, *OTHER_REASONING, "<answer>", "</answer>")
# Words that say nothing by themselves; "not" and "no" do.
GRAMMAR = {
    "and", "are", "as", "at", "be", "been", "by", "can", "do", "does", "for", "from", "had", "has", "have",
    "he", "i", "in", "is", "it", "its", "of", "on", "or", "s", "she", "that", "their", "there", "they", "this",
    "to", "was", "we", "were", "which", "who", "will", "with", "would", "you", "your",
}  # fmt: skip
BEFORE_WORD = r" (?!(?:and|as|because|but|since|which)\b)[a-z]"  # after an article or a pronoun, not after an option
NEGATIONS = {"no", "not", "never", "none", "neither"}
LEAST_F1 = 0.5  # of a response that agrees with a reply
TAGS = re.compile(r"(?is)<answer>(.*?)</answer>")


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


def _match_letter(text: str, letters: str) -> str | None:
    """Return the letter of "b", "(B)", "**B**", "B. its text" or "B - its text", or None: "D-dimer" is no letter."""
    match = re.fullmatch(rf"(?is)[(*\s]*([{letters}])[)*\s]*(?:(?:[.:)]|(?<![^\W_])-|-(?![^\W_])).*)?", text)
    return match and match[1].upper()


def grade_letter(response: str, reference: str, letters: str = "ABCD") -> Grade:
    """Grade ``<answer>B</answer>``, also in the form "(b)" or "B. its text", against "B".

    Leniently: the letter after the last "answer", "option" or "choice"; else the only separate capital letter.
    """
    contents, said, reason = read_tags(response)
    parsed = None
    if contents:
        parsed, reason = _agree([_match_letter(content, letters) for content in contents], f"one of {letters}")
    text = _find_last_answer(contents, said)
    named = re.findall(
        rf"(?i:\b(?:(answer)|option|choice)\b(?:\s+is)?)[\s:*(]*"
        rf"(?!I{BEFORE_WORD})(?(1)(?!A{BEFORE_WORD}))([{letters}])\b",
        text,
    )
    # Before a lower-case word "A" is an article, and "C" may be a vitamin.
    alone = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])(?! [a-z])", text))
    lenient = parsed or (named[-1][1] if named else alone.pop() if len(alone) == 1 else None)
    return Grade(parsed, parsed == reference, reason, lenient == reference)


def grade_number(response: str, reference: str) -> Grade:
    """Grade the last number of the response against the last number of the reference."""
    said, reason = strip_reasoning(normalize_powers(response))
    parsed = None if reason else find_last_number(said)
    reason = reason or (NO_NUMBER if parsed is None else None)
    return Grade(parsed, parsed is not None and parsed == find_last_number(reference), reason)


def grade_exact(response: str, reference: str) -> Grade:
    """Grade the whole response against the reference, ignoring white space and case."""
    said, reason = strip_reasoning(response)
    parsed = " ".join(said.split()).casefold() or None
    return Grade(parsed, parsed == " ".join(reference.split()).casefold(), reason)


def grade_short(response: str, reference: str) -> Grade:
    """Grade an answer of a few words, alone or in a sentence: "It is the Blue Heron." against "blue heron".

    A reference "yes" or "no" is compared with the first of these two words. A number must occur, in any notation, and
    the words and numbers of any other reference one after the other; case, punctuation and articles do not count, but
    for an article at the reference's end, which is a name ("vitamin A"), and for the "+" and "#" of "C++" and "C#".
    """
    said, reason = strip_reasoning(normalize_powers(response))
    drop = str.casefold if re.search(r"(?i)(?<!\w)(?:an?|the)\W*$", reference) else _drop_case_and_articles
    words, wanted = (find_numbers_and_words(drop(normalize_powers(text))) for text in (said, reference))
    if wanted in (["yes"], ["no"]):
        parsed = next((word for word in words if word in ("yes", "no")), None)
        return Grade(parsed, [parsed] == wanted, reason or (None if parsed else NO_YES_NO))
    if is_number(reference):
        numbers = find_numbers(said)
        found = find_last_number(reference) in numbers
        return Grade(", ".join(numbers) or None, found, reason or (None if numbers else NO_NUMBER))
    parsed = said.strip() if words else None
    found = f" {' '.join(wanted)} " in f" {' '.join(words)} "
    if re.search(r"\w[+#]", reference):
        whole, text = (" ".join(normalize_powers(text).casefold().split()) for text in (reference, said))
        found = re.search(rf"(?<!\w){re.escape(whole.rstrip('.'))}(?![\w+#])", text) is not None
    return Grade(parsed, bool(wanted) and found, reason or (None if parsed else NO_WORDS))


def grade_overlap(response: str, reference: str) -> Grade:
    """Grade the words of a response against those of a reference reply: correct if their F1, as in SQuAD, is at least
    a half. Case, punctuation and articles do not count, nor does the order of words.

    F1 is 2 * shared / (words of the response + words of the reference), repeated words counted as often as they occur.
    """
    said, reason = strip_reasoning(normalize_width(response))
    words, wanted = (Counter(_find_answer_words(text)) for text in (said, reference))
    correct = 2 * (words & wanted).total() >= LEAST_F1 * max(words.total() + wanted.total(), 1)
    return Grade(said.strip() if words else None, correct, reason or (None if words else NO_WORDS))


def find_new_words(reply: str, question: str) -> str:
    """Return what a reply adds to its question: its words and numbers that the question does not have and that are more
    than grammar, in lower case and in order; all of its words if these say yes or no at most."""
    words, asked = _find_said(reply), {*_find_said(question), *GRAMMAR}
    new = [word for word in words if word not in asked]
    return " ".join(new if {*new} - {"yes", "no", "not"} else words)


def grade_new_words(response: str, reference: str) -> Grade:
    """Grade whether a response says what ``find_new_words`` has: more than half of its words, repeated ones as often,
    all of its numbers, and no denial of it, or a denial as it is one.
    """
    said, reason = strip_reasoning(response)
    words, wanted = _find_said(said), _find_said(reference)
    shared, numbers = Counter(words) & Counter(wanted), {word for word in wanted if is_number(word)}
    last = max((place for place, word in enumerate(words) if word in shared), default=-1)
    denies, is_denied = (not NEGATIONS.isdisjoint(part) for part in (words[: last + 1], wanted))
    correct = 2 * shared.total() > len(wanted) and numbers <= {*words} and denies == is_denied
    return Grade(said.strip() if words else None, correct, reason or (None if words else NO_WORDS))


def _find_said(text: str) -> list[str]:
    """Return the words and numbers of a text, in order; "isn't" is two words, of which one is "not"."""
    text = re.sub(r"(?i)\b(ca|wo)n['\u2019]t\b", r"\1 not", normalize_powers(text))
    text = re.sub(r"(?i)n['\u2019]t\b|(?<=can)not\b", " not", text)
    return find_numbers_and_words(_drop_case_and_articles(text))


def _find_answer_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", _drop_case_and_articles(normalize_width(text)))


def _drop_case_and_articles(text: str) -> str:
    """Drop case, articles, and the endings of ordinals such as "9th"."""
    text = re.sub(r"(\d)(?:st|nd|rd|th)\b", r"\1", text.casefold())
    return re.sub(r"(?<![^\W_])(?:an?|the)(?![^\W_])", " ", text)


def grade_math(response: str, reference: str) -> Grade:
    r"""Grade the value of the last ``\boxed{}``, else of the last ``####`` or "Answer:", against the reference's value.

    A reference ``\text{...}`` is a text; its case and brackets do not count. Leniently: also correct if the last number
    of the response has the reference's value.
    """
    text = normalize_powers(response)
    said, reason = strip_reasoning(text)
    answers = [] if reason else math_answers.find_answers(said)
    target = math_answers.parse_value(normalize_powers(reference))
    parse = math_answers.parse_text if isinstance(target, math_answers.Text) else math_answers.parse_value
    parsed = None
    if not reason and not answers:
        reason = ONLY_REASONING if math_answers.find_answers(text) else NO_PLACE
    elif answers:
        parsed, reason = _agree_on_value(answers, parse)
    correct = parsed is not None and math_answers.is_same_value(target, parse(parsed))
    number = None if correct else find_last_number(said)
    return Grade(
        parsed,
        correct,
        reason,
        correct or number is not None and math_answers.is_same_value(target, math_answers.parse_value(number)),
    )


def _agree_on_value(answers: list[str], parse: Callable = math_answers.parse_value) -> tuple[str | None, str | None]:
    """Return (the last answer, None) if all answers have one value, else (None, the reason)."""
    values = [parse(answer) for answer in answers]
    if None in values:
        return None, NO_VALUE
    if any(not math_answers.is_same_value(values[0], value) for value in values[1:]):
        return None, TWO
    return answers[-1], None


# --- References ---


def _refuse(value, wanted: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{shown[:60]}{'...' if len(shown) > 60 else ''} cannot be a reference; give {wanted}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and Decimal(str(value)).is_finite()


def read_number(value) -> str:
    """Return a number, or the last number of a text, in canonical form.

    Raises ValueError if there is none, or if it is only a part of what is written, such as the 30 of "10:30".
    """
    found = None
    if _is_number(value):
        found = format_number(Decimal(str(value)))
    elif isinstance(value, str):
        found = find_separate_number(value)
    if found is None:
        raise _refuse(
            value,
            "a number, or a text that ends in a separate one; or grade expressions with math and texts with short",
        )
    return found


def read_exact(value) -> str:
    """Return the value as text. Raises ValueError if it is empty."""
    if not str(value).strip():
        raise _refuse(value, "a text")
    return str(value)


def read_short(value) -> str:
    """Return the value as text, True and False as "yes" and "no". Raises ValueError if no word of it is compared."""
    text = read_yes_no(value) if isinstance(value, bool) else str(value)
    if not _find_answer_words(text):
        raise _refuse(value, "a text of a few words, a number, True or False")
    return text


def read_yes_no(value) -> str:
    """Return "yes" or "no" from such a word, with or without tags, or from True or False; else raise ValueError."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    words = TAGS.findall(value) or [value] if isinstance(value, str) else []
    word = words[-1].strip(" \n.!*_\"'").casefold() if words else ""
    if word not in ("yes", "no"):
        raise _refuse(value, '"yes", "no", True or False')
    return word


def read_letter(value, letters: str = "ABCD") -> str:
    """Return the letter of "b", "(B)", "B. its text" or a tag, or of an option's number (from 0, as class labels are).

    Raises ValueError for anything else. A text that is a number could count from 0 or from 1, so it is refused too.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    texts = TAGS.findall(value) or [value] if isinstance(value, str) else []
    letter = _match_letter(normalize_width(texts[-1]).strip(), letters) if texts else None
    if letter is None:
        wanted = f"a letter from {letters[0]} to {letters[-1]}, or the option's number, from 0 on, as an integer"
        raise _refuse(value, wanted)
    return letter


def read_math(value) -> str:
    r"""Return the answer of a worked solution (``\boxed{}``, ``####``, "Answer:"), or the value itself if it is one.

    Raises ValueError if it is not a number, an expression or a ``\text{}``, or if a solution has two answers.
    """
    text = format_number(Decimal(str(value))) if _is_number(value) else value if isinstance(value, str) else ""
    text = normalize_powers(text)
    answer, _ = _agree_on_value(math_answers.find_answers(text) or [text])
    if answer is None:
        wanted = r"a number, an expression, \text{...}, or a solution with its answer in \boxed{} or after ####"
        raise _refuse(value, wanted)
    return answer


class Grader(NamedTuple):
    """``grade``: (response, reference) -> Grade. ``read_reference``: a value of a data file -> reference; raises
    ValueError if responses could never be graded against it."""

    grade: Callable[[str, str], Grade]
    read_reference: Callable[[object], str]


TEN = "ABCDEFGHIJ"
GRADERS = {
    "numeric": Grader(grade_number, read_number),
    "exact": Grader(grade_exact, read_exact),
    "short": Grader(grade_short, read_short),
    "overlap": Grader(grade_overlap, read_short),
    "yes_no": Grader(grade_yes_no, read_yes_no),
    "letter": Grader(grade_letter, read_letter),
    "letter_of_ten": Grader(functools.partial(grade_letter, letters=TEN), functools.partial(read_letter, letters=TEN)),
    "math": Grader(grade_math, read_math),
}
