"""The audit: a finished run passes, a copy in which one thing was changed does not, and the audit names it."""

import dataclasses
import json
from pathlib import Path
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ctxjax.audit import audit, evaluations, numbers
from ctxjax.audit.__main__ import main
from ctxjax.audit.check import Check, list_numbers
from ctxjax.audit.folder import Folder
from ctxjax.audit.weights import Weights, compute_checksum
from ctxjax.evaluation import evaluator, metrics
from ctxjax.evaluation.outcomes import Outcomes, harm_difference
from ctxjax.host.checksum import compute_checksums, compute_digest
from ctxjax.report import model_card

ARM, FIRST = "off_policy", "opcd_retained"


def find_wrong(run: Path, *exports: Path) -> list[str]:
    """The contradictions that the audit finds."""
    return [f"{check.name}: {problem}" for check in audit.check_folder(run, exports) for problem in check.wrong]


@pytest.fixture
def copied(debug_run, tmp_path) -> Path:
    """A copy of the run, in ``run``, and of the exported model, in ``model`` of the same folder."""
    shutil.copytree(debug_run[1], tmp_path / "model")
    return shutil.copytree(debug_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("events", "report.html"))


def edit(path: Path, change) -> None:
    """Change a JSON file: ``change`` gets its value."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_line(path: Path, change, where=lambda row: True) -> None:
    """Change the first line of a JSONL file of which ``where`` holds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(next(row for row in rows if where(row)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_finished_run_and_its_export_pass(debug_run, capsys):
    assert main([str(debug_run[0]), str(debug_run[1])]) == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed and "not checked" not in printed
    for words in (
        "OK    splits: 64 train, 8 dev, 8 test rows, no question in two splits",
        "OK    training rows of opcd_retained: steps 1-3: rows of train only, in the order of (seed, step); 8 ret",
        "the tokens are those of these rows",
        "OK    decoding of base: all views at temperature 1, as configured",
        "OK    grades of off_policy, selected: 40 responses graded again",
        "opcd_retained: the checkpoint of step 3",
        "OK    export model: ",
        "no contradiction found",
    ):
        assert words in printed


def move_a_row(run: Path) -> None:
    edit_line(run / "data.jsonl", lambda row: row.update(split="train"), lambda row: row["split"] == "test")
    edit(run / "run.json", lambda facts: facts["record"].update({"data.jsonl": digest_of(run / "data.jsonl")}))


def digest_of(path: Path) -> str:
    return compute_digest(path.read_text())


def repeat_a_question(run: Path) -> None:
    test = next(row for row in map(json.loads, (run / "data.jsonl").read_text().splitlines()) if row["split"] == "test")
    edit_line(run / "data.jsonl", lambda row: row.update(question=test["question"]))


def train_on_a_test_row(run: Path) -> None:
    edit_line(run / ARM / "rows.jsonl", lambda row: row["bare"].__setitem__(2, 75), lambda row: row["step"] == 2)


def train_on_a_row_that_is_left_out(run: Path) -> None:
    trained = json.loads((run / ARM / "rows.jsonl").read_text().splitlines()[0])["bare"][0]
    (run / "data.jsonl").write_text(
        "".join(
            json.dumps(json.loads(line) | ({"left_out": True} if number == trained else {})) + "\n"
            for number, line in enumerate((run / "data.jsonl").read_text().splitlines())
        )
    )


def hold_out_what_is_internalized(run: Path) -> None:
    own = json.loads((run / "data.jsonl").read_text().splitlines()[0])["context"]
    edit_line(
        run / "data.jsonl", lambda one: one.update(context=own), lambda one: one.get("other_context_of") == "test"
    )


def train_on_other_rows(run: Path) -> None:
    edit_line(run / ARM / "rows.jsonl", lambda row: (row["bare"].reverse(), row["context"].reverse()))


def train_under_a_held_out_context(run: Path) -> None:
    edit_line(run / FIRST / "rows.jsonl", lambda row: row["other"][1].__setitem__(1, 600))


def draw_another_pair(run: Path) -> None:
    edit_line(run / FIRST / "rows.jsonl", lambda row: row["other"].reverse())


def read_other_tokens(run: Path) -> None:
    edit_line(run / FIRST / "rows.jsonl", lambda row: row.update(tokens="0" * 16))


def change_a_grade(run: Path) -> None:
    edit_line(run / ARM / "items.jsonl", lambda item: item.update(correct=not item["correct"]))


def change_a_lenient_grade(run: Path) -> None:
    edit_line(run / ARM / "items.jsonl", lambda item: item.update(lenient=True))


def evaluate_under_a_context_of_dev(run: Path) -> None:
    on_dev = [json.loads(line) for line in (run / "base" / "dev" / "items.jsonl").read_text().splitlines()]
    context = next(item["context"] for item in on_dev if item["view"] == "other")
    edit_line(
        run / ARM / "items.jsonl", lambda item: item.update(context=context), lambda item: item["view"] == "other"
    )


def change_a_response(run: Path) -> None:
    edit_line(run / ARM / "items.jsonl", lambda item: item.update(text=item["reference"]))


def swap_views(run: Path) -> None:
    path = run / ARM / "items.jsonl"
    names = {"bare": "context", "context": "bare"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"view": names.get(row["view"], row["view"])} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def swap_prompts(run: Path) -> None:
    def swap(item):
        item["prompt"] = "f" * 16

    edit_line(run / ARM / "items.jsonl", swap, lambda item: item["view"] == "empty")


def decode_otherwise(run: Path) -> None:
    edit(run / ARM / "evaluation.json", lambda stored: stored["decoding"]["context"].update(temperature=0.0))


def hide_a_decoding(run: Path) -> None:
    edit(run / ARM / "evaluation.json", lambda stored: stored["decoding"].pop("context"))


def evaluate_another_step(run: Path) -> None:
    weights = json.loads((run / ARM / "selected" / "evaluation.json").read_text())["weights"]
    edit(run / ARM / "evaluation.json", lambda stored: stored.update(weights=weights))


def change_a_number(run: Path) -> None:
    edit(run / "results.json", lambda results: results[ARM].update(dlen=results[ARM]["dlen"] + 1e-6))


def change_a_number_that_needs_the_model(run: Path) -> None:
    edit(run / "results.json", lambda results: results[ARM]["cosine_by_layer"].reverse())


def change_the_view_kl(run: Path) -> None:
    for path, own in ((run / ARM / "evaluation.json", "metrics"), (run / "results.json", ARM)):
        edit(path, lambda found, own=own: found[own].update(view_kl=1.002 * found[own]["view_kl"]))


def change_an_interval(run: Path) -> None:
    edit(run / "results.json", lambda results: results["base"]["acc_xc_ci"].__setitem__(1, 0.2))


def swap_the_curves(run: Path) -> None:
    edit(run / "results.json", lambda results: results[ARM]["view_kl_by_position"].reverse())


def select_another_step(run: Path) -> None:
    edit(run / "results.json", lambda results: results[ARM].pop("selected"))


def use_another_checkpoint(run: Path) -> None:
    place = run / ARM / "checkpoints"
    shutil.rmtree(place / "3" / "state")
    shutil.copytree(place / "2" / "state", place / "3" / "state")


def lose_a_checksum(run: Path) -> None:
    edit(run / ARM / "checkpoints" / "3" / "run" / "metadata", lambda record: record["checksums"].popitem())


def add_weights_to_an_export(run: Path) -> None:
    shutil.copyfile(run.parent / "model" / "model.safetensors", run.parent / "model" / "more.safetensors")


def damage_a_checkpoint(run: Path) -> None:
    path = max((run / ARM / "checkpoints" / "3" / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_an_export(run: Path) -> None:
    path = run.parent / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def change_a_card(run: Path) -> None:
    path = run.parent / "model" / "README.md"
    path.write_text(path.read_text().replace("| off_policy", "| 0ff_policy"))


def export_another_step(run: Path) -> None:
    edit(run.parent / "model" / "export.json", lambda manifest: manifest.update(step=2))


def lose_items(run: Path) -> None:
    (run / ARM / "items.jsonl").unlink()


def lose_results(run: Path) -> None:
    (run / "results.json").unlink()


def lose_rows(run: Path) -> None:
    (run / ARM / "rows.jsonl").unlink()


def lose_a_checkpoint(run: Path) -> None:
    shutil.rmtree(run / ARM / "checkpoints" / "3")


def repeat_a_step(run: Path) -> None:
    path = run / ARM / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


def lose_a_step(run: Path) -> None:
    path = run / ARM / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step": 1,' not in line))


def change_the_base_on_dev(run: Path) -> None:
    edit_line(run / ARM / "metrics.jsonl", lambda row: row.update({"dev/dlen": 9.0}))


def ask_the_teacher_another_question(run: Path) -> None:
    edit_line(run / "teacher_samples.jsonl", lambda row: row.update(id="#1:ceb"), lambda row: row["step"] == 2)


def rewrite(path: Path, change) -> None:
    """Change a JSONL file: ``change`` takes and returns its rows."""
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def feed_other_steps(run: Path) -> None:
    rewrite(run / ARM / "rows.jsonl", lambda rows: [rows[0], rows[2], rows[2], rows[2] | {"step": 9}])
    rewrite(run / FIRST / "rows.jsonl", lambda rows: [rows[1], rows[0] | {"other": rows[0]["other"][:7]}, rows[2]])
    edit_line(run / FIRST / "rows.jsonl", lambda row: row["context"].__setitem__(3, 76), lambda row: row["step"] == 3)
    edit_line(run / FIRST / "rows.jsonl", lambda row: row["other"][4].__setitem__(0, 75), lambda row: row["step"] == 3)


def write_other_steps(run: Path) -> None:
    rewrite(run / ARM / "metrics.jsonl", lambda rows: [*rows[1:], rows[0]])
    rewrite(run / FIRST / "metrics.jsonl", lambda rows: [*rows, rows[-1] | {"step": 4}])


def change_the_teachers_samples(run: Path) -> None:
    def change(rows):
        rows[1]["id"], rows[2]["question"] = "#9", "#3:fed"
        return rows[:-1]

    rewrite(run / "teacher_samples.jsonl", change)


def lose_the_teachers_samples(run: Path) -> None:
    (run / "teacher_samples.jsonl").unlink()


def change_the_settings(run: Path, change) -> None:
    """Change the configuration in both of its files: ``change`` gets it."""
    edit(run / "config.json", change)
    edit(run / "run.json", lambda facts: change(facts["config"]))


def lose_samples_of_a_step(run: Path) -> None:
    def change(rows):
        return [row | {"step": 9 if row["step"] == 1 else row["step"]} for row in rows if row["step"] != 3]

    rewrite(run / "teacher_samples.jsonl", change)


def lose_the_teachers_samples_of_the_first_steps(run: Path) -> None:
    change_the_settings(run, lambda config: config["arms"].update({ARM: {"off_policy_steps": 2}}))
    (run / "teacher_samples.jsonl").unlink()


def leave_questions_out(run: Path) -> None:
    """As an evaluation of an easy part of the split would look."""
    for folder in (ARM, "base"):
        rewrite(run / folder / "items.jsonl", lambda rows: [row for row in rows if row["id"] != rows[0]["id"]])


def leave_questions_out_that_may_be_dropped(run: Path) -> None:
    change_the_settings(run, lambda config: config["prompt"].update(overlong="drop"))
    leave_questions_out(run)
    rewrite(run / ARM / "items.jsonl", lambda rows: [row for row in rows if row["id"] != rows[0]["id"]])


def hide_what_was_lost_while_learning(run: Path) -> None:
    edit(run / "results.json", lambda results: [results[ARM].pop(key) for key in ("lowest_acc_xc", "context_loss")])


def change_what_was_asked(run: Path) -> None:
    def change(rows):
        rows[8]["question"] = "#1:fed"  # in the view context
        rows[9]["reference"] = "s1 abc"
        rows[16]["context"], rows[32]["context"] = "a>a;", ""  # empty, paraphrase
        return rows[:15] + rows[16:]

    rewrite(run / ARM / "items.jsonl", change)
    rewrite(run / FIRST / "items.jsonl", lambda rows: [*rows, *(row for row in rows if row["view"] == "bare")])
    rewrite(run / ARM / "selected" / "items.jsonl", lambda rows: [rows[0] | {"id": "#9"}, *rows[1:]])
    rewrite(run / "base" / "items.jsonl", lambda rows: rows[8:])


def change_what_was_evaluated(run: Path) -> None:
    edit(run / ARM / "evaluation.json", lambda stored: stored.update(decoding={}))
    edit(run / FIRST / "evaluation.json", lambda stored: stored["of"].update(step=2))
    edit(run / "base" / "evaluation.json", lambda stored: stored["weights"].update(embedding=7))


def change_the_results(run: Path) -> None:
    def change(results):
        results[ARM].update(step=2, skipped_steps=4, lowest_acc_xc=0.5, context_loss=0.25)
        results[ARM].update({"alarms": {}, f"harm_minus_{FIRST}": [0.1, 0.0, 0.2]})
        results["another"] = results[ARM]

    edit(run / "results.json", change)


def change_the_records_of_checkpoints(run: Path) -> None:
    record = run / ARM / "checkpoints" / "3" / "run" / "metadata"
    edit(record, lambda found: (found.update(data_position=9), found["manifest"]["inputs"].update(prompts="0")))
    shutil.rmtree(run / FIRST / "checkpoints" / "3" / "state")


def lose_lines_and_files_of_an_export(run: Path) -> None:
    model = run.parent / "model"
    lines = (model / "README.md").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith("|"))
    (model / "README.md").write_text("".join(lines[:last] + lines[last + 1 :]))
    (model / "chat_template.jinja").unlink()


def change_the_configuration(run: Path) -> None:
    edit(run / "config.json", lambda config: config.update(seed=1))


def cut_a_file(run: Path) -> None:
    path = run / ARM / "items.jsonl"
    path.write_text(path.read_text()[:500])


TAMPERED = {
    move_a_row: [
        "splits: data.jsonl, row 72 is .*'train'",
        "items of base: base/items.jsonl, line 1, row '#1:dab' .* this is no test row",
    ],
    repeat_a_question: ["splits: data.jsonl: the question .* is in two places", "splits: data.jsonl: digest"],
    train_on_a_test_row: [
        "training rows of off_policy: off_policy/rows.jsonl, line 2, step 2: the bare prompts are of row .* of test, n"
    ],
    train_on_a_row_that_is_left_out: [
        "off_policy/rows.jsonl, line 1, step 1: the bare prompts are of row .* of train, n"
    ],
    hold_out_what_is_internalized: [
        "splits: data.jsonl: the context .*, the pool of test and the contexts to internal"
    ],
    train_on_other_rows: ["off_policy/rows.jsonl, line 1, step 1: rows in the view bare is .*, expected"],
    train_under_a_held_out_context: [
        "opcd_retained/rows.jsonl, line 1, step 1, retention row 1 has the context 600: one of dev, which is held out"
    ],
    draw_another_pair: ["opcd_retained/rows.jsonl, line 1, step 1, retention row 0 is .* does not draw"],
    read_other_tokens: ["opcd_retained/rows.jsonl, line 1, step 1: digest of the tokens is '0+', expected"],
    change_a_grade: [
        "grades of off_policy: off_policy/items.jsonl, line 1, row .* in the view bare: grade is .*True",
        "results.json, off_policy: acc_x is 0.0, expected 0.125",
    ],
    change_a_lenient_grade: ["grades of off_policy: off_policy/items.jsonl, line 1, .*: grade is .*'lenient': True"],
    evaluate_under_a_context_of_dev: ["off_policy/items.jsonl, line .* is none of those held out for test"],
    change_a_response: ["off_policy/items.jsonl, line 1, row .*: grade", "off_policy/items.jsonl: digest"],
    swap_views: ["off_policy/items.jsonl, line 1, row .* in the view context: digest of the context"],
    swap_prompts: ["off_policy/items.jsonl, line 17, .* in the view empty: digest of the prompt's tokens"],
    decode_otherwise: ["off_policy/evaluation.json: decoding of the view context is .*'temperature': 0.0"],
    hide_a_decoding: ["decoding of off_policy: off_policy/evaluation.json does not say how context was decoded"],
    evaluate_another_step: ["evaluated weights: off_policy/evaluation.json: checksum of embedding"],
    change_a_number: ["numbers of off_policy: results.json, off_policy: dlen is .*, expected"],
    change_a_number_that_needs_the_model: ["numbers of off_policy: results.json, off_policy: cosine_by_layer"],
    change_the_view_kl: ["off_policy/evaluation.json: view_kl is", "results.json, off_policy: view_kl is"],
    change_an_interval: ["numbers of base: results.json, base: acc_xc_ci is .0.0, 0.2., expected"],
    swap_the_curves: ["results.json, off_policy: (view_kl is|positions with a view KL)"],
    select_another_step: ["results.json, off_policy: step of the selected checkpoint is None, expected 2"],
    use_another_checkpoint: ["checkpoints of off_policy: off_policy/checkpoints/3: checksum of params/embedding is"],
    lose_a_checksum: ["checkpoints of off_policy: off_policy/checkpoints/3: checksum of .*, expected None"],
    add_weights_to_an_export: ["export model: .*/model/more.safetensors was not exported"],
    damage_a_checkpoint: ["checkpoints of off_policy: off_policy/checkpoints/3"],
    damage_an_export: ["export model: .*/model/model.safetensors: sha256 is"],
    change_a_card: ["model/README.md: line 5 of the table of results is '. 0ff_policy", "README.md: sha256"],
    export_another_step: ["export model: .*/model/export.json: checksum of embedding"],
    lose_items: ["items of off_policy: off_policy/items.jsonl is missing"],
    lose_results: ["results: results.json is missing"],
    lose_rows: ["training rows of off_policy: off_policy/rows.jsonl is missing"],
    lose_a_checkpoint: ["checkpoints of off_policy: off_policy/checkpoints/3 is missing"],
    repeat_a_step: ["metrics of off_policy: off_policy/metrics.jsonl: step 3 occurs more than once"],
    lose_a_step: ["metrics of off_policy: off_policy/metrics.jsonl: step 1 is missing"],
    change_the_base_on_dev: ["metrics of off_policy: off_policy/metrics.jsonl, step 0: dev/dlen is 9.0, expected"],
    ask_the_teacher_another_question: ["teacher's samples: teacher_samples.jsonl, step 2: rows that"],
    feed_other_steps: [
        "training rows of off_policy: off_policy/rows.jsonl: step 3 occurs more than once",
        "off_policy/rows.jsonl: step 9 is beyond the run's steps",
        "off_policy/rows.jsonl: step 2 is missing",
        "opcd_retained/rows.jsonl: the steps are not in order",
        "opcd_retained/rows.jsonl, line 2, step 1: number of retention rows is 7, expected 8",
        "opcd_retained/rows.jsonl, line 3, step 3: the context prompts are of row .* of test, not of training rows",
        "opcd_retained/rows.jsonl, line 3, step 3, retention row 4 asks row .* of test, not a training row",
    ],
    write_other_steps: [
        "off_policy/metrics.jsonl: the rows of evaluation on dev of steps are not in order",
        "opcd_retained/metrics.jsonl: step 4 is not due",
    ],
    change_the_teachers_samples: [
        "teacher_samples.jsonl, step 3: responses is 7, expected 8",
        "teacher_samples.jsonl, line 2: '#9' is no training row",
        "teacher_samples.jsonl, line 3: digest of the question is",
    ],
    lose_the_teachers_samples: ["teacher_samples.jsonl is missing, and off_policy learns from it"],
    lose_samples_of_a_step: [
        "teacher's samples: teacher_samples.jsonl: step 1, 3 is missing, and off_policy learns from it",
        "teacher's samples: teacher_samples.jsonl: no arm learns from the teacher at step 9",
    ],
    lose_the_teachers_samples_of_the_first_steps: ["teacher_samples.jsonl is missing, and off_policy learns from it"],
    leave_questions_out: [
        "items of off_policy: off_policy/items.jsonl: questions of test is .*, expected",
        "items of base: base/items.jsonl: questions of test is .*, expected",
    ],
    leave_questions_out_that_may_be_dropped: [
        "items of off_policy: off_policy/items.jsonl: questions of test is .*, expected"
    ],
    hide_what_was_lost_while_learning: ["results: results.json, off_policy: lowest_acc_xc is None, expected 0.0"],
    change_what_was_asked: [
        "items of off_policy: off_policy/items.jsonl, line 9, row .* in the view context: digest of the question",
        "grades of off_policy: off_policy/items.jsonl, line 9, .*: its question is none that may be asked there",
        "grades of off_policy: off_policy/items.jsonl, line 10, .*: reference is 's1 abc', expected",
        "off_policy/items.jsonl, line 16, row .* in the view empty: context is 'a>a;', expected ''",
        "off_policy/items.jsonl, line 32, row .* in the view paraphrase has no context",
        "off_policy/items.jsonl: .question, sample. in the view context is",
        "opcd_retained/items.jsonl: .question, sample. is",
        "grades of off_policy, selected: .*, line 1, row '#9' in the view bare: the task has no such test row",
        "items of base: base/items.jsonl has no responses in the view bare",
    ],
    change_what_was_evaluated: [
        "decoding of off_policy: off_policy/evaluation.json does not say how the views were decoded",
        "items of opcd_retained: opcd_retained/evaluation.json: step is 2, expected 3",
        "evaluated weights: base/evaluation.json: digest of the weights is",
    ],
    change_the_results: [
        "results: results.json: models is .*'another'.*, expected",
        "results.json, off_policy: step is 2, expected 3",
        "results.json, off_policy: skipped_steps is 4, expected 0",
        "results.json, off_policy: lowest_acc_xc is 0.5, expected 0.0",
        "results.json, off_policy: context_loss is 0.25, expected 0.0",
        "results.json, off_policy: alarms is {}, expected {'truncated': {'step': 3, 'rows': 1}}",
        "results.json, off_policy: harm_minus_opcd_retained is .0.1, 0.0, 0.2., expected None",
    ],
    change_the_records_of_checkpoints: [
        "off_policy/checkpoints/3: position in the data is 9, expected 3",
        "off_policy/checkpoints/3: inputs is {.*, expected",
        "checkpoints of opcd_retained: opcd_retained/checkpoints/3 cannot be read",
    ],
    lose_lines_and_files_of_an_export: [
        "model/README.md: lines of the table of results is 5, expected 6",
        "export model: .*/model/chat_template.jinja is missing",
    ],
    change_the_configuration: ["folder: run.json: configuration"],
    cut_a_file: ["off_policy/items.jsonl, line 2 is not valid JSON"],
}


@pytest.mark.slow
@pytest.mark.parametrize("change", TAMPERED, ids=lambda change: change.__name__)
def test_a_changed_copy_is_named(change, copied):
    change(copied)
    wrong = find_wrong(copied, copied.parent / "model")
    for pattern in TAMPERED[change]:
        assert any(re.search(pattern, problem) for problem in wrong), "\n".join(wrong)


@pytest.mark.slow
def test_a_run_of_an_older_version_passes_and_the_audit_says_what_it_lacks(copied, capsys):
    edit(copied / "run.json", lambda facts: facts.pop("record"))
    for path in [copied / "data.jsonl", *copied.rglob("rows.jsonl")]:
        path.unlink()
    for path in copied.rglob("evaluation.json"):
        edit(path, lambda stored: [stored.pop(name) for name in ("decoding", "weights", "items")])
    for path in copied.rglob("items.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(row | {"prompt": None}) + "\n" for row in rows).replace(', "prompt": null', "")
        )
    assert main([str(copied)]) == 0
    printed = capsys.readouterr().out
    assert "splits: not checked" in printed and "decoding of base: not checked" in printed
    assert "training rows of off_policy: not checked: off_policy/rows.jsonl was not written" in printed
    assert "OK    grades of base" in printed and "OK    numbers of off_policy" in printed


@pytest.mark.slow
def test_a_run_that_has_not_ended_passes(copied, capsys):
    edit(copied / "run.json", lambda facts: facts.pop("seconds"))
    edit(copied / "run.json", lambda facts: facts["config"]["train"].update(steps=9))
    edit(copied / "config.json", lambda config: config["train"].update(steps=9))
    for name in ("results.json", "off_policy/items.jsonl", "off_policy/evaluation.json"):
        (copied / name).unlink()
    with (copied / "off_policy" / "rows.jsonl").open("a") as file:
        file.write('{"step": 4, "ba')
    assert main([str(copied)]) == 0, capsys.readouterr().out
    assert "this one has not ended" in capsys.readouterr().out


@pytest.mark.slow
def test_a_base_that_was_evaluated_again_on_another_mesh_passes(copied):
    sums = ("distill", "view_kl", "trace_gap", "drift")  # the last two are measured if they are asked for

    def measure(stored: dict) -> None:
        stored["metrics"].update(trace_gap=0.5, drift=0.25)

    def sum_in_another_order(row: dict) -> None:
        base = json.loads((copied / "base" / "dev" / "evaluation.json").read_text())["metrics"]
        row.update({f"dev/{name}": base[name] * (1 + 4e-7) for name in sums})

    edit(copied / "base" / "dev" / "evaluation.json", measure)
    for arm in (ARM, FIRST):
        edit_line(copied / arm / "metrics.jsonl", sum_in_another_order, lambda row: "dev/distill" in row)
    assert find_wrong(copied) == []
    edit_line(copied / ARM / "metrics.jsonl", lambda row: row.update({"dev/trace_gap": 0.501}))
    assert ["dev/trace_gap is 0.501" in problem for problem in find_wrong(copied)] == [True]


def test_a_path_that_is_no_run_ends_with_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path)]) == 2
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text("[]")
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 3 and all(line.startswith("error: ") for line in printed)
    assert "is not the folder of a run or of an evaluation" in printed[0] and "no configuration" in printed[2]


