"""The tables of results: plain text for the console, cells for the page. Their columns come from metrics.METRICS."""

from __future__ import annotations

import dataclasses

from ctxjax.evaluation import metrics as metrics_lib
from ctxjax.evaluation.metrics import Metric
from ctxjax.games.boards import describe_players
from ctxjax.report import assessment
from ctxjax.report.assessment import BASE, TEACHER
from ctxjax.report.formatting import DASH, UNITS, finite, finite_list, interval, mean, percent

# The teacher's row if the base is its own teacher, and if the teacher is another model.
TEACHER_LABELS = ("base with context = teacher", "teacher with context")
# What the frozen teacher is asked to hand over: its accuracy with the context, in either view of the student.
TARGET_KEYS = ("acc_x", "acc_xc")
WITH_INTERVAL = "harm"  # the one metric whose interval the console table shows
LONGEST_CONTEXT = 100  # characters of a context in the table of obedience


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: a header with its unit, and the metrics that share it."""

    header: str
    metrics: tuple[Metric, ...]

    @property
    def key(self) -> str:
        return self.metrics[0].key


@dataclasses.dataclass(frozen=True)
class Cell:
    """A printed value, its interval ('' if none) and its level: 'good', 'mid', 'bad' or '' (not judged)."""

    text: str
    interval: str = ""
    level: str = ""


def columns(table: str, first_arm: str = "the first arm") -> list[Column]:
    """Return the columns of a table, "results" or "checks", in the order of METRICS.

    ``first_arm``: the arm that metrics of two arms compare with.
    """
    by_header: dict[str, list[Metric]] = {}
    for metric in metrics_lib.METRICS:
        if metric.unit is not None and metric.table == table:
            header = metric.header.replace("{arm}", first_arm) + UNITS[metric.unit].suffix
            by_header.setdefault(header, []).append(metric)
    return [Column(header, tuple(metrics)) for header, metrics in by_header.items()]


def glossary(*tables: str) -> list[tuple[str, str]]:
    """Return (header, definition) of the metrics in these tables, one entry for each header."""
    entries = {}
    for column in (column for table in tables for column in columns(table)):
        metric = column.metrics[0]
        better = f" {metric.better.capitalize()} is better." if metric.better else ""
        entries[metric.header.replace("{arm}", "the first arm")] = metric.definition + better
    return list(entries.items())


def units_note() -> str:
    """Return what the numbers of the main table are, in words."""
    metrics = [column.metrics[0] for column in columns("results")]
    others = [f"{m.header} ({words})" for m in metrics if (words := UNITS[m.unit].words) != "percent"]
    return "Percent" + (f", except {', '.join(others)}" if others else "") + "."


def results_table(results: dict) -> str:
    """Format results.json as aligned text that is also a Markdown table, without a newline at the end.

    ``results``: metrics by arm; rates in 0..1, KL in nats per token. Missing values are printed as a dash. Below the
    scores of a game is what players without skill reach on its boards.
    """
    shown = columns("results")
    header = ["arm"] + [c.header + (" [95 % CI]" if c.key == WITH_INTERVAL else "") for c in shown]
    body = []
    for label, cells in result_rows(results):
        texts = [label.replace("|", "\\|").replace("\n", " ")]
        for column, cell in zip(shown, cells, strict=True):
            with_interval = column.key == WITH_INTERVAL and cell.interval
            texts.append(f"{cell.text} {cell.interval}" if with_interval else cell.text)
        body.append(texts)
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([*(_line(texts, widths) for texts in [header, rule, *body]), *_board_lines(results)])


def _board_lines(results: dict) -> list[str]:
    """Return a line about the boards of a game, after an empty one; [] if it is no game. All arms play on the same."""
    keys = ("perfect_play", "random_moves", "fixed_path")
    ceiling, random, fixed = (next((finite(row[key]) for row in results.values() if key in row), None) for key in keys)
    return [] if ceiling is None or random is None else ["", f"boards: {describe_players(ceiling, random, fixed)}"]


def result_rows(results: dict) -> list[tuple[str, list[Cell]]]:
    """Return the rows of the main table, (label, one cell for each column); the teacher follows the base."""
    shown, reference = columns("results"), assessment.reference(results)
    rows = []
    if reference is not None:
        rows.append((BASE, [_cell(column, results[BASE]) for column in shown]))
        target, empty = Cell(percent(reference.get("acc_xc")), interval(reference.get("acc_xc_ci"))), Cell(DASH)
        rows.append((TEACHER_LABELS[TEACHER in results], [target if c.key in TARGET_KEYS else empty for c in shown]))
    for arm, row in assessment.trained(results).items():
        levels = assessment.levels(row, reference)
        rows.append((arm, [_cell(column, row, levels.get(column.key, "")) for column in shown]))
        selected = row.get("selected")
        if isinstance(selected, dict):  # the checkpoint that was best on dev, if it is not the last one
            label = f"{arm}, step {selected.get('step')}, best on dev"
            rows.append((label, [_cell(column, selected) for column in shown]))
    return rows


def check_table(results: dict) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Return the headers and the rows, (arm, cells), of the second table: comparisons and sanity checks.

    Columns in which no arm has a value are left out.
    """
    shown = columns("checks", assessment.first_arm(results) or "the first arm")
    by_arm = {arm: [_cell(column, row) for column in shown] for arm, row in results.items()}
    filled = [i for i in range(len(shown)) if any(cells[i].text != DASH for cells in by_arm.values())]
    headers = [shown[i].header for i in filled] + ["step"]
    return headers, [
        (arm, [cells[i] for i in filled] + [Cell(_count(results[arm].get("step")))]) for arm, cells in by_arm.items()
    ]


