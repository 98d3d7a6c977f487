"""What the numbers say: a level for each metric, four questions for each arm, and a verdict in plain words."""

from __future__ import annotations

from markupsafe import Markup

from ctxjax.evaluation import metrics as metrics_lib
from ctxjax.report.formatting import finite, finite_list, interval, pair, percent

BASE, TEACHER = "base", "teacher"  # rows of untrained models; a teacher that is the base has no row of its own
NO_BREAK = "\u00a0"  # keeps a number and its unit on one line

# Limits of the levels, which the page prints under its table. They are conventions for the eye, not tests.
CLOSED_GOOD, CLOSED_BAD = 0.90, 0.50  # share of the way from the base's Acc_x to the teacher's accuracy
HARM = 0.02  # of harm less its floor. Good: the whole interval is below it; bad: the whole interval is above it
KEPT_GOOD, KEPT_BAD = 0.90, 0.50  # obedience as a share of the base's
SHORT_GOOD, SHORT_BAD = 0.02, 0.05  # points below the teacher's accuracy
LOST_GOOD, LOST_BAD = 0.05, 0.20  # points of Acc_xc below the base's, at the lowest evaluation on dev
FEW_ANSWERS = 30  # with fewer questions answered right without the context, harm is hardly measured


def mark_unknown_floors(results: dict, config: object) -> dict:
    """Return the results with ``harm_floor`` None where it is not known: responses sampled once for each question.

    ``config``: the configuration of the run. Greedy responses have no entry: their floor is 0.
    """
    decoding = config.get("eval") if isinstance(config, dict) else None
    if not isinstance(decoding, dict) or not finite(decoding.get("temperature")):
        return results
    return {arm: {"harm_floor": None} | row for arm, row in results.items()}


def trained(results: dict) -> dict[str, dict]:
    """Return the rows of the trained arms, in order."""
    return {arm: row for arm, row in results.items() if arm not in (BASE, TEACHER)}


def reference(results: dict) -> dict | None:
    """Return the row that arms are judged by: the base's. If the teacher is another model, its accuracy with the
    context replaces the base's."""
    base, teacher = results.get(BASE), results.get(TEACHER)
    if base is None or teacher is None:
        return base
    return base | {key: teacher.get(key) for key in ("acc_xc", "acc_xc_ci")}


def share_closed(row: dict, base: dict | None) -> float | None:
    """Return the share of the way from the base's Acc_x to the teacher's accuracy; None if the context hardly helps.

    A ratio of accuracies would be misleading: if the context adds only a few points, it is near 1 for the base itself.
    """
    start, target = _rate(base, "acc_x"), _rate(base, "acc_xc")
    reached = _rate(row, "acc_x")
    if start is None or target is None or reached is None or target - start < SHORT_GOOD:
        return None
    return (reached - start) / (target - start)


def right_without_context(row: dict) -> int | None:
    """Return the number of questions answered right without the context, the denominator of harm.

    With several samples of a question it is the mean over the samples.
    """
    flips = row.get("flips")
    if isinstance(flips, dict):
        counts = finite_list([flips.get("right_right"), flips.get("right_wrong")])
        if None not in counts:
            return round(sum(counts) / samples(row))
    rate, questions = _rate(row, "acc_x"), finite(row.get("n"))
    return None if rate is None or questions is None else round(rate * questions)


def samples(row: dict) -> float:
    """Return the number of responses to each question."""
    return finite(row.get("samples")) or 1.0


def first_arm(results: dict) -> str | None:
    """Return the arm that the others are compared with; None if no arm is compared."""
    keys = [metric.key for metric in metrics_lib.METRICS if metric.compare is not None]
    return next((name for row in results.values() for key in keys if (name := _compared_with(row, key))), None)


def difference(row: dict, key: str) -> tuple[float | None, list[float | None]]:
    """Return (difference, [low, high]) of a metric that compares an arm with the first one; (None, []) if missing."""
    values = finite_list(row.get(f"{key}_{_compared_with(row, key)}"))
    return (values[0], values[1:]) if len(values) == 3 else (None, [])


def _compared_with(row: dict, key: str) -> str | None:
    """Return the arm's name in KEY_ARM, as results.json calls a metric of two arms."""
    return next((name.removeprefix(f"{key}_") for name in row if name.startswith(f"{key}_")), None)


def levels(row: dict, base: dict | None) -> dict[str, str]:
    """Return a level ('good', 'mid', 'bad') by metric key; metrics that cannot be judged are left out."""
    target = _rate(base, "acc_xc")
    found = {
        "acc_x": _above(share_closed(row, base), CLOSED_GOOD, CLOSED_BAD),
        "harm": _harm_level(row),
        "gap": _gap_level(_rate(row, "gap")),
        "context_loss": _context_loss_level(row),
    }
    for key in ("acc_xc", "both_correct", "acc_empty"):
        value = _rate(row, key)
        if value is not None and target is not None:
            found[key] = _above(value - target, -SHORT_GOOD, -SHORT_BAD)
    kept, was = _above_floor(row), _above_floor(base)
    if kept is not None and was is not None and was > SHORT_GOOD:
        found["obedience"] = _above(kept / was, KEPT_GOOD, KEPT_BAD)
    return {key: level for key, level in found.items() if level}