def make_items(seed: int, samples: int, contexts: int = 3, groups: int = 0) -> list[dict]:
    """Random items of 12 questions in the views of an evaluation."""
    rng, items = np.random.default_rng(seed), []
    for view in ("bare", "context", "empty", "other", "paraphrase", "unrelated"):
        for number in range(12 * samples):
            parsed = "a" if rng.random() < 0.8 else None
            items.append({
                "id": f"q{number // samples}", "view": view, "sample": number % samples,
                "context": f"c{rng.integers(contexts)}" if view == "other" else None, "parsed": parsed,
                "correct": bool(parsed and rng.random() < 0.6), "reason": None if parsed else "no answer",
                "lenient": bool(rng.random() < 0.7), "length": int(rng.integers(1, 9)),
                "truncated": bool(rng.random() < 0.3),
            })  # fmt: skip
            if groups:
                items[-1]["group"] = f"fact {number // samples % groups}"
    return items


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_second_implementation_computes_the_same_numbers(seed, groups, samples):
    items = make_items(seed, samples, groups=groups)
    outcomes: dict[str, Outcomes] = evaluator.collect_outcomes(items)
    ignored = outcomes["bare"].correct
    outcomes["ignored"] = dataclasses.replace(outcomes["other"], correct=ignored)
    found = numbers.recompute(items, None, 50, ignored.tolist())
    assert ("mcnemar_p" in found) == (samples == 1 and not groups) and "obedience_floor_ci" in found
    check = Check("numbers")
    check.expect("all", found, json.loads(json.dumps(metrics.compute_metrics(outcomes, 50))))
    assert not check.wrong
    first = make_items(seed + 10, samples, groups=groups)
    expected = harm_difference(outcomes, evaluator.collect_outcomes(first))
    assert numbers.harm_difference(items, first) == pytest.approx(expected)


