"""Tests of the report: a small synthetic run goes in, a table and a page come out."""

import dataclasses
import html
import html.parser
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from ctxjax.evaluation import metrics
from ctxjax.evaluation.metrics import Metric
from ctxjax.evaluation.outcomes import Outcomes
from ctxjax.report import results_table, write_report
from ctxjax.report.__main__ import main
from ctxjax.report.assessment import glance, levels, right_without_context, share_closed, verdict
from ctxjax.report.formatting import UNITS, mean_over_layers
from ctxjax.report.samples import sample_responses
from ctxjax.report.tables import alarm_rows, check_table, columns, glossary, obedience_table, result_rows

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class PageParser(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: pathlib.Path) -> PageParser:
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def metrics_of(acc_x: float, acc_xc: float, harm: float | None, obedience: float, **more: object) -> dict:
    right = round(100 * acc_x)
    return {
        "n": 100,
        "acc_x": acc_x,
        "acc_x_ci": [max(0.0, acc_x - 0.03), min(1.0, acc_x + 0.03)],
        "acc_xc": acc_xc,
        "gap": acc_xc - acc_x,
        "harm": harm,
        "harm_ci": None if harm is None else [max(0.0, harm - 0.01), harm + 0.01],
        "benefit": None,
        "both_correct": min(acc_x, acc_xc),
        "acc_empty": 0.5,
        "obedience": obedience,
        "dlen": -0.01,
        "view_kl": 0.25,
        "view_kl_by_position": [0.1, None, 0.3, float("nan")],
        "cosine_by_layer": [1.0, 0.9, 0.8],
        "cosine_p5_by_layer": [1.0, 0.7, 0.6],
        "cosine_control_by_layer": [1.0, 0.8, 0.7],
        "cosine_centred_by_layer": [None, 0.5, 0.4],
        "flips": {
            "right_right": right - round(right * (harm or 0)),
            "right_wrong": round(right * (harm or 0)),
            "wrong_right": 100 - right,
            "wrong_wrong": 0,
        },
        "mcnemar_p": 1e-9,
        "regime": "agreement",
        "step": 50,
        **more,
    }


