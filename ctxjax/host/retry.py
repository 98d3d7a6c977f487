"""Read a file again, after growing pauses, if its error may pass by itself; count the repetitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import errno
import re
import sys
from typing import TypeVar

import tenacity

T = TypeVar("T")

ATTEMPTS = 4
TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPIPE,
}  # fmt: skip
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")

counts: Counter[str] = Counter()  # failed attempts of this process that were repeated, by what was read


def is_transient(error: BaseException) -> bool:
    """Return whether an error of the operating system may pass by itself, as on network file systems."""
    if isinstance(error, OSError):
        return error.errno in TRANSIENT
    number = _TENSORSTORE.search(str(error))  # its errors have other types, such as ValueError
    return number is not None and int(number[1]) in TRANSIENT


def retry(read: Callable[[], T], what: str) -> T:
    """Return ``read()``; repeat it, at most ATTEMPTS times in all, while its error is transient, then raise the error.

    ``what`` names it in the warning and in ``counts``. Pauses are 1, 2 and 4 seconds, and up to one more at random, so
    that hosts do not repeat all at once.
    """

    def warn(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception()
        counts[what] += 1
        print(f"warning: {what}: {type(error).__name__}: {error}; trying again", file=sys.stderr, flush=True)

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_exponential_jitter(initial=1, jitter=1),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        before_sleep=warn,
        reraise=True,
    )
    return attempts(read)