def test_without_right_answers_there_is_no_harm_in_either_implementation():
    items = [item | {"correct": False, "lenient": None} for item in make_items(0, 1)]
    found = numbers.recompute(items, [False] * 12, resamples=50)
    assert found["harm"] is None and found["harm_ci"] is None and "acc_x_lenient" not in found
    assert found["acc_default"] == 0.0 and numbers.harm_difference(items, items) is None


@pytest.mark.parametrize(("base", "lost"), [(0.25, 0.0), (0.75, 0.25)])
def test_the_lowest_accuracy_is_of_trained_weights_and_what_was_lost_is_of_the_bases(base, lost):
    rows = [{"step": 0, "dev/acc_xc": base}, {"step": 1, "loss": 0.1}, {"step": 2, "dev/acc_xc": 0.5}]
    rows += [{"step": 4, "dev/acc_xc": 0.875}]
    check, folder = Check("results"), SimpleNamespace(json=lambda name: {"metrics": {"acc_xc": base}})
    evaluations._check_learning(folder, check, "arm", {"lowest_acc_xc": 0.5, "context_loss": lost}, rows)
    assert check.wrong == []


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_lowest_accuracy_that_is_missing_is_wrong_but_for_older_versions(is_recorded):
    rows = [{"step": 2, "dev/acc_xc": 0.5}]
    base = {"metrics": {"acc_xc": 0.75}}
    check, folder = Check("results"), SimpleNamespace(json=lambda name: base, is_recorded=is_recorded)
    evaluations._check_learning(folder, check, "arm", {}, rows)
    assert len(check.wrong) == 2 * is_recorded and len(check.unchecked) == 1 - is_recorded


