"""Choose and prepare the sample responses that the page shows side by side."""

from __future__ import annotations

from ctxjax.data.task import describe_context
from ctxjax.report import assessment

SAMPLES = 5
VIEWS = ("bare", "context")
# What is shown of a long text. Its end is shown too: the answer is usually there.
HEAD_CHARACTERS, TAIL_CHARACTERS = 700, 500


def sample_responses(items: dict[str, list[dict]]) -> dict:
    """Choose up to SAMPLES items and pair their two views for each arm; ``items`` has the rows of items.jsonl by arm.

    First come the items that one arm (``opcd``, else the first trained one) answers right without the context and wrong
    with it, then those that it answers wrong in a view, then the rest; each group in the file's order.

    Returns {"arm": that arm or None, "harmed": number of shown items that it has harmed, "context": the context if all
    shown items have the same one, else None, "items": [{"id", "question", "context", "reference", "arms": [{"arm",
    "views": {"bare": row or None, "context": row or None}}]}]}.
    """
    by_arm = {arm: _pairs(rows) for arm, rows in items.items() if rows}
    if not by_arm:
        return {"arm": None, "harmed": 0, "context": None, "items": []}
    trained = list(assessment.trained(by_arm))
    chosen_by = "opcd" if "opcd" in by_arm else (trained or list(by_arm))[0]
    pairs = by_arm[chosen_by]
    ids = sorted(pairs, key=lambda identifier: _rank(pairs[identifier]))[:SAMPLES]
    shown = [_sample(identifier, pairs[identifier], by_arm) for identifier in ids]
    contexts = {sample["context"] for sample in shown}
    return {
        "arm": chosen_by,
        "harmed": sum(_rank(pairs[identifier]) == 0 for identifier in ids),
        "context": contexts.pop() if len(contexts) == 1 else None,
        "items": shown,
    }


def shorten(text: object) -> str:
    """Return the text; from the middle of a long one, say how many characters were left out."""
    text = "" if text is None else str(text)
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n[... {left_out} characters left out ...]\n{text[-TAIL_CHARACTERS:]}"


def _pairs(rows: list[dict]) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row.get("view") in VIEWS:
            # The first of several samples is shown.
            found.setdefault(str(row.get("id")), {}).setdefault(row["view"], row)
    return found


def _rank(views: dict[str, dict]) -> int:
    if len(views) < len(VIEWS):
        return 3
    bare, context = (bool(views[view].get("correct")) for view in VIEWS)
    return 0 if bare and not context else 2 if bare and context else 1


def _sample(identifier: str, views: dict[str, dict], by_arm: dict[str, dict]) -> dict:
    first = next(iter(views.values()))
    context = views.get("context", {}).get("context")
    arms = []
    for arm, pairs in by_arm.items():
        other = pairs.get(identifier, {})
        arms.append({"arm": arm, "views": {view: _response(other.get(view)) for view in VIEWS}})
    return {
        "id": identifier,
        "question": shorten(first.get("question")),
        "context": None if context is None else shorten(describe_context(context)),
        "reference": shorten(first.get("reference")),
        "arms": arms,
    }


def _response(row: dict | None) -> dict | None:
    if row is None:
        return None
    return {
        "text": shorten(row.get("text")),
        "correct": bool(row.get("correct")),
        "length": row.get("length"),
        "truncated": bool(row.get("truncated")),
    }
