"""Build the report: one self-contained HTML page from the files of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import os
import pathlib
import tempfile

import jinja2
from markupsafe import Markup

from ctxjax.evaluation import metrics as metrics_lib
from ctxjax.host import workdir as workdir_lib
from ctxjax.report import assessment, tables
from ctxjax.report.formatting import finite, finite_list, pair
from ctxjax.report.run_files import RunFiles, read_run
from ctxjax.report.samples import sample_responses

CURVES = {"bare": "dev/acc_x", "context": "dev/acc_xc", "obedience": "dev/obedience"}
LOSSES = ("loss", "distill", "anchor", "retain")
COSINES = {
    "mean": "cosine_by_layer",
    "centred": "cosine_centred_by_layer",
    "control": "cosine_control_by_layer",
}
VIEWS = ("bare", "context")
FLIPS = ("right_right", "right_wrong", "wrong_right", "wrong_wrong")

Panels = list[tuple[str, Markup]]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Write ``workdir/report.html`` from the files of a run, and return its path.

    results.json is required; parts of the page are left out if run.json, ARM/metrics.jsonl or ARM/items.jsonl, or
    numbers in them, are missing. The page is written under a temporary name and then renamed, so it is never half
    written.

    Raises FileNotFoundError if results.json is missing, and ValueError if a file cannot be read or if the run was made
    longer after its end and has not ended again.
    """
    workdir = pathlib.Path(workdir)
    files = read_run(workdir)
    is_rounds = "arm" in (files.run.get("inputs") or {})  # the folder of ctxjax.rounds, which keeps no times
    if (workdir / "config.json").is_file() and files.run and not is_rounds and not workdir_lib.has_ended(files.run):
        raise ValueError(
            f"{workdir}: the run has not ended, and its results.json is of an earlier end; start it again with the "
            "same command, and it writes the page at its end"
        )
    text = render(files, name=workdir.resolve().name)
    path = workdir / "report.html"
    handle, temporary = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=workdir)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes private files; others may read a page if they may read its folder.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
    return path


def render(files: RunFiles, name: str) -> str:
    """Return the page as HTML. Text from models and data files is escaped; only the figures are markup."""
    # Imported here: matplotlib takes a second to load, and nothing else needs it.
    from ctxjax.report import plots

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = assessment.mark_unknown_floors(files.results, files.run.get("config"))
    losses = {arm: _loss_series(rows) for arm, rows in files.metrics.items()}
    curves = {arm: _dev_series(rows) for arm, rows in files.metrics.items()}
    positions = {arm: finite_list(row.get("view_kl_by_position")) for arm, row in results.items()}
    cosines = _cosine_series(results)
    styles = plots.STYLES
    check_headers, checks = tables.check_table(results)
    obedience_arms, obedience = tables.obedience_table(results)
    return environment.get_template("report.html.j2").render(
        name=name,
        run=files.run,
        facts=_facts(files.run),
        settings=_flatten(files.run.get("config")),
        verdict=assessment.verdict(results),
        glance=assessment.glance(results),
        limits=assessment,
        columns=tables.columns("results"),
        units_note=tables.units_note(),
        rows=tables.result_rows(results),
        teacher_labels=tables.TEACHER_LABELS,
        check_headers=check_headers,
        checks=checks,
        obedience_arms=obedience_arms,
        obedience=obedience,
        glossary=tables.glossary("results", "checks"),
        alarms=tables.alarm_rows(results),
        curves=_curve_panels(curves, results, plots),
        curves_legend=_legend(
            {
                "without context": styles["bare"],
                "with context": styles["context"],
                "obeys other contexts": styles["obedience"],
                "teacher": styles["target"],
            },
            plots,
        ),
        bars=_bars(results, plots),
        flips=_flips(results),
        answers="Responses" if any(assessment.samples(row) > 1 for row in results.values()) else "Questions",
        lengths=_length_panels(files.items, plots),
        views_legend=_legend({"without context": styles["bare"], "with context": styles["context"]}, plots),
        cosines=_cosine_panels(cosines, results, plots),
        cosine_legend=_legend(
            {
                "with against without context": styles["mean"],
                "centred": styles["centred"],
                "control: with another context": styles["control"],
            },
            plots,
        ),
        positions=_position_plot(positions, plots),
        positions_legend=_legend({arm: plots.arm_style(i) for i, arm in enumerate(positions) if positions[arm]}, plots),
        losses=_panels(losses, lambda arm, series: plots.loss_curves(series, f"Training losses of {arm}")),
        losses_legend=_legend(
            {key: styles[key] for key in LOSSES if any(key in series for series in losses.values())}, plots
        ),
        samples=sample_responses(files.items),
    )


def _panels(data: Mapping[str, object], draw: Callable[[str, object], str]) -> Panels:
    return [(arm, Markup(draw(arm, value))) for arm, value in data.items() if value]


def _legend(entries: Mapping[str, tuple], plots) -> list[tuple[str, Markup]]:
    return [(name, Markup(plots.swatch(style))) for name, style in entries.items()]


def _series(rows: Iterable[dict], key: str) -> tuple[list[float], list[float]] | None:
    # A resumed run repeats steps; it went on from the later row.
    points = {}
    for row in rows:
        step, value = finite(row.get("step")), finite(row.get(key))
        if step is not None and value is not None:
            points[step] = value
    steps = sorted(points)
    return (steps, [points[step] for step in steps]) if steps else None


