"""Where contexts come from: inline, a file, several files, a column."""

from collections import Counter

import pytest

from ctxjax.data.contexts import ContextConfig, Contexts, has_context_per_row
from ctxjax.data.records import hash_text
from ctxjax.data.task import Row


def contexts(**changes) -> Contexts:
    settings = {"context": "", "context_file": "", "context_files": (), "context_seed": 0, "other_contexts_file": ""}
    return Contexts(ContextConfig(**(settings | changes)), "math")


@pytest.fixture
def files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"context {name}\n")
    return tuple(str(tmp_path / f"{name}.txt") for name in "abc")


def test_one_text_is_every_rows_and_is_noted_by_its_digest(files):
    assert contexts(context="Think.").choose("1") == contexts(context="Think.").choose("2") == "Think."
    assert contexts(context="Think.").describe() == {"inline": hash_text("Think.")}
    one = contexts(context_file=files[0])
    assert one.choose("1") == "context a" and one.describe() == {files[0]: hash_text("context a")}


def test_of_several_files_a_row_has_the_same_in_every_run_of_a_seed_and_all_are_used(files):
    several = contexts(context_files=files)
    drawn = [several.choose(f"row {n}") for n in range(300)]
    assert drawn == [contexts(context_files=files).choose(f"row {n}") for n in range(300)]
    assert drawn != [contexts(context_files=files, context_seed=1).choose(f"row {n}") for n in range(300)]
    counts = Counter(drawn)
    assert counts.keys() == {"context a", "context b", "context c"} and min(counts.values()) > 70
    assert several.describe() == {file: hash_text(f"context {name}") for file, name in zip(files, "abc")}


def test_a_column_is_the_rows_own():
    column = contexts(context_column="hint")
    assert column.columns == ("hint",) and column.choose("1", "look left") == "look left"
    assert column.describe() == {"column": "hint"} and contexts(context="Think.").columns == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "math has no context; set math.context_file"),
        ({"context": "a", "context_column": "hint"}, "math.context and math.context_column are both set"),
        ({"context_file": "missing.txt"}, "context file missing.txt does not exist"),
        ({"context_files": ("missing.txt",)}, "context file missing.txt does not exist"),
    ],
)
def test_no_context_or_two_sources_are_refused(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        contexts(**changes)


def test_rows_with_a_context_each_are_told_from_rows_that_share_one():
    def row(context):
        return Row("1", "?", context, "")

    assert has_context_per_row([row("a"), row("b")])
    assert (
        not has_context_per_row([row("a"), row("b"), row("a")])
        and not has_context_per_row([row("a")])
        and not has_context_per_row([])
    )
