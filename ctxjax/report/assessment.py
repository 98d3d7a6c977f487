"""What the numbers say: a level per metric, three questions per arm, and a verdict in plain words."""

from markupsafe import Markup

from ctxjax.report.formatting import finite, finite_list, interval, pair, percent

BASE, TEACHER = "base", "teacher"  # rows that were not trained; a teacher that is the base has no row of its own
OPCD = "opcd"
NO_BREAK = "\u00a0"  # keeps a number and its unit on one line

# The report's reading aids, printed beside the table. They are conventions for the eye, not tests.
CLOSED_GOOD, CLOSED_BAD = 0.90, 0.50  # share of the way from the base's Acc_x to the teacher's accuracy
HARM_GOOD, HARM_BAD = 0.02, 0.01  # the interval lies below the first, or above the second
KEPT_GOOD, KEPT_BAD = 0.90, 0.50  # obedience as a share of the base's
SHORT_GOOD, SHORT_BAD = 0.02, 0.05  # points below the teacher's accuracy
FEW_ANSWERS = 30  # below this many answers right without context, harm is hardly measured


def trained(results: dict) -> dict[str, dict]:
    """The rows of the trained arms, in order."""
    return {arm: row for arm, row in results.items() if arm not in (BASE, TEACHER)}


def reference(results: dict) -> dict | None:
    """The row that arms are judged by: the base, with the teacher's accuracy under the context for its own where the
    teacher is a model of its own."""
    base, teacher = results.get(BASE), results.get(TEACHER)
    if base is None or teacher is None:
        return base
    return base | {key: teacher.get(key) for key in ("acc_xc", "acc_xc_ci")}


def share_closed(row: dict, base: dict | None) -> float | None:
    """Share of the way from the base's Acc_x to the teacher's accuracy; None where the context hardly helps.

    A ratio of accuracies would call a base internalized whose context adds only a few points.
    """
    start, target = _rate(base, "acc_x"), _rate(base, "acc_xc")
    reached = _rate(row, "acc_x")
    if start is None or target is None or reached is None or target - start < SHORT_GOOD:
        return None
    return (reached - start) / (target - start)


def right_without_context(row: dict) -> int | None:
    """Number of questions right without context, which is the denominator of harm."""
    flips = row.get("flips")
    if isinstance(flips, dict):
        counts = finite_list([flips.get("right_right"), flips.get("right_wrong")])
        if None not in counts:
            return int(sum(counts))
    rate, questions = _rate(row, "acc_x"), finite(row.get("n"))
    return None if rate is None or questions is None else round(rate * questions)


def levels(row: dict, base: dict | None) -> dict[str, str]:
    """Level ('good', 'mid', 'bad') by metric key; metrics that cannot be judged are left out."""
    target, obeyed = _rate(base, "acc_xc"), _rate(base, "obedience")
    found = {
        "acc_x": _above(share_closed(row, base), CLOSED_GOOD, CLOSED_BAD),
        "harm": _harm_level(row),
        "gap": _gap_level(_rate(row, "gap")),
    }
    for key in ("acc_xc", "both_correct", "acc_empty"):
        value = _rate(row, key)
        if value is not None and target is not None:
            found[key] = _above(value - target, -SHORT_GOOD, -SHORT_BAD)
    value = _rate(row, "obedience")
    if value is not None and obeyed:
        found["obedience"] = _above(value / obeyed, KEPT_GOOD, KEPT_BAD)
    return {key: level for key, level in found.items() if level}


def glance(results: dict) -> list[tuple[str, list[str]]]:
    """Three questions per trained arm: (arm, levels of [internalized, unharmed, obeys others])."""
    rows = []
    for arm, row in trained(results).items():
        judged = levels(row, reference(results))
        rows.append((arm, [judged.get(key, "") for key in ("acc_x", "harm", "obedience")]))
    return rows


