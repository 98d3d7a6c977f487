"""The task handbook: documents, wordings, splits, references, and oracles that read a document."""

import os
import re

import pytest

from ctxjax.data.splits import SPLITS, check_splits
from ctxjax.data.task import make_evaluation_views
from ctxjax.data.tasks import handbook
from ctxjax.data.tasks.handbook import STYLES, SUBJECTS, Handbook, HandbookConfig

YES_NO = ("yes", "no")


def make(**changes) -> Handbook:
    limits = {"train_questions": 0, "dev_questions": 0, "test_questions": 0}
    fields = {"seed": 0, "subject": "place", "style": "list", "tokens": 0}
    return Handbook(HandbookConfig(**(fields | limits | changes)))


@pytest.fixture(scope="module", params=SUBJECTS)
def task(request) -> Handbook:
    return make(subject=request.param)


def every_document(task: Handbook) -> list[handbook.Document]:
    return [task.document, *(document for documents in task.others.values() for document in documents.values())]


def read(task: Handbook, row, context: str) -> str:
    """What an oracle answers that finds the row's fact in a document: the value of the fact's line there."""
    fact = next(fact for fact in handbook.read_facts() if fact.subject == task.config.subject and fact.name in row.id)
    for style in STYLES:
        for document in every_document(task):
            if document.write(style) == context:
                return document.values()[fact.name]
    raise AssertionError("no such document")


def test_a_fact_has_twenty_wordings_and_each_split_has_some_that_no_other_has(task):
    rows = {split: task.rows(split) for split in SPLITS}
    assert {split: len(own) for split, own in rows.items()} == {"train": 216, "dev": 24, "test": 192}
    check_splits(task)
    texts = [row.question for own in rows.values() for row in own]
    assert len(set(texts)) == len(texts) == 432
    for fact in (fact for fact in handbook.read_facts() if fact.subject == task.config.subject):
        asked = [sum(row.id.startswith(f"{split}-{fact.name}-") for row in rows[split]) for split in SPLITS]
        assert asked == [18, 2, 16]
        phrasings = [*fact.train, *fact.dev, *fact.test]
        assert len(set(phrasings)) == 6 and all("{s}" in text for text in phrasings)


def test_every_kind_of_value_is_there(task):
    facts = [fact for fact in handbook.read_facts() if fact.subject == task.config.subject]
    kinds = [fact.value.split()[0] for fact in facts]
    assert len(facts) == 12 and kinds.count("yes_no") == 1 and kinds.count("number") >= 3
    assert kinds.count("name") >= 2 and kinds.count("person") == 1
    assert len(set(kinds)) >= 7  # the rest are phrases


def test_no_value_is_part_of_another_value_or_of_a_question(task):
    questions = [row.question.casefold() for split in SPLITS for row in task.rows(split)]
    for document in every_document(task):
        values = [value.casefold() for value in document.values().values()]
        phrases = [value for value in values if value not in YES_NO]
        assert len(values) == 12 and len(phrases) == 11
        assert not any(one in other for one in phrases for other in phrases if one is not other)
        assert not any(value in question for value in phrases for question in questions)
    assert not any(re.search(r"\b(yes|no)\b", question) for question in questions)


def test_no_two_documents_agree_on_the_value_of_a_question(task):
    documents = every_document(task)
    assert len(documents) == 85
    for name in task.document.values():
        values = [document.values()[name] for document in documents]
        if values[0] in YES_NO:
            assert set(values[1:]) == {"no" if values[0] == "yes" else "yes"}
        else:
            assert len(set(values)) == len(values)
    contexts = [set(task.other_contexts(split)) for split in SPLITS]
    assert [len(own) for own in contexts] == [48, 12, 24] and len(set.union(*contexts, {task.context})) == 85