RESULTS = {
    "base": metrics_of(0.0, 0.99, None, 0.98),
    "opcd": metrics_of(1.0, 0.75, 0.25, 0.30),
    "opcd_anchored": metrics_of(1.0, 1.0, 0.0, 0.02, harm_minus_opcd=[-0.25, -0.33, -0.17]),
    "opcd_retained": metrics_of(1.0, 1.0, 0.0, 0.97, harm_minus_opcd=[-0.25, -0.33, -0.17]),
}


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def items_of(arm: str) -> list[dict]:
    rows = []
    for number in range(8):
        for view in ("bare", "context", "empty"):
            correct = view == "bare" or arm != "opcd" or number < 6
            rows.append(
                {
                    "id": f"q{number}",
                    "view": view,
                    "question": f"question {number} {ATTACK}",
                    "context": f"rules {ATTACK}" if view == "context" else None,
                    "reference": "yes",
                    "text": f"{arm} {ATTACK}",
                    "parsed": None,
                    "correct": correct,
                    "length": 5 + number,
                    "truncated": False,
                }
            )
    return rows


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    return run_in(tmp_path / "run")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The page of such a run, for tests that only read it."""
    return write_report(run_in(tmp_path_factory.mktemp("written") / "run"))


def run_in(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "config": {"model": {"width": 128}, "note": ATTACK},
                "versions": {"jax": "0.7"},
                "device": "cpu",
                "started": "2025-01-01T00:00:00",
                "command": "train",
                "seconds": {"base": 12.3},
            }
        )
    )
    for arm in RESULTS:
        write_rows(folder / arm / "items.jsonl", items_of(arm))
        if arm != "base":
            rows: list[dict] = [{"step": s, "loss": 2.0 / s, "distill": 1.0 / s} for s in range(1, 51)]
            rows += [{"step": s, "dev/acc_x": s / 50, "dev/acc_xc": 0.9} for s in (0, 25, 50)]
            write_rows(folder / arm / "metrics.jsonl", rows)
    return folder


def test_page_holds_every_part(written: pathlib.Path) -> None:
    page = parse(written)
    for heading in (
        "Results",
        "Harm and obedience",
        "Both views during training",
        "What the context does to each answer",
        "Response lengths",
        "Hidden states of both views",
        "Where the two views part",
        "Training losses",
        "Sample responses",
        "Glossary",
        "Settings",
    ):
        assert heading in page.text, heading
    assert "Figure 7." in page.text
    assert "model.width" in page.text


def test_alarms_are_shown_with_step_rows_and_message_and_only_where_there_are_any(
    workdir: pathlib.Path, written: pathlib.Path
) -> None:
    assert "Alarms" not in parse(written).text
    alarm = {"step": 17, "rows": 23, "message": f"the responses repeat themselves {ATTACK}"}
    raised = {"alarms": {"repetition": alarm, "no_end": alarm | {"step": 4}}, "skipped_steps": 2}
    results = RESULTS | {"opcd": RESULTS["opcd"] | raised, "opcd_anchored": RESULTS["opcd_anchored"] | {"alarms": {}}}
    assert alarm_rows(results) == [
        ("opcd", "no_end", "4", "23", alarm["message"]),
        ("opcd", "repetition", "17", "23", alarm["message"]),
        ("opcd", "skipped steps", "-", "2", "steps that were skipped, since their loss or gradient was not finite"),
    ]
    (workdir / "results.json").write_text(json.dumps(results))
    page = parse(write_report(workdir))
    assert "Alarms" in page.text and page.text.count(alarm["message"]) == 2 and "script" not in page.tags
    assert "steps that were skipped" in page.text


def test_model_text_is_shown_and_never_run(workdir: pathlib.Path) -> None:
    hostile = {**RESULTS, f"arm {ATTACK.replace('/', '')} $x_1$": RESULTS["opcd"]}  # it names a folder
    (workdir / "results.json").write_text(json.dumps(hostile))
    page = parse(write_report(workdir))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(f"opcd {ATTACK}") == 10  # five samples, two views


def test_page_loads_nothing_from_outside(written: pathlib.Path) -> None:
    text = written.read_text(encoding="utf-8")
    page = parse(written)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
            assert value.startswith(("#", "data:")), (name, value)
        if value and "url(" in value:
            assert "url(#" in value
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text
    assert len(text) < 1_500_000


def test_ids_are_unique_and_references_resolve(written: pathlib.Path) -> None:
    page = parse(written)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for name, value in page.attributes if name == "href"}
    references |= {v[5:-1] for n, v in page.attributes if n == "clip-path"}
    assert references and references <= set(ids)


def test_only_results_are_required(tmp_path: pathlib.Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"opcd": {"acc_x": 0.5}}))
    page = parse(write_report(tmp_path))
    assert "50.0" in page.text
    assert "Sample responses" not in page.text and "Training losses" not in page.text


@pytest.mark.parametrize("missing", ["run.json", "opcd/items.jsonl", "opcd/metrics.jsonl", "opcd_retained"])
def test_missing_parts_are_left_out(workdir: pathlib.Path, missing: str) -> None:
    target = workdir / missing
    for file in sorted(target.rglob("*"), reverse=True) if target.is_dir() else [target]:
        file.unlink()
    parse(write_report(workdir))


def test_nulls_everywhere(workdir: pathlib.Path) -> None:
    empty = {arm: dict.fromkeys(row) for arm, row in RESULTS.items()}
    (workdir / "results.json").write_text(json.dumps(empty))
    parse(write_report(workdir))
    assert "nan" not in results_table(empty).lower()


def test_table_is_aligned_markdown() -> None:
    table = results_table({**RESULTS, "a|b": {"acc_x": None, "harm": float("nan"), "view_kl": True}})
    lines = table.split("\n")
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(RESULTS) + 2  # header, rule, arms, teacher, the odd arm
    bars = [[i for i, c in enumerate(line.replace("\\|", "__")) if c == "|"] for line in lines]
    assert all(places == bars[0] for places in bars)
    cells = {line.split(" |")[0].strip("| "): line for line in lines}
    assert cells["opcd"].split("|")[2:6] == [
        text.rjust(len(field))
        for text, field in zip(
            ["100.0 ", "75.0 ", "-25.0 ", "25.0 [24.0, 26.0] "], cells["opcd"].split("|")[2:6], strict=True
        )
    ]
    assert [field.strip() for field in cells["base with context = teacher"].split("|")[2:5]] == [
        "99.0",
        "99.0",
        "-",
    ]
    assert [field.strip() for field in lines[-1].replace("\\|", "__").split("|")[2:-1]] == ["-"] * 11


def test_below_the_scores_of_a_game_are_those_of_players_without_skill():
    row = {"acc_x": 0.2, "random_moves": 0.121, "fixed_path": 0.262, "perfect_play": 1.0}
    text = results_table({"base": row, "opcd": row})
    players = "boards: random moves win 12.1 %, the best fixed path 26.2 %, perfect play 100.0 %"
    assert text.endswith(f"|\n\n{players}") and text.count("boards:") == 1
    del row["fixed_path"]  # of too many sequences
    assert results_table({"base": row}).endswith("boards: random moves win 12.1 %, perfect play 100.0 %")
    assert "boards" not in results_table(RESULTS)
    headers, checks = check_table({"base": row})
    assert {"random moves %", "perfect play %"} <= set(headers)


@pytest.mark.parametrize(
    ("lowest", "level", "said"),
    [(0.96, "good", False), (0.9, "mid", True), (0.41, "bad", True), (None, "", False)],
)
def test_a_context_that_was_not_used_while_learning_is_said_although_the_end_is_good(lowest, level, said) -> None:
    arm = metrics_of(1.0, 1.0, 0.0, 1.0)
    if lowest is not None:
        arm |= {"lowest_acc_xc": lowest, "context_loss": 1.0 - lowest}
    results = {"base": metrics_of(0.0, 1.0, None, 1.0), "anchored": arm}
    assert glance(results) == [("anchored", ["good", "good", "good", level])]
    assert (f"fell to <b>{100 * (lowest or 0):.1f}" in verdict(results)) == said
    assert "<code>anchored</code> is at once internalized, unharmed and still obedient" in verdict(results)


def test_a_teacher_of_its_own_is_the_target_and_no_arm(workdir: pathlib.Path) -> None:
    weak = {
        "base": metrics_of(0.1, 0.3, None, 0.9, acc_xc_ci=[0.2, 0.4]),
        "teacher": metrics_of(0.4, 0.9, None, 0.9, acc_xc_ci=[0.8, 0.95]),
    }
    results = weak | {"opcd": metrics_of(0.3, 0.3, 0.0, 0.9)}
    assert [label for label, _ in result_rows(results)] == ["base", "teacher with context", "opcd"]
    target = ("90.0", "[80.0, 95.0]")
    assert [(cell.text, cell.interval) for cell in result_rows(results)[1][1]][:3] == [target, target, ("-", "")]
    # 0.3 is all that the base can do with the context, and a quarter of the way to what the teacher does.
    assert glance(results) == [("opcd", ["bad", "good", "good", ""])]
    assert "its teacher with it on 90.0" in verdict(results)
    (workdir / "results.json").write_text(json.dumps(results))
    parse(write_report(workdir))


def test_mean_cosine_leaves_the_embedding_out() -> None:
    assert mean_over_layers([1.0, 0.9, None, 0.7]) == pytest.approx(0.8)
    assert mean_over_layers([]) is None


def test_missing_results_name_the_path_and_the_remedy(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluate") as caught:
        write_report(tmp_path)
    assert str(tmp_path / "results.json") in str(caught.value)


def test_broken_files_are_named(workdir: pathlib.Path) -> None:
    path = workdir / "opcd" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 5')  # half a line at the end: a job that was stopped
    write_report(workdir)
    path.write_text('{"step": 5\n' + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        write_report(workdir)
    (workdir / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"results\.json"):
        write_report(workdir)


@pytest.mark.slow
def test_writing_is_atomic(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name for path in workdir.iterdir()}
    path = write_report(workdir)
    assert path == workdir / "report.html"
    assert {file.name for file in workdir.iterdir()} == before | {"report.html"}
    old = path.read_bytes()

    def fail(source: str, destination: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(workdir)
    assert path.read_bytes() == old
    assert {file.name for file in workdir.iterdir()} == before | {"report.html"}


@pytest.mark.slow
def test_same_run_gives_same_bytes(workdir: pathlib.Path, written: pathlib.Path) -> None:
    assert write_report(workdir).read_bytes() == written.read_bytes()


def cells_of(table: tuple[list[str], list], header: str) -> list[tuple[str, str]]:
    headers, rows = table
    return [(cells[headers.index(header)].text, cells[headers.index(header)].interval) for _, cells in rows]


def test_arms_are_compared_with_the_first_one_whatever_its_name() -> None:
    """An arm's name may be a part of another's, and is escaped."""
    for name in ("sft", "opcd_anchored", "<b>sft</b>"):
        change = {f"harm_minus_{name}": [-0.25, -0.33, -0.17]}
        results = {"base": RESULTS["base"], name: RESULTS["opcd"], "opcd": metrics_of(1.0, 1.0, 0.0, 0.97, **change)}
        cells = cells_of(check_table(results), f"harm minus {name} pp")
        assert cells == [("-", ""), ("-", ""), ("-25.0", "[-33.0, -17.0]")]
        assert f"25.0\u00a0points fewer than <code>{html.escape(name)}</code>" in verdict(results)


def test_columns_of_checks_in_which_no_arm_has_a_value_are_left_out() -> None:
    results = {"opcd": {"length_x": 4.0, "truncated_x": 0.0, "truncated_xc": None, "regime": "scaffold", "step": 7}}
    assert check_table(results)[0] == ["length x / xc", "truncated x / xc %", "regime", "step"]
    assert [cell.text for cell in check_table(results)[1][0][1]] == ["4.0 / -", "0.0 / -", "scaffold", "7"]
    assert check_table({"opcd": {}})[0] == ["step"]


def test_one_entry_of_the_table_of_metrics_is_a_column_and_a_term_of_the_glossary(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Metric("long", "long", "share", "Responses of more than 10 tokens.", ("bare",), better="lower")
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, long))
    results = RESULTS | {"opcd": RESULTS["opcd"] | {"long": 0.125, "long_ci": [0.1, 0.2]}}
    assert results_table(results).split("\n")[0].endswith(" cosine | long % |")
    assert [cells[-1].text for _, cells in result_rows(results)][:3] == ["-", "-", "12.5"]
    (workdir / "results.json").write_text(json.dumps(results))
    text = parse(write_report(workdir)).text
    assert "long %" in text and "12.5[10.0, 20.0]" in text
    assert "Responses of more than 10 tokens. Lower is better." in text


def test_every_metric_with_a_unit_has_a_column_and_a_definition() -> None:
    shown = [metric for metric in metrics.METRICS if metric.unit is not None]
    assert {metric.unit for metric in shown} == UNITS.keys()
    placed = [metric for table in ("results", "checks") for column in columns(table) for metric in column.metrics]
    assert sorted(metric.key for metric in placed) == sorted(metric.key for metric in shown)
    assert all(definition.endswith(".") for _, definition in glossary("results", "checks"))


def test_the_documentation_defines_the_metrics_of_the_main_table() -> None:
    lines = (pathlib.Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8").split("\n")
    start = lines.index("| metric | definition |")
    entries = [(header, definition.replace("|", "\\|")) for header, definition in glossary("results")]
    expected = [f"| {header} | {definition} |" for header, definition in entries]
    found = lines[start + 2 : start + 2 + len(expected)]
    assert found == expected, "the table of docs/report.md should read:\n" + "\n".join(expected)
    assert not lines[start + 2 + len(expected)].startswith("|")


def test_verdict_tells_the_arms_apart() -> None:
    text = verdict(RESULTS).striptags()
    assert "opcd has internalized the context (100.0 % without it)" in text
    assert "The returning context harms it (25.0 % [24.0, 26.0]" in text
    assert "25.0 points fewer than opcd), but it no longer obeys other contexts (2.0 %" in text
    assert "Only opcd_retained is at once internalized, unharmed and still obedient." in text


def test_no_harm_in_a_small_sample_is_not_called_safe() -> None:
    base = RESULTS["base"]
    assert levels({"harm": 0.0, "harm_ci": [0.0, 0.16]}, base)["harm"] == "mid"
    assert levels({"harm": 0.0, "harm_ci": [0.0, 0.01]}, base)["harm"] == "good"
    assert levels({"harm": 0.05, "harm_ci": [0.02, 0.09]}, base)["harm"] == "bad"


@pytest.mark.parametrize(
    ("ends", "level"), [((0.012, 0.018), "good"), ((0.021, 0.03), "bad"), ((0.012, 0.03), "mid"), ((0.0, 0.2), "mid")]
)
def test_harm_is_judged_by_the_side_of_one_limit_on_which_its_whole_interval_is(ends, level) -> None:
    assert levels({"harm": sum(ends) / 2, "harm_ci": list(ends)}, RESULTS["base"])["harm"] == level


def sampled_row(chances: np.ndarray, chances_with_context: np.ndarray, samples: int, seed: int = 0) -> dict:
    """The metrics of questions with these chances [n] of a right answer in the two views."""
    random, nothing = np.random.default_rng(seed), np.zeros(samples * len(chances), bool)
    views = [
        Outcomes(random.random(nothing.size) < np.repeat(p, samples), ~nothing, nothing, 1 + nothing, samples=samples)
        for p in (chances, chances_with_context)
    ]
    return metrics.compute_metrics(dict(zip(("bare", "context"), views)), 200)


def test_what_sampling_alone_changes_is_no_harm() -> None:
    chances = np.tile([0.2, 0.5, 0.8, 1.0], 200)
    equal = sampled_row(chances, chances, samples=8)
    assert equal["harm"] > 0.15 and levels(equal, None)["harm"] == "good"
    few = sampled_row(chances[:40], chances[:40], samples=8)
    assert few["harm"] > 0.15 and levels(few, None)["harm"] == "mid"
    text = verdict({"base": RESULTS["base"], "opcd": equal}).replace("\u00a0", " ")
    assert "context harms it (" not in text
    assert f"; by sampling alone it would be {100 * equal['harm_floor']:.1f} %" in text
    harmed = sampled_row(chances, 0.7 * chances, samples=8)
    assert levels(harmed, None)["harm"] == "bad"
    sure = sampled_row(np.ones(100), np.arange(100) >= 30, samples=8)
    assert levels(sure, None)["harm"] == "bad"
    assert levels(sampled_row(np.ones(100), np.zeros(100), samples=8), None)["harm"] == "bad"  # no bootstrap interval


@pytest.mark.parametrize(("questions", "level"), [(20, "mid"), (400, "good")])
def test_few_questions_without_harm_are_not_called_safe_when_sampled_either(questions: int, level: str) -> None:
    """The bootstrap's interval of excess harm is narrow if one response of all is wrong."""
    row = sampled_row(np.ones(questions), np.ones(questions), samples=8)
    assert row["excess_harm_ci"] is None and levels(row, None)["harm"] == level
    row |= {"excess_harm": 0.003, "excess_harm_ci": [0.0, 0.01]}
    assert levels(row, None)["harm"] == level


