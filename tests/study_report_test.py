"""The report of a study: every number from planted runs, computed a second time by hand."""

import csv
import json
import math
from pathlib import Path
import re
import shutil
from xml.etree import ElementTree

from ml_collections import ConfigDict
import numpy as np
import pytest
from scipy import stats

from ctxjax.evaluation.outcomes import Outcomes
from ctxjax.evaluation.over_seeds import Sums
from ctxjax.evaluation.statistics import Rate
from ctxjax.report import plots
from ctxjax.study import grid, record, report, results, worker
from ctxjax.study.grid import FINAL, Cell, Study

N, CONTEXTS = 120, 12
# Arm -> by seed, how many of the N questions are right without the context, how many of these are harmed by it, and how
# many answers are right under other contexts.
RIGHT = {
    "opcd": {0: (100, 40, 10), 1: (110, 20, 12), 2: (120, 6, 4)},
    "anchored": {0: (100, 2, 8), 1: (110, 0, 10), 2: (119, 0, 5)},
    "retained": {0: (101, 1, 119), 1: (112, 1, 120), 2: (120, 0, 120)},
}


def write_items(folder, x_right: int, harmed: int, obeyed: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(N)  # of the questions, the same in all arms of a run
    lines = []
    for view in ("bare", "context", "other"):
        for place in range(N):
            rank = int(order[place])
            right = {"bare": rank < x_right, "context": harmed <= rank < x_right, "other": rank < obeyed}[view]
            item = {
                "view": view, "sample": 0, "correct": right, "parsed": "s", "truncated": False, "lenient": None,
                "reason": None, "length": 12 if view == "context" else 10, "context": f"c{place % CONTEXTS}",
            }  # fmt: skip
            lines.append(json.dumps(item) + "\n")
    folder.mkdir(parents=True)
    (folder / "items.jsonl").write_text("".join(lines))


def write_run(run, arms, seed) -> None:
    for arm, counts in arms.items():
        write_items(run / arm, *counts, seed)
    rows = {
        arm: {"cosine_by_layer": [1.0, 0.9, 0.7 + 0.01 * seed], "obedience_by_context": {"a": [1, 2]}} for arm in arms
    }
    rows["opcd"]["lowest_acc_xc"] = 0.5
    rows["opcd"]["alarms"] = {"harm": 4, "context_use": 2}
    (run / "results.json").write_text(json.dumps(rows))
    (run / "run.json").write_text(json.dumps({"commit": "abc", "device": "cpu", "seconds": {"total": 60.0}}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two configurations of three seeds; in the second one the arms are the other way round in one seed."""
    fields = {
        "configurations": {"one": "configs/debug.py", "two_b": "configs/debug.py"}, "own_changes": {},
        "arms": {arm: {} for arm in RIGHT}, "run_arms": tuple(RIGHT), "more_arms": {}, "left_out": {},
        "first_arm": "opcd",
        "rates": (1e-3,), "rates_of": {}, "rate_seeds": (), "seeds": (0, 1, 2, 3), "select": ("both_correct",),
        "changes": {}, "rate_changes": {},
    }  # fmt: skip
    study = Study.of(ConfigDict(fields))
    made = worker.Folder(tmp_path_factory.mktemp("study"), study, grid.check_study(study))
    for configuration in study.configurations:
        for seed in (0, 1, 2):  # seed 3 is not done yet
            run = made.run_of(Cell(configuration, FINAL, seed))
            arms = {"base": (0, 0, 120)} | {arm: counts[seed] for arm, counts in RIGHT.items()}
            if (configuration, seed) == ("two_b", 0):
                arms["opcd"], arms["anchored"] = arms["anchored"], arms["opcd"]
            run.mkdir(parents=True)
            write_run(run, arms, seed)
    report.write_report(made)
    return made


def table(folder, name):
    with (folder.root / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def find(rows, **keys):
    (row,) = (row for row in rows if all(row[key] == value for key, value in keys.items()))
    return row


def test_means_and_intervals_are_of_runs_and_not_of_their_questions(folder):
    rows = table(folder, "metrics")
    row = find(rows, configuration="one", arm="opcd", metric="harm")
    each = [harmed / right for right, harmed, _ in RIGHT["opcd"].values()]
    mean = np.mean(each)
    assert float(row["mean"]) == pytest.approx(mean) and row["seeds"] == "3"
    assert (float(row["lowest_seed"]), float(row["highest_seed"])) == pytest.approx((min(each), max(each)))
    # Wilson's interval for the number of outcomes whose standard error is that of Student's t of the three seeds.
    z, error = stats.norm.ppf(0.975), stats.t.ppf(0.975, 2) * stats.sem(each)
    n = mean * (1 - mean) / (error / z) ** 2
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    assert float(row["low"]) <= centre - half + 1e-9 and float(row["high"]) >= centre + half - 1e-9
    assert float(row["high"]) - float(row["low"]) < 1.3 * 2 * half
    assert float(find(rows, configuration="one", arm="opcd", metric="acc_x")["mean"]) == pytest.approx(330 / 360)
    assert float(find(rows, configuration="one", arm="opcd", metric="acc_xc")["mean"]) == pytest.approx(264 / 360)
    assert float(find(rows, configuration="one", arm="retained", metric="obedience")["mean"]) == pytest.approx(
        359 / 360
    )
    assert float(find(rows, configuration="one", arm="opcd", metric="benefit")["mean"]) == 0.0
    assert float(find(rows, configuration="one", arm="opcd", metric="dlen")["mean"]) == pytest.approx(0.2)
    cosine = find(rows, configuration="one", arm="base", metric="cosine_by_layer")
    ends = stats.t.interval(0.95, 2, 0.805, stats.sem([0.8, 0.805, 0.81]))
    assert (float(cosine["low"]), float(cosine["high"])) == pytest.approx(ends)
    assert not [row for row in rows if row["arm"] == "base" and row["metric"] == "harm"]  # nothing was right


def test_arms_are_tested_on_the_same_questions_and_adjusted_for_the_configurations(folder):
    rows = table(folder, "tests")
    row = find(rows, configuration="one", arm="anchored", metric="harm")
    each = [
        RIGHT["anchored"][seed][1] / RIGHT["anchored"][seed][0] - RIGHT["opcd"][seed][1] / RIGHT["opcd"][seed][0]
        for seed in (0, 1, 2)
    ]
    assert float(row["difference"]) == pytest.approx(np.mean(each))
    p = 1 / (results.SWAPS + 1)  # no draw of swaps differs as much
    assert float(row["p"]) == pytest.approx(p)
    other = find(rows, configuration="two_b", arm="anchored", metric="harm")
    assert float(other["p"]) > float(row["p"])
    assert float(row["p_holm"]) == pytest.approx(2 * p)
    assert float(other["p_holm"]) == pytest.approx(max(2 * p, float(other["p"])))
    # The contexts, not the questions, are what is swapped: twelve of them, all better in all seeds of "retained".
    few = find(rows, configuration="one", arm="anchored", metric="obedience")
    assert float(few["p"]) > 0.1 and float(few["difference"]) < 0
    assert find(rows, configuration="one", arm="retained", metric="obedience")["p"] == row["p"]
    assert not [row for row in rows if row["arm"] == "opcd"]
    lengths = find(rows, configuration="one", arm="anchored", metric="dlen")
    assert (lengths["difference"], lengths["p"], lengths["low"]) == ("0.0", "1.0", "")
    signs = find(table(folder, "signs"), arm="retained", metric="harm")
    assert (signs["below"], signs["above"], float(signs["p"]), signs["configurations"]) == ("2", "0", 0.5, "2")
    own = [find(rows, configuration=name, arm="retained", metric="harm") for name in ("one", "two_b")]
    values = [float(row["difference"]) for row in own]
    mean, error = np.mean(values), stats.sem(values)
    low, high = stats.t.interval(0.95, 1, mean, error)
    found = [float(signs[key]) for key in ("mean_difference", "low", "high")]
    assert error > 0 and np.allclose(found, [mean, low, high], atol=1e-6)


def test_a_point_that_has_not_learnt_its_context_is_hollow(folder):
    found = results.read_results(folder)["one"]

    def draw(models, arms):
        return report.draw_harm_and_obedience({"one": models}, arms)

    assert "#ffffff" not in draw(found, tuple(RIGHT))
    known = {"base": found["retained"], "opcd": [run._replace(sums=run.sums | {"acc_x": poor}) for run, poor in zip(
        found["opcd"], [Sums(np.r_[np.ones(90), np.zeros(30)], np.ones(N))] * 3)]}  # fmt: skip
    assert "#ffffff" in draw(known, ("opcd",))


def test_a_difference_that_all_seeds_share_is_significant_and_that_of_one_seed_is_not():
    alike = [Sums(np.full(12, share), np.ones(12)) for share in (0.0, 1.0)]
    for seeds, significant in (((0, 1, 2), 1), ((0,), 0)):
        first, arm = ([results.RunResult(seed, {"obedience": own}, {}) for seed in seeds] for own in alike)
        (row,) = results.list_tests({"one": {"opcd": first, "retained": arm}}, "opcd")
        assert row["difference"] == 1.0 and row["low"] is None and row["p_holm"] < 0.01
        (counted,) = results.list_signs([row])
        assert counted["significant"] == significant


def test_harm_needs_questions_and_not_samples_of_few():
    few, enough = (np.repeat([True, False], [count * 8, (60 - count) * 8]) for count in (19, 20))
    for correct, is_measured in ((few, False), (enough, True)):
        view = Outcomes(correct, correct, ~correct, np.ones(480), samples=8)
        made = results._reduce(0, record.ModelRecord({}, {}, {"bare": view, "context": view}))
        assert ("harm" in made.sums) == is_measured and "acc_x" in made.sums


def test_records_of_earlier_versions_are_read(folder, tmp_path):
    cell = Cell("one", FINAL, 0)
    written = record._describe(folder.run_of(cell))
    for model in written["models"].values():
        model["values"] = {"cosine_by_layer": 0.8}
        del model["row"]
    (tmp_path / "record.json").write_text(json.dumps(written))
    older, newer = record.read_record(tmp_path), record._read(record._describe(folder.run_of(cell)))
    assert older.models["opcd"].values == {"cosine_by_layer": pytest.approx(0.8)} == newer.models["opcd"].values
    assert older.models["opcd"].views.keys() == newer.models["opcd"].views.keys()


def test_a_metric_of_fewer_seeds_says_so():
    row = {"configuration": "one", "arm": "opcd", "low": None, "high": None, "seeds": 3}
    rows = [row | {"metric": "acc_x", "mean": 0.5}, row | {"metric": "harm", "mean": 0.75, "seeds": 1}]
    header, lines = report.metrics_table(rows)
    line = dict(zip(header, lines[0], strict=True))
    assert (line["seeds"], line["Acc_x %"], line["Harm %"], line["obedience %"]) == ("3", "50.0", "75.0 (1 seed)", "-")


def test_a_test_of_fewer_seeds_says_so_and_is_no_sign():
    ones, none = Sums(np.ones(12), np.ones(12)), Sums(np.zeros(12), np.ones(12))
    first = [results.RunResult(seed, {"acc_x": none} | ({"harm": ones} if not seed else {}), {}) for seed in range(3)]
    arm = [results.RunResult(seed, {"acc_x": ones, "harm": none}, {}) for seed in range(3)]
    rows = results.list_tests({"one": {"opcd": first, "retained": arm}}, "opcd")
    header, lines = report.tests_table(rows)
    found = {line[2]: dict(zip(header, line, strict=True))["seeds"] for line in lines}
    assert found == {"Acc_x": "3", "Harm": "1 of 3"}
    assert [row["metric"] for row in results.list_signs(rows)] == ["acc_x"]


def test_records_keep_the_groups_of_questions(tmp_path):
    rng = np.random.default_rng(0)
    correct = rng.random(60) < 0.5
    view = Outcomes(correct, correct, ~correct, np.ones(60), groups=[f"fact {i % 7}" for i in range(60)])
    read = record._unpack(json.loads(json.dumps(record._pack(view))))
    np.testing.assert_array_equal(read.clusters, view.clusters)
    assert read.contexts is None and len(set(read.groups)) == 7


def test_no_two_arms_of_a_figure_look_alike():
    point = [(Rate(0.1, None), Rate(0.5, None), False)]
    figure = plots.rate_scatter({f"arm{i}": point for i in range(14)}, ("harm", "obedience"), "fourteen arms")
    marks = re.findall(r'<use href="#([^"]+)"[^>]* style="(fill: #\w+)', figure)
    assert len({mark for mark in marks if mark[1] != f"fill: {plots.FAINT}"}) == 14


def test_a_seed_without_a_value_is_not_counted(folder, tmp_path):
    """An arm that answers nearly nothing right without the context has no harm."""
    made = worker.Folder(tmp_path, folder.study, folder.costs)
    for seed in (0, 1, 2):
        run = made.run_of(Cell("one", FINAL, seed))
        run.mkdir(parents=True)
        right = RIGHT["anchored"][seed] if seed else (results.LEAST - 1, results.LEAST - 1, 8)
        write_run(run, {"base": (0, 0, 120), "opcd": RIGHT["opcd"][seed], "anchored": right}, seed)
    (row,) = [
        row for row in results.list_tests(results.read_results(made), "opcd")
        if (row["arm"], row["metric"]) == ("anchored", "harm")
    ]  # fmt: skip
    each = [0 - 20 / 110, 0 - 6 / 120]
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(np.mean(each))


def test_questions_under_one_context_are_not_independent(folder):
    runs = results.read_results(folder)["one"]["opcd"]
    assert all(len(run.sums["obedience"].whole) == CONTEXTS for run in runs)
    assert all(len(run.sums["harm"].whole) == N for run in runs)


def test_the_page_has_every_table_and_the_figure_every_arm(folder):
    place = folder.root / "report"
    page = (place / "index.html").read_text()
    assert len(page) < 2**20 and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert "two_b" in page and "6 done" in page and "abc" in page and "Of the questions answered right" in page
    figure = (place / "harm_obedience.svg").read_text()
    ElementTree.fromstring(figure)
    assert all(arm in figure for arm in RIGHT) and ">base<" not in figure
    for name in ("metrics", "tests", "signs"):
        lines = (place / f"{name}.tex").read_text().splitlines()
        rows = [line for line in lines if line.endswith(r"\\")]
        assert len({line.count("&") - line.count(r"\&") for line in rows}) == 1 and lines[0].startswith(
            r"\begin{longtable}"
        )
        assert not any("_" in line.replace(r"\_", "") for line in lines)
    assert [row["state"] for row in table(folder, "runs")].count("done") == 6
    rates = table(folder, "rates")
    assert not rates  # one rate: nothing was chosen


def test_the_report_is_the_same_without_the_folders_of_the_runs(folder, tmp_path):
    for cell in folder.costs:
        if folder.state(cell) == worker.DONE:
            record.write_record(folder.of(cell))
            path = Path("cells", cell.name, "record.json")
            (tmp_path / path.parent).mkdir(parents=True)
            shutil.copy(folder.root / path, tmp_path / path)
            assert (folder.root / path).stat().st_size < 25_000
    moved = worker.Folder(tmp_path, folder.study, folder.costs)
    report.write_report(moved)
    written = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert written == sorted(path.name for path in (folder.root / "report").iterdir()) and len(written) == 10
    for name in written:
        assert (tmp_path / "report" / name).read_bytes() == (folder.root / "report" / name).read_bytes()


def test_what_is_not_done_has_the_facts_of_its_run(folder, tmp_path):
    made, cell = worker.Folder(tmp_path, folder.study, folder.costs), Cell("one", FINAL, 3)
    made.run_of(cell).mkdir(parents=True)
    (made.run_of(cell) / "run.json").write_text(json.dumps({"commit": "abc", "device": "cpu"}))
    (made.of(cell) / "failed.json").write_text("{}")
    rows = list(results.list_runs(made))
    assert find(rows, configuration="one", seed=3) == {
        "configuration": "one", "phase": FINAL, "seed": 3, "state": "failed", "commit": "abc", "device": "cpu",
        "started": None, "seconds": None, "alarms": "",
    }  # fmt: skip
    assert find(rows, configuration="one", seed=0)["commit"] is None
    done = find(list(results.list_runs(folder)), configuration="one", seed=0)
    assert done["commit"] == "abc" and done["alarms"] == "opcd: harm, context_use"
    quiet = Cell("one", FINAL, 0)
    shutil.copytree(folder.of(quiet), made.of(quiet), ignore=shutil.ignore_patterns("record.json"))
    path = made.run_of(quiet) / "results.json"
    path.write_text(json.dumps({arm: {} for arm in json.loads(path.read_text())}))
    assert find(list(results.list_runs(made)), configuration="one", seed=0)["alarms"] == "not evaluated on dev"


def test_the_figure_has_harm_and_obedience_of_the_same_seeds(folder):
    """Harm needs right answers, which only one of three runs has; the others obey less."""
    found = results.read_results(folder)["one"]["retained"]
    poor = [run._replace(sums={k: v for k, v in run.sums.items() if k != "harm"}) for run in found[1:]]
    deaf = Sums(np.zeros(12), np.full(12, 10.0))
    runs = [found[0], *(run._replace(sums=run.sums | {"obedience": deaf}) for run in poor)]
    alone, three = (
        report.draw_harm_and_obedience({"one": {"retained": own}}, ("retained",)) for own in (runs[:1], runs)
    )
    assert alone == three
    whole = [*found[:1], *(run._replace(sums=run.sums | {"obedience": deaf}) for run in found[1:])]
    assert report.draw_harm_and_obedience({"one": {"retained": whole}}, ("retained",)) != three


def test_intervals_of_cosines_end_at_one(folder):
    runs = [results.RunResult(seed, {}, {"cosine_by_layer": value}) for seed, value in enumerate((0.7, 0.9, 0.99))]
    mean, (low, high) = results.mean_over_seeds(runs, "cosine_by_layer")
    assert mean == pytest.approx(0.8633, abs=1e-4) and low < 0.6 and high == 1.0


def test_a_record_that_is_broken_is_named(folder, tmp_path):
    cell = Cell("one", FINAL, 0)
    (tmp_path / "cells" / cell.name).mkdir(parents=True)
    (tmp_path / "cells" / cell.name / "record.json").write_text('{"facts": {}}')
    with pytest.raises(ValueError, match=r"one-final0/record.json cannot be read .*remove it"):
        report.write_report(worker.Folder(tmp_path, folder.study, folder.costs))


def test_a_study_without_a_finished_run_has_no_report(tmp_path, folder):
    empty = worker.Folder(tmp_path, folder.study, folder.costs)
    with pytest.raises(ValueError, match="no run of the phase 'final' is done"):
        report.write_report(empty)
    assert not list(tmp_path.iterdir())