def _dev_series(rows: list[dict]) -> dict:
    found = {name: _series(rows, key) for name, key in CURVES.items()}
    return {name: series for name, series in found.items() if series}


def _loss_series(rows: list[dict]) -> dict:
    found = {key: _series(rows, key) for key in LOSSES}
    # A term of weight 0 is logged as zeros, and a flat line at 0 says nothing.
    return {key: series for key, series in found.items() if series and any(series[1])}


def _curve_panels(curves: dict, results: dict, plots) -> Panels:
    steps = [step for series in curves.values() for steps, _ in series.values() for step in steps]
    target = finite((assessment.reference(results) or {}).get("acc_xc"))
    return _panels(
        curves,
        lambda arm, series: plots.accuracy_curves(
            series, max(steps), target, f"Accuracy of {arm} in both views over the training steps"
        ),
    )


def _bars(results: dict, plots) -> list[tuple[str, Markup]]:
    found, metrics = [], {metric.key: metric for metric in metrics_lib.METRICS}
    for key, style in (("harm", "context"), ("obedience", "obedience")):
        title = f"{metrics[key].header}: {metrics[key].definition}"
        rows = [(arm, finite(row.get(key)), pair(row.get(f"{key}_ci")), "not measured") for arm, row in results.items()]
        if key == "harm":
            rows = [_base_harm(results[arm]) if arm == assessment.BASE else (arm, *rest) for arm, *rest in rows]
        if any(rate is not None for _, rate, _, _ in rows):
            label = f"{title} By arm, with 95 % intervals."
            found.append((title, Markup(plots.rate_bars(rows, style, label))))
    return found


def _base_harm(row: dict) -> tuple:
    # The base is hardly ever right without the context: its harm would be a ratio of accidents.
    count = assessment.right_without_context(row)
    if count is None or count < assessment.FEW_ANSWERS:
        return (assessment.BASE, None, None, "too few right answers without the context")
    return (assessment.BASE, finite(row.get("harm")), pair(row.get("harm_ci")), "not measured")


def _flips(results: dict) -> list[dict]:
    found = []
    for arm, row in results.items():
        flips = row.get("flips")
        counts = finite_list([flips.get(key) for key in FLIPS]) if isinstance(flips, dict) else []
        if counts and None not in counts and sum(counts) > 0:
            cells = {key: (int(n), n / sum(counts)) for key, n in zip(FLIPS, counts, strict=True)}
            found.append({"arm": arm, **cells})
    return found


def _length_panels(items: dict[str, list[dict]], plots) -> Panels:
    lengths = {}
    for arm, rows in items.items():
        by_view = {view: [finite(row.get("length")) for row in rows if row.get("view") == view] for view in VIEWS}
        known = {view: [n for n in values if n is not None] for view, values in by_view.items()}
        lengths[arm] = {view: values for view, values in known.items() if values}
    every = [n for by_view in lengths.values() for values in by_view.values() for n in values]
    return _panels(
        lengths,
        lambda arm, by_view: plots.length_histogram(
            by_view, (min(every), max(every)), f"Response lengths of {arm} in both views"
        ),
    )


def _cosine_series(results: dict) -> dict[str, dict]:
    found = {}
    for arm, row in results.items():
        series = {name: finite_list(row.get(key)) for name, key in COSINES.items()}
        found[arm] = {name: values for name, values in series.items() if any(v is not None for v in values)}
    return found


def _cosine_panels(cosines: dict[str, dict], results: dict, plots) -> Panels:
    fifth = {arm: finite_list(row.get("cosine_p5_by_layer")) for arm, row in results.items()}
    every = [v for series in cosines.values() for values in series.values() for v in values if v is not None]
    every += [v for values in fifth.values() for v in values if v is not None]
    bottom = min([*every, 0.9]) - 0.02
    return _panels(
        cosines,
        lambda arm, series: plots.cosine_panel(series, fifth[arm], bottom, f"Cosine by layer of {arm}"),
    )


def _position_plot(positions: dict, plots) -> Markup | None:
    if not any(value is not None for values in positions.values() for value in values):
        return None
    return Markup(plots.position_lines(positions, "View KL by response position, one line per arm"))


def _facts(run: dict) -> list[tuple[str, str]]:
    facts = [(key, str(run[key])) for key in ("started", "device", "command") if run.get(key)]
    seconds = _times(run.get("seconds"))
    if seconds:
        facts.insert(min(2, len(facts)), ("time of the last start", seconds))
    versions = run.get("versions")
    if isinstance(versions, dict) and versions:
        facts.append(("versions", ", ".join(f"{package} {version}" for package, version in versions.items())))
    return facts


def _times(seconds: object) -> str:
    known = {phase: finite(value) for phase, value in seconds.items()} if isinstance(seconds, dict) else {}
    return ", ".join(f"{phase} {value:,.0f} s" for phase, value in known.items() if value is not None)


def _flatten(config: object, prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested configuration as (dotted name, value) pairs, in its order."""
    if not isinstance(config, dict):
        return [(prefix, str(config))] if prefix else []
    return [
        entry for key, value in config.items() for entry in _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    ]
