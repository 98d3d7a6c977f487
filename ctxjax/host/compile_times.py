"""How long programs take to compile: a file in the folder of the compile cache remembers it for the next run."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import time

import jax

from ctxjax.host import processes, progress, workdir
from ctxjax.host.checksum import compute_digest

FILE = "seconds.json"  # {digest of what is compiled: seconds}, the oldest first
MOST = 500


@contextlib.contextmanager
def show(what: str, program) -> Iterator[None]:
    """Show the bar ``what`` with the seconds that this took last time, and remember how long it takes now.

    ``program``: values whose ``repr`` is that of the program that is compiled. Without a compile cache nothing is
    remembered.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        with progress.Bar(what):
            yield
        return
    path = Path(folder) / FILE
    key = compute_digest([repr(program), jax.__version__, str(jax.devices())])
    last = _read(path).get(key)
    clock = time.monotonic()
    with progress.Bar(what if last is None else f"{what} (last time {last:.0f} s)"):
        yield
    if processes.is_first():
        known = {name: value for name, value in _read(path).items() if name != key}
        known[key] = round(time.monotonic() - clock, 1)
        with contextlib.suppress(OSError):  # only a hint
            path.parent.mkdir(parents=True, exist_ok=True)
            workdir.write_text(path, json.dumps(dict(list(known.items())[-MOST:]), indent=0))


def _read(path: Path) -> dict[str, float]:
    """Return what the file holds; nothing if there is none, or one that cannot be read."""
    try:
        return {name: float(value) for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