def obedience_table(results: dict) -> tuple[list[str], list[tuple[str, str, list[Cell]]]]:
    """Return the arms that were measured, and a row for each other context: (shortened text, number of responses, the
    accuracy of each arm). The contexts that the trained arms obey least come first."""
    found = {arm: row.get("obedience_by_context") for arm, row in results.items()}
    found = {arm: by_context for arm, by_context in found.items() if isinstance(by_context, dict) and by_context}
    judged = [by_context for arm, by_context in found.items() if arm in assessment.trained(results)]

    def read(by_context: dict, context: str) -> tuple[float | None, float | None]:
        values = finite_list(by_context.get(context))
        return (values[0], values[1]) if len(values) == 2 else (None, None)

    def mean_accuracy(context: str) -> float:
        accuracy = mean([read(by_context, context)[0] for by_context in judged or found.values()])
        return 1.0 if accuracy is None else accuracy

    rows = []
    for context in sorted(
        {context: None for by_context in found.values() for context in by_context}, key=mean_accuracy
    ):
        values = [read(by_context, context) for by_context in found.values()]
        responses = next((count for _, count in values if count is not None), None)
        rows.append((_shorten(context), _count(responses), [Cell(percent(accuracy)) for accuracy, _ in values]))
    return list(found), rows


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_CONTEXT else text[: LONGEST_CONTEXT - 1] + "…"


def alarm_rows(results: dict) -> list[tuple[str, str, str, str, str]]:
    """Return (arm, alarm, step at which it was raised, rows of metrics.jsonl in which it held, its message), by step.

    Skipped steps have a row of their own.
    """
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


def _cell(column: Column, row: dict, level: str = "") -> Cell:
    """Print a column's metrics of one model; two that share a header as "without / with", without intervals."""
    parts = [_print(metric, row) for metric in column.metrics]
    if len(parts) == 1:
        return Cell(*parts[0], level)
    texts = [text for text, _ in parts]
    return Cell(DASH if set(texts) == {DASH} else " / ".join(texts))


def _print(metric: Metric, row: dict) -> tuple[str, str]:
    """Return the printed value and its interval."""
    unit = UNITS[metric.unit]
    value, ends = row.get(metric.key), row.get(f"{metric.key}_ci")
    if metric.compare is not None:
        value, ends = assessment.difference(row, metric.key)
    return unit.form(value), interval(ends, signed=metric.unit == "points")


def _line(texts: list[str], widths: list[int]) -> str:
    cells = [texts[0].ljust(widths[0])]
    cells += [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
    return "| " + " | ".join(cells) + " |"
