"""Checks that contexts carry, and the built-in pool: every check tells a response that obeys from one that does not."""

import pytest

from ctxjax.data import contexts
from ctxjax.data.contexts import OtherContexts, OtherContextsConfig
from ctxjax.data.grading import response_checks
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.response_checks import CHECKS, Check, grade_check
from ctxjax.data.records import Reader, RecordsConfig
from ctxjax.data.task import Row, grade_response

# name, argument, responses that obey, responses that do not
CASES = [
    ("upper_case", None, ["AYE, 7 OF THEM.", "ÜBER"], ["Aye", "AYE aye"]),
    ("lower_case", None, ["no, not at all. 7", "<answer>no</answer>"], ["No", "nO"]),
    ("starts_with", "Well", ["Well, no.", "**well**: no", "“Well then”"], ["Wellness", "Oh well"]),
    ("starts_with", "Let us see", ["Let us see: two legs"], ["Let us look"]),
    ("ends_with", "over", ["No. Over.", "It is done, over!", "**over**"], ["It is moreover", "over and out"]),
    ("ends_with", "That is all I know.", ["Two. That is all I know.", "that is all I know"], ["That is all."]),
    ("contains", "matey", ["No, matey, no", "MATEY!"], ["mateys", "mate y"]),
    ("avoids", "q", ["no such letter"], ["Quite", "a queue"]),
    ("avoids", ",", ["no comma"], ["yes, one"]),
    ("sentences", 1, ["It weighs 3.5 kg.", "No", "Is it so?"], ["No. Never.", "No\nnever"]),
    ("sentences", 3, ["One. Two! Three?", '"One." Two. Three…'], ["One. Two.", "One. Two. Three. Four."]),
    ("paragraphs", 2, ["one\n\ntwo", "\none\nmore\n\n \n\ntwo\n"], ["one\ntwo", "a\n\nb\n\nc"]),
    ("at_most_words", 5, ["It's five words, no more", "one"], ["six words are more than five"]),
    ("at_least_words", 3, ["three words here", "and four are enough"], ["only two"]),
    ("words", 2, ["well-known fact", "Yes, indeed."], ["one", "one two three"]),
    ("bullets", 2, ["- a\n- b", "Two:\n* a\n* b", "• a\n• b"], ["- a", "- a\n- b\n- c", "a - b - c"]),
    ("numbered", 2, ["1. a\n2. b", "1) a\n2) b"], ["1. a", "in 1999. two", "1. a\n2. b\n3. c"]),
    ("json_with", "answer", ['{"answer": "no"}', '```json\n{"answer": 1}\n```'], ['{"reply": 1}', '["answer"]',
     'Sure: {"answer": 1}', '{"answer": 1']),
    ("script", "CYRILLIC", ["Нет, это не так. 7", "Да (да)"], ["No", "Net да"]),
    ("script", "HIRAGANA|KATAKANA|CJK", ["いいえ、違います。", "漢字"], ["iie"]),
    ("question", None, ["Is it?", "No. Is it?*", '"Why?"'], ["It is.", "Is it? No."]),
    ("quoted", None, ['"No."', "“No.”\n"], ['"No." he said', "No"]),
    ("no_digits", None, ["two legs"], ["2 legs", "１ leg"]),
    ("matches", r"\[[^\[\]]+\]", ["so [yes]"], ["so yes", "[]"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "good", "bad"), CASES)
def test_a_check_tells_obedience(name, argument, good, bad):
    assert [response for response in good if not grade_check(Check(name, argument), response).correct] == []
    assert [response for response in bad if grade_check(Check(name, argument), response).correct] == []


def test_every_check_has_a_case():
    assert {case[0] for case in CASES} == CHECKS.keys()


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_response_without_words_obeys_nothing_and_says_why(name):
    argument = {None: None, str: "x", int: 0}[CHECKS[name][0]]
    for response, reason in (
        ("", "empty"),
        ("...", response_checks.NO_WORDS),
        ("<think>A word", "reasoning is not closed"),
    ):
        assert grade_check(Check(name, argument), response) == Grade(None, False, reason)


def test_reasoning_is_not_part_of_the_response():
    assert grade_check(Check("upper_case"), "<think>small letters</think>AYE").correct
    assert not grade_check(Check("contains", "matey"), "<think>matey</think>Aye").correct


class Echo:
    def grade(self, response, reference):
        return Grade(response, response == reference)


def test_a_row_with_a_check_is_graded_by_it_and_others_by_the_task():
    row = Row("1", "?", None, "No")
    assert grade_response(Echo(), "No", row).correct and not grade_response(Echo(), "NO", row).correct
    under = row._replace(context="Shout.", check=Check("upper_case"))
    assert grade_response(Echo(), "NO", under).correct and not grade_response(Echo(), "No", under).correct


@pytest.fixture(scope="module")
def pool():
    return OtherContexts(OtherContextsConfig(other_contexts_file="builtin"), "qa", Reader(RecordsConfig()), [])


def test_the_built_in_pool_has_sixty_checkable_contexts_and_its_halves_are_disjoint(pool):
    train, dev, test = (pool.select(split) for split in ("train", "dev", "test"))
    held_out = dev + test
    assert len(train) >= 30 and len(dev) >= 12 and len(test) >= 24 and len({*train, *held_out}) == 72
    row = Row("1", "?", "own", "No")
    rows = [under for text in train + held_out for under in pool.rows_under(row, text)]
    assert all(under.check is not None and under.context != "own" for under in rows)
    demands = [{under.check for under in half} for half in (rows[: len(train)], rows[len(train) :])]
    # A demand that is trained on is not the one that is tested, but for those without an argument.
    assert {check.name for check in demands[0] & demands[1]} <= {"upper_case", "lower_case", "question", "script"}
    assert {check.name for check in demands[1]} - {check.name for check in demands[0]}


def test_no_answer_obeys_much_of_the_pool_by_chance(pool):
    row = Row("1", "?", "own", "No")
    rows = [
        under
        for split in ("train", "dev", "test")
        for text in pool.select(split)
        for under in pool.rows_under(row, text)
    ]
    for response in ("<answer>yes</answer>", "The answer is 42.", "I cannot help with that, since it is harmful."):
        assert sum(grade_check(under.check, response).correct for under in rows) < 0.25 * len(rows)


def other(tmp_path, *lines: str, internalized=()) -> OtherContexts:
    path = tmp_path / "others.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = OtherContextsConfig(other_contexts_file=str(path))
    return OtherContexts(config, "qa", Reader(RecordsConfig()), list(internalized))


def test_a_pool_of_ones_own_may_be_of_strings_and_is_then_graded_by_the_task(tmp_path):
    mine = other(tmp_path, '"Be brief."', '"Be kind."', '"Be precise."', '"Be calm."')
    assert mine.select("train") == ["Be brief.", "Be precise."]
    assert mine.select("test") == ["Be kind."] and mine.select("dev") == ["Be calm."]
    assert mine.rows_under(Row("1", "?", None, "No"), "Be kind.") == [Row("1", "?", "Be kind.", "No")]


def test_where_some_held_out_contexts_have_a_check_only_those_measure_obedience(tmp_path):
    shout = '{"context": "Shout.", "check": "upper_case"}'
    whisper = '{"context": "Whisper.", "check": "lower_case"}'
    mine = other(tmp_path, '"a"', '"b"', '"c"', shout, '"e"', whisper)
    assert mine.select("test") == ["Shout."] and mine.select("dev") == ["Whisper."]
    assert mine.select("train") == ["a", "c", "e"]
    with pytest.raises(ValueError, match="has 6 contexts and, of those in its rows 2, 4, 6, .*, one that has a check"):
        other(tmp_path, '"a"', '"b"', '"c"', shout, '"e"', '"f"')


def test_without_a_pool_there_is_nothing_to_obey():
    none = OtherContexts(OtherContextsConfig(other_contexts_file=""), "qa", Reader(RecordsConfig()), [])
    assert none.select("train") == none.select("test") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a", "check": "rhymes"}', "others.jsonl, line 2: check = 'rhymes' is not known; choose from"),
        ('{"context": "a", "check": "sentences", "argument": "3"}', "takes an argument of type int, not '3'"),
        ('{"context": "a", "check": "sentences"}', "takes an argument of type int, not None"),
        ('{"context": "a", "check": "upper_case", "argument": 1}', "takes no argument, not 1"),
        ('{"context": "a", "check": "ends_with", "argument": "!"}', "has no text to look for"),
        ('{"context": "a", "check": "avoids", "argument": ""}', "has no text to look for"),
        ('{"context": "a", "check": "matches", "argument": "["}', "is not a regular expression"),
        ('{"context": "a", "chek": "upper_case"}', "unknown fields .'chek'.; use context, check and argument"),
        ('{"text": "a"}', "line 2: no text in column 'context'"),
        ('"Think."', "line 2: this is the context to internalize"),
        ("3", "line 2: not a text"),
    ],
)
def test_a_pool_with_a_bad_line_is_refused_with_the_place(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        other(tmp_path, '"b"', line, '"c"', internalized=["Think."])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_pool_that_is_too_small_for_three_splits_is_refused_with_the_remedy(tmp_path, count):
    with pytest.raises(ValueError, match=f"has {count} contexts: too few .* Give at least four, or set qa.other_cont"):
        other(tmp_path, *[f'"{number}"' for number in range(count)])


@pytest.mark.parametrize("count", [4, 5, 9, 20])
def test_the_splits_of_a_pool_share_no_context_and_leave_none_out(tmp_path, count):
    mine = other(tmp_path, *[f'"{number}"' for number in range(count)])
    splits = [mine.select(split) for split in ("train", "dev", "test")]
    assert all(splits) and len({text for split in splits for text in split}) == sum(map(len, splits)) == count


def test_a_context_that_stands_twice_is_counted_once(tmp_path):
    assert other(tmp_path, '"a"', '"a"', '"b"', '"c"', '"d"').select("train") == ["a", "c"]


def test_the_built_in_pool_is_installed_with_the_package():
    assert (
        contexts.BUILT_IN_FILE.is_file() and "*.jsonl" in (contexts.BUILT_IN_FILE.parents[2] / "setup.py").read_text()
    )


@pytest.mark.parametrize("text", ['{"answer": ' + "[" * 100_000, '{"answer": ' + "1" * 5000 + "}"])
def test_json_that_cannot_be_read_is_none_and_no_error(text):
    assert not response_checks.grade_check(response_checks.Check("json_with", "answer"), text).correct