def verdict(results: dict) -> Markup:
    """The paragraph at the top of the page, from the numbers alone; arm names are escaped."""
    base = reference(results)
    sentences = [_about_base(base, TEACHER in results)]
    for arm, row in trained(results).items():
        sentences += [_about_accuracy(arm, row, base), _about_prompts(row, base)]
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
    """One sentence on the two ways to meet a prompt again: the internalized context, and other ones."""
    harm_level, obedience_level = _harm_level(row), levels(row, base).get("obedience", "")
    harm, obedience = _harm_clause(row, harm_level), _obedience_clause(row, base, obedience_level)
    if not harm or not obedience:
        clause = harm or obedience
        return Markup(clause[:1].upper() + clause[1:] + ".") if clause else Markup("")
    contrast = "good" in (harm_level, obedience_level) and harm_level != obedience_level
    return Markup(f"{harm[:1].upper()}{harm[1:]}, {'but' if contrast else 'and'} {obedience}.")


def _harm_clause(row: dict, level: str) -> str:
    harm = _rate(row, "harm")
    if harm is None:
        return ""
    spread = interval(row.get("harm_ci")).replace(" ", NO_BREAK)
    figures = f"<b>{_show(harm)}</b>{' ' + spread if spread else ''} of its right answers turn wrong"
    change, low, high = (finite_list(row.get("harm_minus_opcd")) + [None] * 3)[:3]
    # A difference is put in words only where its interval leaves out zero.
    if change is not None and low is not None and high is not None and (high < 0 or low > 0):
        direction = "fewer" if change < 0 else "more"
        figures += f", {100 * abs(change):.1f}{NO_BREAK}points {direction} than <code>{OPCD}</code>"
    count = right_without_context(row)
    if count is not None and count < FEW_ANSWERS:
        figures += f", and there are only {count}"
    claim = {
        "good": "the returning context does no harm",
        "mid": "the returning context does neither clear harm nor clearly none",
        "bad": "the returning context harms it",
        "": "",
    }[level]
    return f"{claim} ({figures})"


def _obedience_clause(row: dict, base: dict | None, level: str) -> str:
    value, obeyed = _rate(row, "obedience"), _rate(base, "obedience")
    if value is None:
        return ""
    claim = {
        "good": "it still obeys other contexts",
        "mid": "it obeys other contexts only in part",
        "bad": "it no longer obeys other contexts",
        "": "its accuracy under other contexts is known, the base's is not",
    }[level]
    against = f", base {_show(obeyed)}" if obeyed is not None else ""
    return f"{claim} (<b>{_show(value)}</b>{against})"


def _about_all(rows: list[tuple[str, list[str]]]) -> Markup:
    complete = [(arm, marks) for arm, marks in rows if all(marks)]
    if not complete:
        return Markup("")
    winners = [arm for arm, marks in complete if set(marks) == {"good"}]
    if not winners:
        return Markup("No arm is at once internalized, unharmed and still obedient.")
    names = Markup(" and ").join(Markup("<code>{}</code>").format(arm) for arm in winners)
    only = "Only " if len(winners) == 1 and len(rows) > 1 else ""
    verb = "is" if len(winners) == 1 else "are"
    return Markup("{}{} {} at once internalized, unharmed and still obedient.").format(only, names, verb)


def _show(rate: float) -> str:
    return f"{percent(rate)}{NO_BREAK}%"


def _rate(row: dict | None, key: str) -> float | None:
    return None if row is None else finite(row.get(key))


def _above(value: float | None, good: float, bad: float) -> str:
    if value is None:
        return ""
    return "good" if value >= good else "bad" if value < bad else "mid"


def _harm_level(row: dict) -> str:
    harm = _rate(row, "harm")
    if harm is None:
        return ""
    low, high = pair(row.get("harm_ci")) or (harm, harm)
    # The whole interval must lie on one side: a point at 0 from 20 questions is no proof of safety.
    return "good" if high <= HARM_GOOD else "bad" if low >= HARM_BAD else "mid"


def _gap_level(gap: float | None) -> str:
    if gap is None:
        return ""
    # A positive gap is unfinished internalization (the context is still a scaffold), which is no harm.
    return "good" if abs(gap) <= SHORT_GOOD else "mid" if gap > -SHORT_BAD else "bad"
