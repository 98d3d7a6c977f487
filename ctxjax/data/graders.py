"""Reading an answer from a response and comparing it with a reference.

A strict reader takes the answer from the place that the prompt asked for. A lenient one takes it from wherever it can,
so that a drift of format and a loss of knowledge can be told apart: both are reported. Reasoning between ``<think>``
and ``</think>`` is never an answer.
"""

from __future__ import annotations

import re
import unicodedata

from ctxjax.data.task import Grade

LETTERS = "ABCDEFGHIJ"
EMPTY, NO_TAGS, NOT_CLOSED, TWO = "empty", "no <answer> tags", "<answer> is not closed", "two different answers"
ONLY_REASONING, ENDLESS_REASONING = "answer only in the reasoning", "reasoning is not closed"


def visible(response: str) -> tuple[str, str | None]:
    """(what stands outside of the reasoning, why there is nothing). Letters and digits of other widths become plain."""
    text = unicodedata.normalize("NFKC", response)
    before, opened, after = text.partition("<think>")
    if opened and "</think>" not in after:
        return before, None if before.strip() else ENDLESS_REASONING
    said = text.rpartition("</think>")[2]
    if said.strip():
        return said, None
    return "", ONLY_REASONING if text.strip() else EMPTY


def tagged(response: str) -> tuple[list[str], str, str | None]:
    """(contents of the <answer> tags, the visible text, why there are none)."""
    said, reason = visible(response)
    found = [content.strip() for content in re.findall(r"(?is)<answer>(.*?)</answer>", said)]
    if found or reason:
        return found, said, reason
    if re.search(r"(?i)<answer>", said):
        return found, said, NOT_CLOSED
    everything = unicodedata.normalize("NFKC", response)
    return found, said, ONLY_REASONING if re.search(r"(?is)<answer>.*?</answer>", everything) else NO_TAGS


def _agreed(answers: list[str | None], what: str) -> tuple[str | None, str | None]:
    """(the one answer that all tags give, why there is none)."""
    if None in answers:
        return None, f"not {what}"
    return (answers[0], None) if len(set(answers)) == 1 else (None, TWO)


def yes_no(response: str, reference: str) -> Grade:
    """``<answer>yes</answer>`` against "yes" or "no". Leniently: what the response's last tag or first word says,
    or else the only one of the two words in it."""
    contents, said, reason = tagged(response)
    parsed = None
    if contents:
        words = [content.strip(" \n.!*_\"'").casefold() for content in contents]
        parsed, reason = _agreed([word if word in ("yes", "no") else None for word in words], "yes or no")
    return Grade(parsed, parsed == reference, reason, _lenient_yes_no(contents, said) == reference)


def _lenient_yes_no(contents: list[str], said: str) -> str | None:
    # The text within the last tag, closed or not; where there is none, the whole.
    text = contents[-1] if contents else re.split(r"(?i)<answer>", said)[-1]
    words = re.findall(r"[^\W_]+", text.casefold())
    if words and words[0] in ("yes", "no"):
        return words[0]
    found = {word for word in words if word in ("yes", "no")}
    return found.pop() if len(found) == 1 else None


GRADERS = {"yes_no": yes_no}