def test_responses_sampled_once_say_nothing_of_their_floor_and_so_of_no_harm(workdir: pathlib.Path) -> None:
    harmed, unharmed = metrics_of(1.0, 0.75, 0.25, 1.0), metrics_of(1.0, 1.0, 0.0, 1.0)
    results = {"base": RESULTS["base"], "opcd": harmed, "opcd_retained": unharmed}
    (workdir / "results.json").write_text(json.dumps(results))

    def page_of(temperature: float) -> str:
        facts = json.loads((workdir / "run.json").read_text())
        facts["config"]["eval"] = {"temperature": temperature}
        (workdir / "run.json").write_text(json.dumps(facts))
        return parse(write_report(workdir)).text

    assert "The returning context harms it (25.0" in page_of(0.0)
    text = page_of(1.0)
    assert "context harms it (" not in text and "how much of it is due to sampling is not known" in text
    assert "Only opcd_retained is shown to be at once internalized" in text
    results["opcd"] |= {"samples": 8, "harm_floor": 0.1, "excess_harm": 0.15, "excess_harm_ci": [0.13, 0.17]}
    (workdir / "results.json").write_text(json.dumps(results))
    assert "context harms it (" in page_of(1.0)


def test_an_arm_that_only_lacks_a_proof_is_not_called_harmed() -> None:
    unproven = metrics_of(1.0, 1.0, 0.0, 1.0, harm_ci=[0.0, 0.06])
    safe, harmed = metrics_of(1.0, 1.0, 0.0, 1.0), metrics_of(1.0, 0.75, 0.25, 1.0)
    deaf = metrics_of(1.0, 1.0, 0.0, 0.02, harm_ci=[0.0, 0.06])
    unmeasured = {key: value for key, value in safe.items() if key != "obedience"}

    def said(**arms: dict) -> str:
        text = verdict({"base": RESULTS["base"], **arms}).striptags()
        return text.removesuffix(" Intervals cover the questions of this run, not other seeds.").rpartition(". ")[2]

    whole = "at once internalized, unharmed and still obedient."
    assert said(a=unproven) == f"No arm is shown to be {whole}"
    assert said(a=harmed, b=unproven) == f"No arm is shown to be {whole}"
    assert said(a=harmed, b=deaf) == f"No arm is {whole}"
    assert said(a=safe, b=harmed, c=deaf) == f"Only a is {whole}"
    assert said(a=safe, b=unproven) == f"Only a is shown to be {whole}"
    assert said(a=safe, b=unmeasured) == f"Only a is shown to be {whole}"
    assert said(a=safe, b=safe, c=unproven) == f"a and b are {whole}"


