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
# The metrics of the page; the CSV files have all.
SHOWN = ("acc_x", "acc_xc", "harm", "both_correct", "obedience", "acc_empty", "dlen", "cosine_by_layer")
LEARNT_SHARE = 0.9  # a student below this share of the base's Acc_xc has not internalized the context: a hollow point


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
    shown = {
        "metrics": metrics_table(metrics), "tests": tests_table([*filter(_is_shown, tests)]),
        "signs": signs_table([*filter(_is_shown, tables["signs"])]),
    }  # fmt: skip
    for name, (header, lines) in shown.items():
        write_text(place / f"{name}.tex", format_latex(header, lines))
    shown["arms"] = arms_table(folder)
    figure = draw_harm_and_obedience(results, folder.study.run_arms)
    write_text(place / "harm_obedience.svg", plots.standalone(figure))
    definitions = [(HEADERS[metric.key], metric.definition) for metric in METRICS if metric.key in HEADERS]
    commits = sorted({row["commit"][:9] for row in tables["runs"] if row["commit"]})
    page = _page().render(
        figure=Markup(figure), tables=shown, definitions=definitions, first=folder.study.first_arm,
        progress=worker.format_progress(folder).splitlines()[-1], commits=commits, least=results_lib.LEAST,
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
    """Return a table as LaTeX that may go on over pages (packages booktabs and longtable)."""

    def line(cells: Row) -> str:
        return " & ".join(map(_escape, cells)) + r" \\"

    columns = "ll" + "r" * (len(header) - 2)
    head = [rf"\begin{{longtable}}{{{columns}}}", r"\toprule", line(header), r"\midrule", r"\endhead"]
    return "\n".join([*head, *map(line, lines), r"\bottomrule", r"\end{longtable}"]) + "\n"


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
    """Return header and lines: a line for each configuration and arm, "mean [low, high]" of each metric.

    A metric that fewer of an arm's seeds have says how many: "75.0 (1 seed)".
    """
    lines: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        lines.setdefault((row["configuration"], row["arm"]), {})[row["metric"]] = row
    units = {key: "" if key in VALUES else " %" for key in SHOWN}
    header = ("configuration", "arm", "seeds", *(HEADERS[key] + units[key] for key in SHOWN))
    body = []
    for names, own in lines.items():
        seeds = max(row["seeds"] for row in own.values())
        body.append((*names, str(seeds), *(_mean(own.get(key), seeds) for key in SHOWN)))
    return header, body


def _mean(row: dict | None, seeds: int) -> str:
    if row is None:
        return DASH
    text = _with_interval(row["metric"], row["mean"], (row["low"], row["high"]))
    count = row["seeds"]
    return text if count == seeds else f"{text} ({count} seed{'s' * (count > 1)})"


def arms_table(folder: Folder) -> tuple[Row, list[Row]]:
    """Return header and lines: what each arm changes of config.loss, and the rate it got in each configuration."""
    study = folder.study
    rated = [name for name in study.configurations if study.rated_in(name) == name and folder.is_rated(name)]
    rates = {name: folder.rates(name) for name in rated}
    header = ("arm", "config.loss", *(f"rate: {name}" for name in rated))
    body = []
    for arm in dict.fromkeys(arm for name in study.configurations for arm in study.arms_of(name)):
        changes = ", ".join(f"{field} = {value}" for field, value in study.arms[arm].items())
        own = (f"{rates[name][arm]:g}" if arm in rates[name] else DASH for name in rated)
        body.append((arm, changes or "as the configuration has it", *own))
    return header, body


def tests_table(rows: list[dict]) -> tuple[Row, list[Row]]:
    """Return header and lines: a line for each arm against the first one, in each configuration and metric."""
    header = ("configuration", "arm", "metric", "seeds", "difference, points", "p", "p (Holm)")
    body = []
    for row in rows:
        difference = _difference(row["difference"], row)
        p_values = [p_value(row["p"]), p_value(row["p_holm"])]
        seeds = str(row["seeds"]) if row["seeds"] == row["of_seeds"] else f"{row['seeds']} of {row['of_seeds']}"
        body.append((row["configuration"], row["arm"], HEADERS[row["metric"]], seeds, difference, *p_values))
    return header, body


def signs_table(rows: list[dict]) -> tuple[Row, list[Row]]:
    """Return header and lines: a line for each arm and metric, over all configurations."""
    header = ("arm", "metric", "below", "above", "of", "p (sign test)", "mean difference, points", "significant")
    body = [
        (
            row["arm"], HEADERS[row["metric"]], str(row["below"]), str(row["above"]), str(row["configurations"]),
            p_value(row["p"]), _difference(row["mean_difference"], row), str(row["significant"]),
        )
        for row in rows
    ]  # fmt: skip
    return header, body


def draw_harm_and_obedience(results: Results, arms: Sequence[str]) -> str:
    """Draw harm against obedience: a point with intervals for each configuration and each of ``arms``.

    Both are means over the same runs, those that have a harm. A point is hollow if the arm has not internalized the
    context in them (LEARNT_SHARE).
    """
    points: dict[str, list] = {}
    for arm in arms:
        for models in results.values():
            runs = results_lib.runs_with(results_lib.runs_with(models.get(arm, ()), "harm"), "obedience")
            if not runs:
                continue
            harm, obedience, learnt = (results_lib.mean_over_seeds(runs, key) for key in ("harm", "obedience", "acc_x"))
            known = results_lib.mean_over_seeds(models.get("base", ()), "acc_xc").value
            is_hollow = known is not None and learnt.value < LEARNT_SHARE * known
            points.setdefault(arm, []).append((harm, obedience, is_hollow))
    label = "Harm against obedience, a point for each configuration and arm, with 95 % intervals over seeds"
    return plots.rate_scatter(points, (HEADERS["harm"], HEADERS["obedience"]), label)


def _is_shown(row: dict) -> bool:
    return row["metric"] in SHOWN and row["arm"] != "base"
