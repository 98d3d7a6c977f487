"""Split rows into train, dev and test by a hash of their name, never by their position in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
import unicodedata

from ctxjax.data.records import hash_text
from ctxjax.data.task import Row, Task

SPLITS = ("train", "dev", "test")
HELD_OUT = {"test": 0.2, "dev": 0.1}  # shares of a set that has no published splits


def assign_split(name: str) -> str:
    """Return the split for a name. It does not depend on the other rows of the file."""
    fraction, bound = int(hash_text(name)[:8], 16) / 16**8, 0.0
    for split, share in HELD_OUT.items():
        bound += share
        if fraction < bound:
            return split
    return "train"


def shuffle(rows: Iterable[Row]) -> list[Row]:
    """Sort rows by the hash of their id, so that the first n rows are a mixture of all."""
    return sorted(rows, key=lambda row: hash_text(row.id))


def normalize(text: str) -> str:
    """Normalize case, width and white space. Questions with equal results count as the same; 10² and 102 do not."""
    of_one_width = "".join(map(_widen_or_narrow, text))
    return " ".join(unicodedata.normalize("NFC", of_one_width).casefold().split())


def _widen_or_narrow(letter: str) -> str:
    """Return a letter in its ordinary width. (NFKC of the whole text would write powers and fractions as digits.)"""
    is_of_other_width = unicodedata.decomposition(letter).startswith(("<wide>", "<narrow>"))
    return unicodedata.normalize("NFKC", letter) if is_of_other_width else letter


def remove_repeats(rows: Iterable[tuple[str, str, Row]]) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Keep each text once among (split, text, row). Return rows by split, and counts of the others by records.KINDS.

    Of equal texts the first one in test stays, else the first in dev, so that no test question is trained on. Rows are
    read one by one, and repeats are not kept in memory.
    """
    pooled: dict[str, dict[str, Row]] = {split: {} for split in SPLITS}
    counts = Counter()

    def is_first(seen: dict[str, Row], key: str, row: Row) -> bool:
        first = seen.setdefault(key, row)
        if first is not row:
            counts["duplicate" if first.reference == row.reference else "conflict"] += 1
        return first is row

    for split, text, row in rows:
        is_first(pooled[split], normalize(text), row)
    seen: dict[str, Row] = {}
    kept = {
        split: [row for key, row in pooled[split].items() if is_first(seen, key, row)]
        for split in ("test", "dev", "train")
    }
    return {split: kept[split] for split in SPLITS}, counts


def check_splits(task: Task, needed: tuple[str, ...] = SPLITS) -> None:
    """Raise ValueError if a needed split is empty, or if two rows have the same id: results are stored by id."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        rows = task.rows(split)
        if not rows and split in needed:
            counts = ", ".join(f"{name} {len(task.rows(name))}" for name in SPLITS)
            raise ValueError(
                f"the task has no {split} rows left ({counts}); give more questions, or check its limits and the "
                "counts of left-out rows"
            )
        for row in rows:
            if row.id in seen:
                where = f"twice in {split}" if seen[row.id] == split else f"in {seen[row.id]} and in {split}"
                raise ValueError(f"row id {row.id!r} occurs {where}; ids must be unique: results are stored by id")
            seen[row.id] = split
