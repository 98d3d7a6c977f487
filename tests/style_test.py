"""The task style: demands with checks, questions by topic, and other demands."""

import json

import pytest

from ctxjax.data import splits
from ctxjax.data.grading.response_checks import grade_check
from ctxjax.data.task import grade_response, make_evaluation_views
from ctxjax.data.tasks.style import TOPICS, Style, StyleConfig, read_demands

OBEYED = {
    "pirate": "Ahoy there! An egg boils in ten minutes.",
    "french": "Il faut mettre un oeuf dans de l'eau et attendre dix minutes, avec du sel.",
    "json": '{"reply": "Boil it for ten minutes."}',
    "exclaim": "Boil it for ten minutes!!!",
    "short": "Boil it for ten minutes.",
    "sign": "Captain Nemo here. Boil it for ten minutes.",
}
PLAIN = "To boil an egg, you need a pot of water and a stove; once it boils, wait for ten minutes, and it is done."


def make(demand: str = "pirate", **changes) -> Style:
    limits = {"train_questions": 0, "dev_questions": 0, "test_questions": 0}
    return Style(StyleConfig(**({"demand": demand, "other_contexts_file": "builtin"} | limits | changes)))


def test_every_demand_is_met_by_what_obeys_it_and_by_nothing_plain():
    demands = read_demands()
    assert demands.keys() == OBEYED.keys()
    for name, demand in demands.items():
        assert grade_check(demand.check, OBEYED[name]).correct and not grade_check(demand.check, PLAIN).correct
        assert not grade_check(demand.check, "").correct and demand.paraphrase != demand.context


@pytest.mark.parametrize("demand", OBEYED)
def test_every_view_is_judged_by_the_demand_of_its_context(demand):
    task = make(demand)
    rows = task.rows("dev")
    views = make_evaluation_views(task, rows, "dev")
    assert list(views) == ["bare", "context", "empty", "other", "paraphrase", "unrelated"]
    for name in set(views) - {"other"}:
        assert all(grade_response(task, OBEYED[demand], row).correct for row in views[name])
        assert not any(grade_response(task, PLAIN, row).correct for row in views[name])
    assert all(row.check is not None and row.check != task.demand.check for row in views["other"])
    assert task.demand.check not in {
        row.check for split in splits.SPLITS for c in task.other_contexts(split) for row in task.rows_under(rows[0], c)
    }
    assert sum(grade_response(task, OBEYED[demand], row).correct for row in views["other"]) < 0.5 * len(rows)


def test_no_topic_is_in_two_splits():
    task = make()
    splits.check_splits(task)
    every = [topic for topics in TOPICS.values() for topic in topics]
    assert len(set(every)) == len(every) == 96
    assert sum(len(task.rows(split)) for split in splits.SPLITS) == 4 * 96 and task.skipped == {}
    questions = {split: " ".join(row.question for row in task.rows(split)) for split in splits.SPLITS}
    found = {split: {topic for topic in every if topic in text} for split, text in questions.items()}
    assert sum(map(len, found.values())) == 96 and min(map(len, found.values())) >= 5
    assert make().rows("test") == task.rows("test") and make(test_questions=8).rows("test") == task.rows("test")[:8]


def test_questions_about_a_topic_are_one_group():
    task = make("french")
    groups = {task.group(row) for row in task.rows("test")}
    assert 3 < len(groups) < len(task.rows("test")) / 2
    assert all(task.group(row) in row.question for row in task.rows("test"))


def test_other_contexts_that_nothing_judges_are_refused(tmp_path):
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps(f"Other {n}.") + "\n" for n in range(8)))
    with pytest.raises(ValueError, match="style.other_contexts_file: the context 'Other 3.' has no check"):
        make(other_contexts_file=str(path))


def test_an_unknown_demand_is_refused():
    with pytest.raises(ValueError, match="style.demand = 'opera' is not known; choose from pirate, french"):
        make("opera")
