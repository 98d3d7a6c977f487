"""What a grader returns."""

from __future__ import annotations

from typing import NamedTuple


class Grade(NamedTuple):
    """``parsed`` is the answer read from a response, None where none was readable, and ``reason`` why not.
    ``lenient`` is whether the response is right for a reader who does without the format, where that differs."""

    parsed: str | None
    correct: bool
    reason: str | None = None
    lenient: bool | None = None
