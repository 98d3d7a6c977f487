"""Write the report of a study: tables as CSV and LaTeX, one figure as SVG, and a page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
import csv
import io
from pathlib import Path

import jinja2
from markupsafe import Markup

from ctxjax.evaluation.metrics import METRICS
from ctxjax.host.workdir import write_text
from ctxjax.report import plots
from ctxjax.report.formatting import DASH, decimals, interval, p_value, percent, signed_percent
from ctxjax.study import results as results_lib, worker
from ctxjax.study.record import VALUES
from ctxjax.study.results import HEADERS, UNITS, Results
from ctxjax.study.worker import Folder

Row = Sequence[str]


def write_report(folder: Folder) -> Path:
    """Write the folder ``report`` of a study, from the runs that are finished; return the path of its page.

    Raises ValueError if no run of the second phase is done.
    """
    results = results_lib.read_results(folder)
    metrics = list(results_lib.list_metrics(results))
    tests = results_lib.list_tests(results, folder.study.first_arm)
    tables = {
        "metrics": metrics, "tests": tests, "signs": list(results_lib.list_signs(tests)),
        "rates": list(results_lib.list_rates(folder)), "runs": list(results_lib.list_runs(folder)),
    }  # fmt: skip
    place = folder.root / "report"
    place.mkdir(exist_ok=True)
    for name, rows in tables.items():
        write_text(place / f"{name}.csv", format_csv(rows))
    shown = {"metrics": metrics_table(metrics), "tests": tests_table(tests), "signs": signs_table(tables["signs"])}
    for name, (header, lines) in shown.items():
        write_text(place / f"{name}.tex", format_latex(header, lines))
    figure = draw_harm_and_obedience(results, ("base", *folder.study.run_arms))
    write_text(place / "harm_obedience.svg", plots.standalone(figure))
    definitions = [(HEADERS[metric.key], metric.definition) for metric in METRICS if metric.key in HEADERS]
    commits = sorted({row["commit"] for row in tables["runs"] if row["commit"]})
    page = _page().render(
        figure=Markup(figure), tables=shown, definitions=definitions, first=folder.study.first_arm,
        progress=worker.format_progress(folder).splitlines()[-1], commits=commits,
    )  # fmt: skip
    write_text(place / "index.html", page)
    return place / "index.html"


def _page() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.j2")


def format_csv(rows: list[dict]) -> str:
    """Return rows as CSV with a header; "" without rows. None is an empty cell."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def format_latex(header: Row, lines: list[Row]) -> str:
    """Return a table as a LaTeX tabular (package booktabs)."""

    def line(cells: Row) -> str:
        return " & ".join(map(_escape, cells)) + r" \\"

    columns = "ll" + "r" * (len(header) - 2)
    body = [line(header), r"\midrule", *map(line, lines)]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    for sign in "&%#_":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "$<$").replace("-", "$-$" if text.startswith("-") else "-", 1)


def _form(key: str, value: float | None) -> str:
    if key in VALUES:
        return decimals(value)
    return (signed_percent if UNITS[key] == "change" else percent)(value)


def _with_interval(key: str, value: float | None, ends: tuple) -> str:
    if None in ends:
        return _form(key, value)
    if key in VALUES:
        return f"{decimals(value)} [{decimals(ends[0])}, {decimals(ends[1])}]"
    return f"{_form(key, value)} {interval(ends, signed=UNITS[key] == 'change')}"


def _difference(mean: float, row: dict) -> str:
    return f"{signed_percent(mean)} {interval((row['low'], row['high']), signed=True)}".strip()


def metrics_table(rows: list[dict]) -> tuple[Row, list[Row]]:
    """Return header and lines: a line for each configuration and arm, "mean [low, high]" of each metric."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        own = lines.setdefault((row["configuration"], row["arm"]), {})
        own[row["metric"]] = _with_interval(row["metric"], row["mean"], (row["low"], row["high"]))
        own["seeds"] = str(row["seeds"])
    units = {key: "" if key in VALUES else " %" for key in HEADERS}
    header = ("configuration", "arm", "seeds", *(HEADERS[key] + units[key] for key in HEADERS))
    body = [(*names, own["seeds"], *(own.get(key, DASH) for key in HEADERS)) for names, own in lines.items()]
    return header, body


def tests_table(rows: list[dict]) -> tuple[Row, list[Row]]:
    """Return header and lines: a line for each arm against the first one, in each configuration and metric."""
    header = ("configuration", "arm", "metric", "difference, points", "p", "p (Holm)")
    body = []
    for row in rows:
        difference = _difference(row["difference"], row)
        p_values = [p_value(row["p"]), p_value(row["p_holm"])]
        body.append((row["configuration"], row["arm"], HEADERS[row["metric"]], difference, *p_values))
    return header, body


def signs_table(rows: list[dict]) -> tuple[Row, list[Row]]:
    """Return header and lines: a line for each arm and metric, over all configurations."""
    header = ("arm", "metric", "below", "above", "of", "p (sign test)", "mean difference, points", "p (Holm) < 0.05")
    body = [
        (
            row["arm"], HEADERS[row["metric"]], str(row["below"]), str(row["above"]), str(row["configurations"]),
            p_value(row["p"]), _difference(row["mean_difference"], row), str(row["significant"]),
        )
        for row in rows
    ]  # fmt: skip
    return header, body


def draw_harm_and_obedience(results: Results, arms: Sequence[str]) -> str:
    """Draw harm against obedience: a point with intervals for each configuration and each of ``arms``."""
    points: dict[str, list] = {}
    for arm in arms:
        for models in results.values():
            pair = tuple(results_lib.mean_over_seeds(models.get(arm, []), key) for key in ("harm", "obedience"))
            if None not in (pair[0].value, pair[1].value):
                points.setdefault(arm, []).append(pair)
    label = "Harm against obedience, a point for each configuration and arm, with 95 % intervals over seeds"
    return plots.rate_scatter(points, (HEADERS["harm"], HEADERS["obedience"]), label)
