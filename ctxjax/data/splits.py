"""Which rows are held out: by a hash of what names them, never by their place in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
import unicodedata

from ctxjax.data.records import digest
from ctxjax.data.task import Row, Task

SPLITS = ("train", "dev", "test")
HELD_OUT = {"test": 0.2, "dev": 0.1}  # shares of a set that its publishers did not split


def split_of(name: str) -> str:
    """The split of whatever has this name. A row keeps its split whatever else is in the file."""
    place, bound = int(digest(name)[:8], 16) / 16**8, 0.0
    for split, share in HELD_OUT.items():
        bound += share
        if place < bound:
            return split
    return "train"


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """In the order of their ids' hashes: any first n are a mixture of all."""
    return sorted(rows, key=lambda row: digest(row.id))


def folded(text: str) -> str:
    """A text up to case, width and white space: equal ones count as the same question."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def without_repeats(splits: dict[str, list[tuple[str, Row]]]) -> tuple[dict[str, list[Row]], Counter[str]]:
    """The rows of splits of (text, row) with each text once, and counts of those left out, by kind (records.KINDS).

    Of equal texts the first in test stays, or else in dev, so that no test question is trained on.
    """
    seen: dict[str, Row] = {}
    kept, counts = {}, Counter()
    for split in ("test", "dev", "train"):
        kept[split] = []
        for text, row in splits[split]:
            first = seen.setdefault(folded(text), row)
            if first is row:
                kept[split].append(row)
            else:
                counts["duplicate" if first.reference == row.reference else "conflict"] += 1
    return {split: kept[split] for split in SPLITS}, counts


def check_splits(task: Task, needed: tuple[str, ...] = SPLITS) -> None:
    """Raises ValueError where a needed split is empty, or two rows of the task have the same id: results are by id."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        rows = task.rows(split)
        if not rows and split in needed:
            raise ValueError(f"no {split} rows are left of the task's data; see the counts of rows and limits")
        for row in rows:
            if row.id in seen:
                where = f"twice in {split}" if seen[row.id] == split else f"in {seen[row.id]} and in {split}"
                raise ValueError(f"row id {row.id!r} stands {where}; ids must be different, as results go by them")
            seen[row.id] = split
