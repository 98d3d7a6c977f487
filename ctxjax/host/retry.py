"""Reads that fail for a moment are tried again, after growing pauses, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import errno
import random
import sys
import time
from typing import TypeVar

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt
TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPIPE,
}  # fmt: skip

counts: Counter[str] = Counter()  # attempts of this process that failed and were followed by another, by what was read


def is_transient(error: Exception) -> bool:
    """Whether an error of the operating system may pass by itself, as those of network file systems do."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def retry(
    read: Callable[[], T],
    what: str,
    is_transient: Callable[[Exception], bool] = is_transient,
    waits: Sequence[float] = WAITS,
) -> T:
    """``read()``, tried once more after each of ``waits`` (seconds, varied by half, so that hosts do not come back all
    at once) as long as its error is transient. ``what`` names it in the warning and in ``counts``."""
    for wait in waits:
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
            counts[what] += 1
            print(f"warning: {what}: {type(error).__name__}: {error}; trying again", file=sys.stderr, flush=True)
        time.sleep(wait * random.uniform(0.5, 1.5))
    return read()