@pytest.mark.slow
def test_a_difference_of_two_arms_with_the_wrong_sign_is_found(copied):
    """Grades are drawn anew, since no answer of this run is right, and results.json is written by the library."""
    outcomes, results = {}, json.loads((copied / "results.json").read_text())
    for seed, arm in enumerate((FIRST, ARM)):
        path, rng = copied / arm / "items.jsonl", np.random.default_rng(seed)
        items = [json.loads(line) | {"correct": bool(rng.random() < 0.5)} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        outcomes[arm] = evaluator.collect_outcomes(items)
        results[arm] |= metrics.compute_metrics(outcomes[arm], 20)
    results[ARM] |= metrics.compare_arms(outcomes[ARM], outcomes[FIRST], FIRST)
    (copied / "results.json").write_text(json.dumps(results))
    check = Check.run("results", lambda check: evaluations.check_results(Folder.open(copied), check))
    assert not check.wrong and results[ARM][f"harm_minus_{FIRST}"][0] != 0

    results[ARM][f"harm_minus_{FIRST}"] = [-value for value in results[ARM][f"harm_minus_{FIRST}"]]
    (copied / "results.json").write_text(json.dumps(results))
    check = Check.run("results", lambda check: evaluations.check_results(Folder.open(copied), check))
    assert [f"results.json, {ARM}: harm_minus_{FIRST} is" in problem for problem in check.wrong] == [True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool"])
def test_checksums_in_numpy_are_those_of_the_checkpoints(dtype):
    array = (np.random.default_rng(0).normal(size=(3, 5, 7)) * 100).astype(jax.numpy.dtype(dtype))
    assert compute_checksum(array) == compute_checksums({"a": array})["a"]


def test_numbers_are_listed_in_short():
    assert list_numbers([3, 1, 2, 7]) == "1-3, 7" and list_numbers([]) == ""
    assert list_numbers(range(0, 40, 2)) == "0, 2, 4, 6, 8, ..."


def test_the_card_of_a_run_with_a_teacher_of_its_own_has_its_row(tmp_path):
    rows = {name: {"acc_x": value, "acc_xc": 0.5} for name, value in (("base", 0.1), ("teacher", 0.2), (ARM, 0.3))}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    place = tmp_path / "export"
    place.mkdir()
    (place / "README.md").write_text(model_card._results(tmp_path, ARM, 3))
    check, folder = Check("card"), SimpleNamespace(path=tmp_path, json=lambda name: rows, config={})
    Weights(folder)._check_card(place, {"arm": ARM, "results": None}, check)
    assert not check.wrong and "teacher with context" in (place / "README.md").read_text()
