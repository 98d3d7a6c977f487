"""Checks without a reference: whether a response does what a context demands of every response.

A persona or a format is obeyed or not, whatever the question is. So these checks measure obedience by the context's own
demand, not by the accuracy of the task. Some demands are met by chance (benchmarks/README.md, response checks), so
compare a share with that of the base.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple
import unicodedata

from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import NO_WORDS
from ctxjax.data.grading.reasoning import strip_reasoning


class Check(NamedTuple):
    """A context's demand on every response. ``name``: a key of CHECKS. ``argument``: a text, a number or None."""

    name: str
    argument: str | int | None = None

    def __str__(self) -> str:
        return self.name if self.argument is None else f"{self.name} {self.argument!r}"


def _find_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _count_sentences(text: str) -> int:
    """Count sentences: pieces with a word, between end marks. A point inside a number is not an end mark."""
    pieces = re.split(r"[.!?…。！？]+(?=\s|$|[\"'”’)\]])|\n+", text)
    return sum(bool(_find_words(piece)) for piece in pieces)


def _keep_letters(text: str) -> str:
    return "".join(letter for letter in text if letter.isalpha())


def _trim(text: str) -> str:
    """Remove white space, punctuation and emphasis at both ends."""
    return text.strip().strip("*_`\"'“”‘’.!?…,;:()[] \n").strip()


def _make_phrase_pattern(phrase: str) -> str:
    """Return a pattern that finds the phrase as whole words, ignoring case."""
    return rf"(?i:(?<!\w){re.escape(_trim(phrase))}(?!\w))"


def _parse_json(text: str):
    """Parse the whole response, with or without a code fence; None if it is not JSON."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)```\s*", text, re.DOTALL)
    try:
        return json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):  # broken, a number of thousands of digits, or nested a thousand deep
        return None


def _has_json_key(text: str, key: str) -> bool:
    value = _parse_json(text)
    return isinstance(value, dict) and key in value


def _measure_script_share(text: str, script: str) -> float:
    """Return the share of letters whose Unicode name starts with ``script``, such as "CYRILLIC"; 0 without letters.

    ``script`` may name several scripts, separated by "|".
    """
    letters = _keep_letters(text)
    named = sum(any(unicodedata.name(letter, "").startswith(s) for s in script.split("|")) for letter in letters)
    return named / len(letters) if letters else 0.0


def _count_list_items(text: str, mark: str) -> int:
    """Count the lines that start with the pattern ``mark`` and white space."""
    return len(re.findall(rf"^\s*{mark}\s+\S", text, re.MULTILINE))


def _count_paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()])


# name -> (type of the argument, check). A response without a word obeys no check.
CHECKS = {
    "upper_case": (None, lambda text, _: bool(letters := _keep_letters(text)) and letters == letters.upper()),
    "lower_case": (None, lambda text, _: bool(letters := _keep_letters(text)) and letters == letters.lower()),
    "starts_with": (str, lambda text, a: re.match(_make_phrase_pattern(a), _trim(text)) is not None),
    "ends_with": (str, lambda text, a: re.search(_make_phrase_pattern(a) + "$", _trim(text)) is not None),
    "contains": (str, lambda text, a: re.search(_make_phrase_pattern(a), text) is not None),
    "avoids": (str, lambda text, a: a.casefold() not in text.casefold()),
    "sentences": (int, lambda text, a: _count_sentences(text) == a),
    "paragraphs": (int, lambda text, a: _count_paragraphs(text) == a),
    "at_most_words": (int, lambda text, a: len(_find_words(text)) <= a),
    "at_least_words": (int, lambda text, a: len(_find_words(text)) >= a),
    "words": (int, lambda text, a: len(_find_words(text)) == a),
    "bullets": (int, lambda text, a: _count_list_items(text, r"[-*•]") == a),
    "numbered": (int, lambda text, a: _count_list_items(text, r"\d+[.)]") == a),
    "json_with": (str, _has_json_key),
    "script": (str, lambda text, a: _measure_script_share(text, a) > 0.8),
    "question": (None, lambda text, _: text.strip().rstrip("\"'”’)*_").endswith("?")),
    "quoted": (None, lambda text, _: text.strip()[:1] in '"“' and text.strip()[-1:] in '"”'),
    "no_digits": (None, lambda text, _: not any(letter.isdigit() for letter in text)),
    "matches": (str, lambda text, a: re.search(a, text) is not None),
}


def grade_check(check: Check, response: str) -> Grade:
    """Grade whether a response does what the check demands. ``parsed``: the response without reasoning, or None if it
    has no words."""
    said, reason = strip_reasoning(response)
    if reason or not _find_words(said):
        return Grade(None, False, reason or NO_WORDS)
    return Grade(said, bool(CHECKS[check.name][1](said, check.argument)))


def read_check(text: str, where: str) -> Check | None:
    """Parse a check that is written as its name and, after a space, its argument; None of "". Raises ValueError that
    starts with ``where``."""
    name, _, argument = text.strip().partition(" ")
    is_number = CHECKS.get(name, (None,))[0] is int and argument.strip().isdecimal()
    entry = {"check": name or None, "argument": int(argument) if is_number else argument or None}
    return parse_check(entry, f"{where} = {text!r}")


def parse_check(entry: dict, where: str) -> Check | None:
    """Parse the check of a pool entry; None if it has none. Raises ValueError that starts with ``where``."""
    unknown = set(entry) - {"context", "check", "argument"}
    if unknown:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}; use context, check and argument")
    name, argument = entry.get("check"), entry.get("argument")
    if name is None:
        return None
    if name not in CHECKS:
        raise ValueError(f"{where}: check = {name!r} is not known; choose from {', '.join(sorted(CHECKS))}")
    kind = CHECKS[name][0]
    if kind is None and argument is not None or kind is not None and type(argument) is not kind:
        wanted = "no argument" if kind is None else f"an argument of type {kind.__name__}"
        raise ValueError(f"{where}: check {name!r} takes {wanted}, not {argument!r}")
    is_phrase = name in ("starts_with", "ends_with", "contains")
    if kind is str and not (_trim(argument) if is_phrase else argument.strip()):
        raise ValueError(f"{where}: argument = {argument!r} of check {name!r} has no text to look for")
    if name == "matches":
        try:
            re.compile(argument)
        except re.error as error:
            raise ValueError(f"{where}: argument = {argument!r} is not a regular expression: {error}") from None
    return Check(name, argument)
