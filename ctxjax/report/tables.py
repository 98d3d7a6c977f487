"""The table of results: plain text for the console, cells for the page."""

from collections.abc import Callable
import dataclasses

from ctxjax.report import assessment
from ctxjax.report.assessment import BASE, TEACHER
from ctxjax.report.formatting import (
    DASH,
    decimals,
    finite,
    finite_list,
    interval,
    mean,
    p_value,
    percent,
    signed_percent,
)

# The teacher's row where the base is its own teacher, and where the teacher is another model.
TEACHER_LABELS = ("base with context = teacher", "teacher with context")
# What the frozen teacher is asked to hand over: its accuracy with context, in either view of the student.
TARGET_KEYS = ("acc_x", "acc_xc")


@dataclasses.dataclass(frozen=True)
class Column:
    """One metric: its key in results.json, its header and how its value is printed."""

    key: str
    header: str
    form: Callable[[object], str]


COLUMNS = (
    Column("acc_x", "Acc_x %", percent),
    Column("acc_xc", "Acc_xc %", percent),
    Column("gap", "Gap pp", signed_percent),
    Column("harm", "Harm %", percent),
    Column("benefit", "Benefit %", percent),
    Column("both_correct", "BothCorrect %", percent),
    Column("dlen", "dLen %", signed_percent),
    Column("view_kl", "view KL", decimals),
    Column("cosine", "cosine", decimals),
    Column("obedience", "obedience %", percent),
    Column("acc_empty", "empty context %", percent),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A printed value, its interval ('' if none) and its level: 'good', 'mid', 'bad' or '' (not judged)."""

    text: str
    interval: str = ""
    level: str = ""


def mean_layer_cosine(row: dict) -> float | None:
    """Mean cosine over the layers' outputs, or None.

    The embedding output (index 0) is left out: the same token has the same embedding in both views, so it
    is 1 whatever the model has learned.
    """
    layers = finite_list(row.get("cosine_by_layer"))
    return mean(layers[1:] if len(layers) > 1 else layers)


def results_table(results: dict) -> str:
    """Lays out the results as aligned text that is valid Markdown too.

    Args:
        results: metrics by arm, as in results.json; rates in 0..1, `view_kl` in nats per token.

    Returns:
        Lines joined by newlines, no newline at the end. Rates are percent, the gap percentage points, missing
        values a dash.
    """
    header = ["arm"] + [column.header + (" [95 % CI]" if column.key == "harm" else "") for column in COLUMNS]
    body = []
    for label, cells in result_rows(results):
        texts = [label.replace("|", "\\|").replace("\n", " ")]
        for column, cell in zip(COLUMNS, cells, strict=True):
            with_interval = column.key == "harm" and cell.interval
            texts.append(f"{cell.text} {cell.interval}" if with_interval else cell.text)
        body.append(texts)
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(_line(texts, widths) for texts in [header, rule, *body])


def result_rows(results: dict) -> list[tuple[str, list[Cell]]]:
    """Rows of the main table, (label, one cell per entry of COLUMNS); the teacher follows the base."""
    reference = assessment.reference(results)
    rows = []
    if reference is not None:
        rows.append((BASE, [_cell(column, results[BASE], "") for column in COLUMNS]))
        target, empty = Cell(percent(reference.get("acc_xc")), interval(reference.get("acc_xc_ci"))), Cell(DASH)
        cells = [target if column.key in TARGET_KEYS else empty for column in COLUMNS]
        rows.append((TEACHER_LABELS[TEACHER in results], cells))
    for arm, row in assessment.trained(results).items():
        levels = assessment.levels(row, reference)
        rows.append((arm, [_cell(column, row, levels.get(column.key, "")) for column in COLUMNS]))
        selected = row.get("selected")
        if isinstance(selected, dict):  # the checkpoint that was best on dev, where that is not the last one
            label = f"{arm}, step {selected.get('step')}, best on dev"
            rows.append((label, [_cell(column, selected, "") for column in COLUMNS]))
    return rows


CHECK_HEADERS = (
    "harm minus opcd, pp",
    "regime",
    "McNemar p, x against xc",
    "paraphrased context %",
    "default answers %",
    "length x / xc",
    "truncated x / xc %",
    "readable x / xc %",
    "lenient x / xc %",
    "step",
)


def check_rows(results: dict) -> list[tuple[str, list[Cell]]]:
    """Rows of the second table: comparisons and sanity checks, one cell per entry of CHECK_HEADERS."""
    rows = []
    for arm, row in results.items():
        difference = finite_list(row.get("harm_minus_opcd"))
        centre = difference[0] if len(difference) == 3 else None
        rows.append(
            (
                arm,
                [
                    Cell(signed_percent(centre), interval(difference[1:], signed=True)),
                    Cell(str(row.get("regime") or DASH)),
                    Cell(p_value(row.get("mcnemar_p"))),
                    Cell(percent(row.get("acc_paraphrase")), interval(row.get("acc_paraphrase_ci"))),
                    Cell(percent(row.get("acc_default")), interval(row.get("acc_default_ci"))),
                    _two(decimals(row.get("length_x"), 1), decimals(row.get("length_xc"), 1)),
                    _two(percent(row.get("truncated_x")), percent(row.get("truncated_xc"))),
                    _two(percent(row.get("parse_x")), percent(row.get("parse_xc"))),
                    _two(percent(row.get("acc_x_lenient")), percent(row.get("acc_xc_lenient"))),
                    Cell(_count(row.get("step"))),
                ],
            )
        )
    return rows


def alarm_rows(results: dict) -> list[tuple[str, str, str, str, str]]:
    """(arm, alarm, step at which it was raised, rows of metrics.jsonl in which it held, what it said), by step; the
    steps that were skipped have a row of their own."""
    found = []
    for arm, row in results.items():
        alarms = row.get("alarms")
        raised = [(name, alarm) for name, alarm in alarms.items() if isinstance(alarm, dict)] if alarms else []
        for name, alarm in sorted(raised, key=lambda pair: finite(pair[1].get("step")) or 0):
            step, held = (_count(alarm.get(key)) for key in ("step", "rows"))
            found.append((arm, name, step, held, str(alarm.get("message") or DASH)))
        if finite(row.get("skipped_steps")):
            text = "steps that were skipped, since their loss or gradient was not finite"
            found.append((arm, "skipped steps", DASH, _count(row["skipped_steps"]), text))
    return found


def _count(value: object) -> str:
    number = finite(value)
    return DASH if number is None else f"{number:g}"


def _cell(column: Column, row: dict, level: str) -> Cell:
    value = mean_layer_cosine(row) if column.key == "cosine" else row.get(column.key)
    return Cell(column.form(value), interval(row.get(f"{column.key}_ci")), level)


def _two(first: str, second: str) -> Cell:
    return Cell(DASH if first == second == DASH else f"{first} / {second}")


def _line(texts: list[str], widths: list[int]) -> str:
    cells = [texts[0].ljust(widths[0])]
    cells += [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
    return "| " + " | ".join(cells) + " |"