def glance(results: dict) -> list[tuple[str, list[str]]]:
    """Answer four questions for each trained arm: (arm, levels of [internalized, unharmed, obeys others, used the
    context while learning])."""
    rows = []
    for arm, row in trained(results).items():
        judged = levels(row, reference(results))
        rows.append((arm, [judged.get(key, "") for key in ("acc_x", "harm", "obedience", "context_loss")]))
    return rows


def verdict(results: dict) -> Markup:
    """Return the paragraph at the top of the page, made from the numbers alone; arm names are escaped."""
    base = reference(results)
    sentences = [_about_base(base, TEACHER in results)]
    for arm, row in trained(results).items():
        sentences += [_about_accuracy(arm, row, base), _about_prompts(row, base), _about_learning(row)]
    sentences += [
        _about_all(glance(results)),
        Markup("Intervals cover the questions of this run, not other seeds."),
    ]
    return Markup(" ").join(sentence for sentence in sentences if sentence)


def _about_base(base: dict | None, has_teacher: bool) -> Markup:
    bare, target = _rate(base, "acc_x"), _rate(base, "acc_xc")
    if bare is None or target is None:
        return Markup("The base model was not measured in both views, so there is no target to compare with.")
    questions = finite(base.get("n"))
    of = f" of {questions:.0f} questions" if questions else ""
    other = "its teacher with it" if has_teacher else "with it"
    text = f"Without the context the base model is right on {_show(bare)}{of}, {other} on {_show(target)}"
    if target - bare < SHORT_GOOD:
        return Markup(text + ": the context hardly helps, so there is little to internalize.")
    return Markup(text + (", which is the target." if has_teacher else ", which is the teacher and the target."))


def _about_accuracy(arm: str, row: dict, base: dict | None) -> Markup:
    reached = _rate(row, "acc_x")
    if reached is None:
        return Markup("<code>{}</code> has no accuracy without the context.").format(arm)
    share = share_closed(row, base)
    claim = {
        "good": "has internalized the context",
        "mid": f"has internalized the context in part, {100 * (share or 0):.0f}{NO_BREAK}% of the way",
        "bad": "has not internalized the context",
        "": "answers without the context",
    }[_above(share, CLOSED_GOOD, CLOSED_BAD)]
    return Markup("<code>{}</code> {} (<b>{}</b> without it).").format(arm, claim, _show(reached))


def _about_prompts(row: dict, base: dict | None) -> Markup:
    """Return a sentence on what the model does under a context again: the internalized one, and other ones."""
    harm_level, obedience_level = _harm_level(row), levels(row, base).get("obedience", "")
    harm, obedience = _harm_clause(row, harm_level), _obedience_clause(row, base, obedience_level)
    if not harm or not obedience:
        clause = harm or obedience
        return Markup("{}{}.").format(clause[:1].upper(), clause[1:]) if clause else Markup("")
    contrast = "good" in (harm_level, obedience_level) and harm_level != obedience_level
    conjunction = "but" if contrast else "and"
    return Markup("{}{}, {} {}.").format(harm[:1].upper(), harm[1:], conjunction, obedience)


def _harm_clause(row: dict, level: str) -> Markup:
    harm = _rate(row, "harm")
    if harm is None:
        return Markup("")
    spread = interval(row.get("harm_ci")).replace(" ", NO_BREAK)
    figures = Markup("<b>{}</b>{} of its right answers turn wrong").format(_show(harm), f" {spread}" if spread else "")
    change, ends = difference(row, "harm_minus")
    ends = pair(ends)
    # A difference is put in words only if 0 is outside its interval.
    if change is not None and ends is not None and (ends[1] < 0 or ends[0] > 0):
        points = f"{100 * abs(change):.1f}{NO_BREAK}points {'fewer' if change < 0 else 'more'}"
        figures += Markup(", {} than <code>{}</code>").format(points, _compared_with(row, "harm_minus"))
    count = right_without_context(row)
    if count is not None and count < FEW_ANSWERS:
        figures += f", and only {count} question{' is' if count == 1 else 's are'} answered right without it"
    floor = _rate(row, "harm_floor")
    if floor is not None:
        figures += f"; by sampling alone it would be {_show(floor)}"
    elif "harm_floor" in row and level != "good":
        figures += "; how much of it is due to sampling is not known"
    claim = {
        "good": "the returning context does no harm",
        "mid": "whether the returning context harms it is not decided",
        "bad": "the returning context harms it",
        "": "",
    }[level]
    return Markup("{} ({})").format(claim, figures)


