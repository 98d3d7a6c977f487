"""Checks of a response that need no reference: whether it does what a context demands of every response.

A persona or a format is obeyed or not, whatever the question; so "the student still obeys other contexts" is measured
by what they ask for, not by whether the task's answer is right. Some demands are met by chance: a model of random
weights meets 17 % of those of the built-in pool, so read a share beside the base's.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple
import unicodedata

from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import visible

NO_WORDS = "no words"


class Check(NamedTuple):
    """What a context demands of every response: a name in CHECKS and its argument, a text or a number."""

    name: str
    argument: str | int | None = None

    def __str__(self) -> str:
        return self.name if self.argument is None else f"{self.name} {self.argument!r}"


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _sentences(text: str) -> int:
    """Pieces with a word in them between marks that end a sentence; a full stop inside a number ends none."""
    pieces = re.split(r"[.!?…。！？]+(?=\s|$|[\"'”’)\]])|\n+", text)
    return sum(bool(_words(piece)) for piece in pieces)


def _letters(text: str) -> str:
    return "".join(letter for letter in text if letter.isalpha())


def _trimmed(text: str) -> str:
    """Without white space, marks and emphasis at either end."""
    return text.strip().strip("*_`\"'“”‘’.!?…,;:()[] \n").strip()


def _bounded(phrase: str) -> str:
    """The phrase as a pattern, for whole words in either case."""
    return rf"(?i:(?<!\w){re.escape(_trimmed(phrase))}(?!\w))"


def _json(text: str):
    """The value that the whole response is, in a code fence or without one; None where it is not JSON."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)```\s*", text, re.DOTALL)
    try:
        return json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        return None


def _is_json_with(text: str, key: str) -> bool:
    value = _json(text)
    return isinstance(value, dict) and key in value


def _share_in_script(text: str, script: str) -> float:
    """The share of letters whose Unicode name begins with ``script``, such as "CYRILLIC"; 0 without letters."""
    letters = _letters(text)
    named = sum(any(unicodedata.name(letter, "").startswith(s) for s in script.split("|")) for letter in letters)
    return named / len(letters) if letters else 0.0


def _listed(text: str, mark: str) -> int:
    """Lines that begin as list items do."""
    return len(re.findall(rf"^\s*{mark}\s+\S", text, re.MULTILINE))


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()])


# name -> (what the argument is, the check). A response without a word in it obeys nothing.
CHECKS = {
    "upper_case": (None, lambda text, _: bool(_letters(text)) and _letters(text) == _letters(text).upper()),
    "lower_case": (None, lambda text, _: bool(_letters(text)) and _letters(text) == _letters(text).lower()),
    "starts_with": (str, lambda text, a: re.match(_bounded(a), _trimmed(text)) is not None),
    "ends_with": (str, lambda text, a: re.search(_bounded(a) + "$", _trimmed(text)) is not None),
    "contains": (str, lambda text, a: re.search(_bounded(a), text) is not None),
    "avoids": (str, lambda text, a: a.casefold() not in text.casefold()),
    "sentences": (int, lambda text, a: _sentences(text) == a),
    "paragraphs": (int, lambda text, a: _paragraphs(text) == a),
    "at_most_words": (int, lambda text, a: len(_words(text)) <= a),
    "at_least_words": (int, lambda text, a: len(_words(text)) >= a),
    "words": (int, lambda text, a: len(_words(text)) == a),
    "bullets": (int, lambda text, a: _listed(text, r"[-*•]") == a),
    "numbered": (int, lambda text, a: _listed(text, r"\d+[.)]") == a),
    "json_with": (str, _is_json_with),
    "script": (str, lambda text, a: _share_in_script(text, a) > 0.8),
    "question": (None, lambda text, _: text.strip().rstrip("\"'”’)*_").endswith("?")),
    "quoted": (None, lambda text, _: text.strip()[:1] in '"“' and text.strip()[-1:] in '"”'),
    "no_digits": (None, lambda text, _: not any(letter.isdigit() for letter in text)),
    "matches": (str, lambda text, a: re.search(a, text) is not None),
}


def obeys(check: Check, response: str) -> Grade:
    """Whether a response does what the check demands; ``parsed`` is what was read, where there are words in it."""
    said, reason = visible(response)
    if reason or not _words(said):
        return Grade(None, False, reason or NO_WORDS)
    return Grade(said, bool(CHECKS[check.name][1](said, check.argument)))


def parse_check(entry: dict, where: str) -> Check | None:
    """The check of a pool's entry, None where it has none. Raises ValueError that names the place."""
    unknown = set(entry) - {"context", "check", "argument"}
    if unknown:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}; there are context, check and argument")
    name, argument = entry.get("check"), entry.get("argument")
    if name is None:
        return None
    if name not in CHECKS:
        raise ValueError(f"{where}: check = {name!r} is not known; choose from {', '.join(sorted(CHECKS))}")
    kind = CHECKS[name][0]
    if kind is None and argument is not None or kind is not None and type(argument) is not kind:
        wanted = "no argument" if kind is None else f"an argument of type {kind.__name__}"
        raise ValueError(f"{where}: check {name!r} takes {wanted}, not {argument!r}")
    phrase = name in ("starts_with", "ends_with", "contains")
    if kind is str and not (_trimmed(argument) if phrase else argument.strip()):
        raise ValueError(f"{where}: argument = {argument!r} of check {name!r} has nothing to look for")
    if name == "matches":
        try:
            re.compile(argument)
        except re.error as error:
            raise ValueError(f"{where}: argument = {argument!r} is not a regular expression: {error}") from None
    return Check(name, argument)
