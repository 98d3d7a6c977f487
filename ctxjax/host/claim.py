"""Who works on what, in a folder that several processes or machines share: claims with a heartbeat.

The claims of a folder are the files claim.1, claim.2 and so on; the one with the highest number counts. A process takes
a claim over, if its holder has not beaten for a while, by creating the file of the next number: the file system lets
only one process create it, and a holder that was only asleep finds at its next beat that it no longer holds the claim.
"""

from __future__ import annotations

import os
from pathlib import Path
import socket
import tempfile

STALE = 180.0  # seconds without a beat after which a holder counts as dead; beat several times as often


class Claim:
    """The claim that this process has on a folder; ``take`` makes it."""

    def __init__(self, folder: Path, number: int):
        self._folder, self._number = folder, number

    @classmethod
    def take(cls, folder: Path) -> Claim | None:
        """Claim the folder, which is created if needed; None if a living process holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        latest = _latest(folder)
        if latest and find_holder(folder) is not None:
            return None
        try:
            with _path(folder, latest + 1).open("x", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {_describe_place()}\n")
        except FileExistsError:  # another process was faster
            return None
        return cls(folder, latest + 1)

    def beat(self) -> bool:
        """Show that this process lives. Return False if another one has taken the claim over."""
        try:
            os.utime(_path(self._folder, self._number))
        except FileNotFoundError:
            return False
        return _latest(self._folder) == self._number

    def lend(self, process: int) -> None:
        """Let a process of this machine hold the claim too, as long as it lives, even if this one does not."""
        with _path(self._folder, self._number).open("a", encoding="utf-8") as file:
            file.write(f"{process} {_read_start(process)}\n")

    def release(self) -> None:
        _path(self._folder, self._number).unlink(missing_ok=True)


def find_holder(folder: Path) -> str | None:
    """Return the living process that holds the folder, as "process 12 on host"; None if there is none."""
    path = _path(folder, _latest(folder))
    try:
        first, *lent = path.read_text(encoding="utf-8").splitlines() or [""]
        age = _read_clock(folder) - path.stat().st_mtime
    except FileNotFoundError:
        return None
    number, _, place = first.partition(" ")
    is_here = number and place == _describe_place()
    is_lent = is_here and any(map(_is_same_process, lent))
    if not is_lent and (age > STALE or (is_here and not _is_alive(int(number)))):
        return None
    return f"process {number} on {place.split(' ')[0]}"


def _path(folder: Path, number: int) -> Path:
    return folder / f"claim.{number}"


def _latest(folder: Path) -> int:
    return max((int(path.suffix[1:]) for path in folder.glob("claim.*")), default=0)


def _read_clock(folder: Path) -> float:
    """Return the time of the folder's file system, whose clock need not be this machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _is_same_process(line: str) -> bool:
    """Whether the process of a line of ``lend`` lives: its number may belong to another one by now."""
    number, _, start = line.partition(" ")
    return _is_alive(int(number)) and _read_start(int(number)) == start


def _read_start(process: int) -> str:
    """Return when a process began, in ticks since the machine did; "" if the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _describe_place() -> str:
    """Return this machine's name and, since containers may share it, the namespace of its process numbers."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