def _obedience_clause(row: dict, base: dict | None, level: str) -> Markup:
    value, obeyed = _rate(row, "obedience"), _rate(base, "obedience")
    if value is None:
        return Markup("")
    not_judged = "its accuracy under other contexts is known, the base's is not"
    if _above_floor(row) is None:
        not_judged = "ignoring other contexts would score as much"
    elif obeyed is not None:
        not_judged = "the base hardly obeyed other contexts more than if it ignored them, so there was nothing to keep"
    claim = {
        "good": "it still obeys other contexts",
        "mid": "it obeys other contexts only in part",
        "bad": "it no longer obeys other contexts",
        "": not_judged,
    }[level]
    against = f", base {_show(obeyed)}" if obeyed is not None else ""
    floor = _rate(row, "obedience_floor")
    against += f"; {_show(floor)} by ignoring them" if floor else ""
    return Markup("{} (<b>{}</b>{})").format(claim, _show(value), against)


def _about_learning(row: dict) -> Markup:
    """Return a sentence on context use while the arm was trained, if it was lost; the end may hide it."""
    lowest = _rate(row, "lowest_acc_xc")
    if lowest is None or _context_loss_level(row) in ("good", ""):
        return Markup("")
    return Markup("While it was trained, its accuracy with the context fell to <b>{}</b> on dev.").format(_show(lowest))


def _about_all(rows: list[tuple[str, list[str]]]) -> Markup:
    end = [(arm, marks[:3]) for arm, marks in rows]  # of the trained model; the fourth question is about the way to it
    if not any(all(marks) for _, marks in end):
        return Markup("")
    winners = [arm for arm, marks in end if set(marks) == {"good"}]
    # A harm between the limits is not decided, and neither is what was not measured.
    open_marks = ({"good", ""}, {"good", "mid", ""}, {"good", ""})
    is_open = any(
        arm not in winners and all(mark in own for mark, own in zip(marks, open_marks, strict=True))
        for arm, marks in end
    )
    shown = " shown to be" if is_open and len(winners) < 2 else ""
    names = Markup(" and ").join(Markup("<code>{}</code>").format(arm) for arm in winners) or "No arm"
    only = "Only " if len(winners) == 1 and len(rows) > 1 else ""
    verb = "are" if len(winners) > 1 else "is"
    return Markup("{}{} {}{} at once internalized, unharmed and still obedient.").format(only, names, verb, shown)


def _show(rate: float) -> str:
    return f"{percent(rate)}{NO_BREAK}%"


def _rate(row: dict | None, key: str) -> float | None:
    return None if row is None else finite(row.get(key))


def _above(value: float | None, good: float, bad: float) -> str:
    if value is None:
        return ""
    return "good" if value >= good else "bad" if value < bad else "mid"


def _harm_level(row: dict) -> str:
    ends = _harm_above_floor(row)
    if ends is None:
        return ""
    low, high = ends
    # The whole interval must be on one side: no harm in 20 questions is no proof of safety.
    return "good" if high <= HARM else "bad" if low >= HARM else "mid"


def _harm_above_floor(row: dict) -> tuple[float, float] | None:
    """Return the interval of harm less its floor; None if there is no harm to judge.

    It contains the interval of harm, moved by the floor, since the bootstrap interval of excess harm is too narrow if
    few questions have events, and is missing if none has.
    """
    harm = _rate(row, "harm")
    if harm is None:
        return None
    low, high = pair(row.get("harm_ci")) or (harm, harm)
    if "harm_floor" not in row:
        return low, high
    floor = _rate(row, "harm_floor")
    if floor is None:  # the floor may be as high as the harm
        return -high, high
    moved = (low - floor, high - floor)
    excess = pair(row.get("excess_harm_ci")) or moved
    return min(excess[0], moved[0]), max(excess[1], moved[1])


def _above_floor(row: dict | None) -> float | None:
    """Return obedience above its floor, as a share of the room above the floor: 0 for a model that ignores contexts, 1
    for one that obeys them all."""
    value, floor = _rate(row, "obedience"), _rate(row, "obedience_floor") or 0.0
    return None if value is None or floor >= 1 else (value - floor) / (1 - floor)


def _context_loss_level(row: dict) -> str:
    lost = _rate(row, "context_loss")
    return _above(None if lost is None else -lost, -LOST_GOOD, -LOST_BAD)


def _gap_level(gap: float | None) -> str:
    if gap is None:
        return ""
    # A positive gap is unfinished internalization, which is no harm: the context still helps.
    return "good" if abs(gap) <= SHORT_GOOD else "mid" if gap > -SHORT_BAD else "bad"
