"""Chooses and prepares the sample responses that the page shows side by side."""

from ctxjax.report import assessment

SAMPLES = 5
VIEWS = ("bare", "context")
# Head and tail that are shown of a long text: the answer usually stands at the end.
HEAD_CHARACTERS, TAIL_CHARACTERS = 700, 500


def sample_responses(items: dict[str, list[dict]]) -> dict:
    """Picks up to SAMPLES items and pairs their two views over the arms.

    Items that the reference arm (`opcd`, else the first trained arm) has right without context and wrong with
    it come first, then any item that is wrong in a view, then the rest; each group in file order.

    Args:
        items: by arm, the rows of items.jsonl.

    Returns:
        {"arm": reference arm or None, "harmed": how many of the shown items that arm has harmed,
        "context": the one context all shown items share or None, "items": [{"id", "question", "context",
        "reference", "arms": [{"arm", "views": {"bare": row or None, "context": row or None}}]}]}.
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
    """Returns the text, with the middle left out and the loss stated where it is long."""
    text = "" if text is None else str(text)
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n[... {left_out} characters left out ...]\n{text[-TAIL_CHARACTERS:]}"


def _pairs(rows: list[dict]) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row.get("view") in VIEWS:
            # With several draws per item the first one is shown.
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
        "context": None if context is None else shorten(context),
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
