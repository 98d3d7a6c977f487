"""The result of a grader."""

from __future__ import annotations

from typing import NamedTuple


class Grade(NamedTuple):
    """The grade of one response.

    ``parsed``: the answer read from the response, or None if it is not readable; ``reason`` then says why.
    ``lenient``: whether the answer is correct when extracted without the required format; None if not computed.
    """

    parsed: str | None
    correct: bool
    reason: str | None = None
    lenient: bool | None = None