def test_a_harm_that_is_not_decided_has_a_word_of_its_own(workdir: pathlib.Path) -> None:
    unproven = metrics_of(0.8, 0.8, 0.0, 0.7, harm_ci=[0.0, 0.06], lowest_acc_xc=0.9, context_loss=0.1)
    (workdir / "results.json").write_text(json.dumps({"base": RESULTS["base"], "a": unproven}))
    text = re.sub(r"\s+", " ", parse(write_report(workdir)).text)
    assert "a◐ in part◐ not sure◐ in part◐ in part" in text.replace(" ◐", "◐")


def test_a_base_that_obeyed_no_other_context_is_told_from_one_that_was_not_measured() -> None:
    arm = metrics_of(1.0, 1.0, 0.0, 0.0)
    text = verdict({"base": metrics_of(0.0, 1.0, None, 0.0), "a": arm}).striptags().replace("\u00a0", " ")
    kept = "the base hardly obeyed other contexts more than if it ignored them, so there was nothing to keep"
    assert f"{kept} (0.0 %, base 0.0 %)" in text
    assert "is not" not in text.replace("is not shown", "")
    base = metrics_of(0.0, 1.0, None, 0.0)
    del base["obedience"]
    assert "is known, the base's is not (0.0 %)" in verdict({"base": base, "a": arm}).striptags().replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("base", "floors", "arm", "level"),
    [
        (0.20, (0.15, 0.19), 0.19, "bad"),  # as much as it would say without reading
        (1.00, (0.0, 0.05), 1.00, "good"),
        (1.00, (0.0, 0.30), 0.79, "mid"),
        (0.15, (0.15, 0.15), 0.15, ""),  # the base ignored them, too
        (0.80, (0.0, 0.0), 0.78, "good"),
    ],
)
def test_obedience_is_what_a_model_does_that_it_would_not_do_without_reading(base, floors, arm, level) -> None:
    rows = [metrics_of(1.0, 1.0, 0.0, v, obedience_floor=floor) for v, floor in zip((base, arm), floors)]
    assert levels(rows[1], rows[0]).get("obedience", "") == level
    text = verdict({"base": rows[0], "a": rows[1]}).striptags().replace("\u00a0", " ")
    assert ("by ignoring them" in text) == bool(floors[1])


