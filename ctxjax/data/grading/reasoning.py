"""The reasoning in a response, between ``<think>`` and ``</think>``: it is never an answer."""

from __future__ import annotations

OPEN_REASONING, CLOSE_REASONING = "<think>", "</think>"
OTHER_REASONING = {"<seed:think>": OPEN_REASONING, "</seed:think>": CLOSE_REASONING}  # of Seed-OSS
# Why a response has no text outside of its reasoning.
EMPTY, ONLY_REASONING, ENDLESS_REASONING = "empty", "answer only in the reasoning", "reasoning is not closed"


def rename_reasoning(text: str) -> str:
    """Return the text with the reasoning of every family between <think> and </think>."""
    for tag, usual in OTHER_REASONING.items():
        text = text.replace(tag, usual)
    return text


def is_reasoning_open(text: str) -> bool:
    """Whether the text ends inside of its reasoning."""
    return OPEN_REASONING in text.rpartition(CLOSE_REASONING)[2]


def strip_reasoning(response: str) -> tuple[str, str | None]:
    """Return (the text outside of the reasoning, the reason if there is none).

    The answer follows the last </think>, and what a later <think> opens and nothing closes is none.
    """
    said, opened, _ = response.rpartition(CLOSE_REASONING)[2].partition(OPEN_REASONING)
    if said.strip():
        return said, None
    if opened:
        return "", ENDLESS_REASONING
    return "", ONLY_REASONING if response.strip() else EMPTY
