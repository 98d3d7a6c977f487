"""Say what goes on, on standard error: a bar with the time left for a phase with a count, a clock for one without.

A terminal sees it move every second, even while nothing is counted; a log file gets a line every half minute. Phases of
less than two seconds show nothing, and neither do all of them with TQDM_DISABLE=1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import math
import sys
import threading
import time
from typing import TypeVar

import jax
from tqdm import tqdm

from ctxjax.host import processes

QUIET = 2.0  # seconds before a bar is shown
TERMINAL, FILE = 1.0, 30.0  # seconds from one state that is shown to the next
Item = TypeVar("Item")


class Bar(tqdm):
    """The state of a phase; a context manager, with tqdm's ``update`` and ``set_postfix``.

    ``total``: the count at the end; None if nothing is counted. ``compiles``: whether a program may be compiled before
    the first ``update``; the bar then says so. Only the first process shows its bars; an empty ``what`` is not shown.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "step", initial: int = 0, compiles: bool = False
    ):
        moves = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._period, self._due, self._ended = TERMINAL if moves else FILE, time.monotonic() + QUIET, threading.Event()
        self._note, self._shown = "compiling, or the first batch" if compiles else None, None
        hidden = not what or (jax.distributed.is_initialized() and not processes.is_first())
        super().__init__(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            initial=initial,
            postfix=self._note,
            leave=None,  # on the screen, unless another bar is open
            miniters=1,
            file=sys.stderr if moves else _Lines(),
            bar_format=None if total else "{desc}: {elapsed}",
            **({"disable": True} if hidden else {}),
        )
        if not self.disable:
            if (self.ncols or 0) < 1:  # a terminal that does not know its size, as in some containers
                self.ncols = self.nrows = None
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._ended.wait(max(self._due - time.monotonic(), 0.01)):
            self.refresh()

    def update(self, n: int = 1) -> None:
        if self._note:
            self._note = self.postfix = None
        super().update(n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if time.monotonic() < self._due:
            return False
        self._due, self._shown = time.monotonic() + self._period, self._state()
        return super().display(msg, pos)

    def _state(self) -> tuple:
        """Return what a reader can see of the phase: the count, or the seconds if nothing is counted."""
        return (self.n, self.postfix) if self.total else (int(self.format_dict["elapsed"]),)

    def close(self) -> None:
        """Show the end, if the bar was shown, so that the next print starts on its own line. A log file has it already
        if the last line says the same."""
        self._ended.set()
        if self._shown and (self._period == TERMINAL or self._shown != self._state()):
            self._due = 0.0
        else:
            self._due, self.leave = math.inf, False
        super().close()


def track(items: Iterable[Item], what: str, total: int, **options) -> Iterator[Item]:
    """Yield the items, with a bar that counts those that are done; ``options`` of the bar."""
    with Bar(what, total, **options) as bar:
        for item in items:
            yield item
            bar.update()


class _Lines:
    """Standard error of a log file: tqdm's movements of the cursor are left out, and every state is a line."""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