def test_oracles_are_graded_by_the_document_that_they_read(task):
    rows = task.rows("test")
    views = make_evaluation_views(task, rows, "test")
    assert list(views) == ["bare", "context", "empty", "other", "paraphrase", "unrelated"]
    for number, row in enumerate(rows):
        under, other, again = (views[view][number] for view in ("context", "other", "paraphrase"))
        assert again.context != under.context  # the same document in another style
        own, theirs = read(task, row, under.context), read(task, other, other.context)
        assert task.grade(own, under.reference).correct and task.grade(f"It is the {own}!", row.reference).correct
        assert task.grade(theirs, other.reference).correct and not task.grade(own, other.reference).correct
        assert not task.grade(theirs, under.reference).correct
        assert again.reference == row.reference and task.grade(read(task, row, again.context), row.reference).correct
        assert not task.grade("", row.reference).correct
    assert {row.context for row in views["other"]} == set(task.other_contexts("test"))


def test_an_unrelated_document_has_nothing_to_do_with_the_questions(task):
    rows, unrelated = task.rows("dev"), task.unrelated()
    views = make_evaluation_views(task, rows, "dev")
    assert views["unrelated"] == [row._replace(context=unrelated) for row in rows]
    assert views["empty"] == [row._replace(context="") for row in rows]
    assert views["bare"] == [row._replace(context=None) for row in rows]
    assert views["context"] == rows and {row.context for row in rows} == {task.context}
    assert "\n" in unrelated and len(unrelated) > 100 and task.subject not in unrelated
    assert not any(value in unrelated for value in task.document.values().values() if value not in YES_NO)


@pytest.mark.parametrize("style", STYLES)
def test_a_document_states_its_values_in_every_style(task, style):
    text = task.document.write(style)
    assert task.subject in text
    assert all(value in text for value in task.document.values().values() if value not in YES_NO)


def test_the_seed_decides_the_document_and_nothing_else_does():
    again, other = make(), make(seed=1)
    assert make().context == again.context and make().rows("test") == again.rows("test")
    assert make().other_contexts("test") == again.other_contexts("test")
    assert other.subject != again.subject and other.context != again.context
    styled = make(style="rules")
    assert styled.document == again.document and [r.question for r in styled.rows("dev")] == [
        r.question for r in again.rows("dev")
    ]
    assert len({make(seed=seed).subject for seed in range(6)}) == 6
    few = make(test_questions=5)
    assert few.rows("test") == again.rows("test")[:5]


@pytest.mark.parametrize(("style", "tokens"), [("table", 150), ("list", 600), ("prose", 1000), ("rules", 2000)])
def test_a_document_is_as_long_as_asked_for(style, tokens):
    task = make(style=style, tokens=tokens)
    assert 0.95 * tokens < handbook.estimate_tokens(task.context) < 1.1 * tokens
    assert len(task.document.entries) > 12  # the others are about other subjects
    rows = task.rows("dev")
    for document in (task.document, *task.others["test"].values()):
        own = {entry.fact.name: entry.value for entry in document.entries if entry.subject == task.subject}
        assert len(own) == 12
        context = next((text for text, one in task.others["test"].items() if one is document), None)
        asked = [under for row in rows for under in task.rows_under(row, context)] if context else rows
        assert {row.id.split("-")[1]: row.reference for row in asked} == own
    folder = os.environ.get("CTXJAX_REAL_MODEL")
    if folder:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        assert 0.85 * tokens < len(tokenizer(task.context)["input_ids"]) < 1.15 * tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "planet"}, "handbook.subject = 'planet' is not known; choose from place, company, product"),
        ({"style": "song"}, "handbook.style = 'song' is not known; choose from list, prose, table, rules"),
        ({"style": "rules", "tokens": 150}, "handbook.tokens = 150, but the facts alone have about 2.. tokens"),
    ],
)
def test_a_document_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_wordings_of_a_fact_are_one_group(task):
    facts = {}
    for row in task.rows("test"):
        facts.setdefault(task.group(row), set()).add(row.reference)
    assert len(facts) == 12 and all(len(values) == 1 for values in facts.values())
