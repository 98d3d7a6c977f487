"""Show replies while they are sampled: in two columns of a wide terminal, otherwise one below the other.

No cursor moves up: only the last row of the two columns is written again until both of its halves are complete. So what
is on the screen can be scrolled, copied and logged.
"""

from __future__ import annotations

import re
from typing import Protocol, TextIO
import unicodedata

from ctxjax.chat.conversation import Reply
from ctxjax.data import responses

CUT = " [cut at --max_tokens]"
BAR = " │ "
NARROWEST = 72  # columns of a terminal; with less, one view is below the other
FILL = "\N{NULL}"  # the second half of a character that is as wide as two


class Screen(Protocol):
    def begin(self, names: list[str]) -> None:
        """Begin a turn. ``names``: of the views."""

    def show(self, replies: list[Reply]) -> None:
        """Show every view's reply so far; each begins with what was shown of it before."""

    def end(self) -> None:
        """End the turn with what was shown last, whether the replies have ended or not."""


def make_screen(out: TextIO, columns: int) -> Screen:
    """Return the screen for ``out``; ``columns``: of the terminal, 0 if it is none."""
    return Columns(out, columns) if columns >= NARROWEST else Blocks(out)


def _to_text(reply: Reply) -> str:
    return responses.make_printable(reply.text.replace("\t", "    ")) + CUT * reply.is_cut


class Blocks:
    """One view below the other: the first is shown as it is sampled, the next when those above it have ended."""

    def __init__(self, out: TextIO):
        self._out = out

    def begin(self, names: list[str]) -> None:
        self._names, self._replies, self._place, self._shown = names, [Reply("", False)] * len(names), 0, 0
        self._out.write(f"--- {names[0]}\n")
        self._out.flush()

    def show(self, replies: list[Reply]) -> None:
        self._replies = replies
        self._write()
        while replies[self._place].has_ended and self._place + 1 < len(replies):
            self._go_on()
        self._out.flush()

    def end(self) -> None:
        while self._place + 1 < len(self._replies):
            self._go_on()
        self._out.write("\n")
        self._out.flush()

    def _go_on(self) -> None:
        self._place, self._shown = self._place + 1, 0
        self._out.write(f"\n--- {self._names[self._place]}\n")
        self._write()

    def _write(self) -> None:
        text = _to_text(self._replies[self._place])
        self._out.write(text[self._shown :])
        self._shown = len(text)


class Columns:
    """The views side by side, one row of both at a time."""

    def __init__(self, out: TextIO, columns: int):
        self._out, self._columns = out, columns

    def begin(self, names: list[str]) -> None:
        self._width = (self._columns - 1 - len(BAR) * (len(names) - 1)) // len(names)
        self._rows, self._replies = 0, [Reply("...", False)] * len(names)
        self._write([name[: self._width] for name in names], "\n")
        self._write(["..."] * len(names), "")

    def show(self, replies: list[Reply]) -> None:
        self._replies = replies
        views = [wrap(_to_text(reply), self._width) for reply in replies]
        # A row is complete in a view that has a further row, or has ended.
        ready = min(max(map(len, views)) - 1 if r.has_ended else len(v) - 1 for v, r in zip(views, replies))
        while self._rows < ready:
            self._write_row(views, "\n")
            self._rows += 1
        self._write_row(views, "")

    def end(self) -> None:
        views = [wrap(_to_text(reply), self._width) for reply in self._replies]
        while self._rows < max(map(len, views)):
            self._write_row(views, "\n")
            self._rows += 1

    def _write_row(self, views: list[list[str]], end: str) -> None:
        self._write([lines[self._rows] if self._rows < len(lines) else "" for lines in views], end)

    def _write(self, cells: list[str], end: str) -> None:
        row = BAR.join(cell.ljust(self._width) for cell in cells).replace(FILL, "")
        self._out.write(f"\r{row}{end}")
        self._out.flush()


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` cells of a terminal, words whole if they fit into a line.

    More text changes only the last line, or adds lines after it. A character of two cells is followed by FILL.
    """
    text = "".join(c + FILL * (unicodedata.east_asian_width(c) in "WF") for c in text)
    lines = [""]
    for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
        if piece == "\n":
            lines.append("")
            continue
        if len(lines[-1]) + len(piece) > width and lines[-1]:
            lines.append("")
            piece = piece.lstrip(" ")  # a space between two lines is not shown
        while len(piece) > width:
            lines[-1:] = [piece[:width], ""]
            piece = piece[width:]
        lines[-1] += piece
    return lines