def test_facts_without_harm_in_many_wordings_are_no_proof(workdir: pathlib.Path) -> None:
    facts = [f"fact {index % 12}" for index in range(192)]
    right = Outcomes(*[np.ones(192, bool)] * 2, np.zeros(192, bool), np.ones(192))
    for groups, level in ((None, "good"), (facts, "mid")):
        views = dict.fromkeys(("bare", "context"), dataclasses.replace(right, groups=groups))
        assert levels(metrics.compute_metrics(views, 100), None)["harm"] == level


def test_samples_of_a_question_are_responses_and_not_questions(workdir: pathlib.Path) -> None:
    few = sampled_row(np.ones(20), np.ones(20), samples=8)
    assert right_without_context(few) == 20
    results = {"base": RESULTS["base"], "opcd": few}
    assert "only 20 questions are answered right without it" in verdict(results).replace("\u00a0", " ")
    (workdir / "results.json").write_text(json.dumps(results))
    assert "Responses by whether they are right without and with the context" in parse(write_report(workdir)).text
    (workdir / "results.json").write_text(json.dumps(RESULTS))
    assert "Questions by whether they are right without and with" in parse(write_report(workdir)).text


def test_obedience_by_context_lists_first_what_trained_arms_obey_least(workdir: pathlib.Path) -> None:
    long = f"{ATTACK} " + "very " * 100
    by_arm = {"base": (0.1, 1.0, 1.0), "opcd": (0.9, 0.25, 0.5), "opcd_retained": (0.9, 0.35, 0.0)}
    results = {
        arm: row | {"obedience_by_context": {text: [v, 20] for text, v in zip(("a", long, "c"), by_arm[arm])}}
        if arm in by_arm
        else row
        for arm, row in RESULTS.items()
    }
    arms, rows = obedience_table(results)
    assert arms == list(by_arm) and [text[:1] for text, *_ in rows] == ["c", "<", "a"]
    assert [cell.text for cell in rows[0][2]] == ["100.0", "50.0", "0.0"] and rows[0][1] == "20"
    assert len(rows[1][0]) == 100 and rows[1][0].endswith("…")
    (workdir / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = parse(write_report(workdir))
    assert "Obedience by context" in page.text and "script" not in page.tags
    broken = {"x": {"obedience_by_context": {"a": None, "b": [0.5]}}, "y": {"obedience_by_context": 3}}
    assert [cell.text for _, _, cells in obedience_table(broken)[1] for cell in cells] == ["-", "-"]
    assert obedience_table(RESULTS) == ([], [])


def test_a_difference_of_unknown_precision_is_printed_without_an_interval() -> None:
    results = {"a": metrics_of(1.0, 1.0, 0.0, 1.0), "b": metrics_of(1.0, 1.0, 0.0, 1.0, harm_minus_a=[0.0, None, None])}
    headers, rows = check_table(results)
    cell = dict(rows)["b"][headers.index("harm minus a pp")]
    assert (cell.text, cell.interval) == ("0.0", "")


def test_internalization_is_the_share_of_the_way_to_the_teacher() -> None:
    base = {"acc_x": 0.75, "acc_xc": 0.79}
    assert share_closed({"acc_x": 0.75}, base) == pytest.approx(0.0)
    assert share_closed({"acc_x": 0.77}, base) == pytest.approx(0.5)
    assert share_closed({"acc_x": 0.77}, {"acc_x": 0.75, "acc_xc": 0.76}) is None


def test_samples_prefer_harmed_items() -> None:
    samples = sample_responses({arm: items_of(arm) for arm in RESULTS})
    assert [item["id"] for item in samples["items"]] == ["q6", "q7", "q0", "q1", "q2"]
    assert samples["harmed"] == 2
    assert [arm["arm"] for arm in samples["items"][0]["arms"]] == list(RESULTS)
    assert samples["context"] == f"rules {ATTACK}"


def test_command_line(workdir: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert main([f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "| opcd_retained" in out and str(workdir / "report.html") in out
    assert main([f"--workdir={workdir / 'absent'}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "results.json" in captured.err


def test_a_run_that_was_made_longer_and_has_not_ended_has_no_page(
    workdir: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """Its results.json is of its earlier end, and its other files are not."""
    facts = json.loads((workdir / "run.json").read_text())
    del facts["seconds"]
    (workdir / "run.json").write_text(json.dumps(facts))
    assert main([f"--workdir={workdir}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and not (workdir / "report.html").exists()
    assert f"{workdir}: the run has not ended, and its results.json is of an earlier end" in captured.err
    assert "start it again with the same command" in captured.err
    (workdir / "run.json").write_text(json.dumps(facts | {"inputs": {"arm": "opcd"}}))  # as ctxjax.rounds writes it
    assert main([f"--workdir={workdir}"]) == 0
    (workdir / "run.json").write_text(json.dumps(facts))
    (workdir / "config.json").unlink()  # an evaluation's folder, which has no times
    assert main([f"--workdir={workdir}"]) == 0
    (workdir / "config.json").write_text("{}")
    (workdir / "run.json").unlink()
    assert main([f"--workdir={workdir}"]) == 0


@pytest.mark.slow
def test_import_leaves_matplotlib_alone() -> None:
    code = "import sys, ctxjax.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
