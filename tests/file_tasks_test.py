"""Tasks over files of rows: medical, math and hints in their published layouts, their splits, and rows that are bad."""

import json
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctxjax.data import prompts, splits
from ctxjax.data.pipeline import RetentionRows, encode_rows
from ctxjax.data.prompts import PromptConfig, build_messages
from ctxjax.data.records import RecordsConfig, hash_text
from ctxjax.data.task import describe_context, make_evaluation_views
from ctxjax.data.tasks.hints import Hints, HintsConfig
from ctxjax.data.tasks.math import FORMAT, Math, MathConfig
from ctxjax.data.tasks.medical import Medical, MedicalConfig
from ctxjax.data.tasks.qa_jsonl import QaConfig, QaJsonl
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.host import hub

GSM8K = Path(__file__).parents[2] / "shared" / "data"
ROWS = {
    "test_path": "", "limit": 0, "train_questions": 0, "dev_questions": 0, "test_questions": 0,
    "other_contexts_file": "",
}  # fmt: skip
CONTEXT = {"context": "Think.", "context_file": "", "context_files": (), "context_seed": 0, "ask_format": True}
HINTS = {"question": "q", "reference": "a", "hint": "h", "template": "Look: {hint}", "grading": "math"}


def written(path: Path, rows: list) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def math(path, **changes) -> Math:
    return Math(MathConfig(**(ROWS | CONTEXT | {"path": str(path)} | changes)))


def medical(path, **changes) -> Medical:
    return Medical(MedicalConfig(**(ROWS | CONTEXT | {"path": str(path), "first_label": 0} | changes)))


def hints(path, **changes) -> Hints:
    return Hints(HintsConfig(**(ROWS | HINTS | {"path": str(path)} | changes)))


def gsm8k(n: int) -> dict:
    return {"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>\n#### {n + 1:,}"}


def dapo(n: int, column: str = "prompt") -> dict:
    chat = [{"role": "user", "content": f"Solve {n} + 1. Answer: on the last line."}]
    return {column: chat, "reward_model": {"ground_truth": str(n + 1), "style": "rule"}, "data_source": "x"}


def medmcqa(n: int) -> dict:
    return {"id": f"{n}", "question": f"Which organ, {n}?", "opa": "liver", "opb": "lung", "opc": "eye", "opd": "ear",
            "cop": n % 4, "choice_type": "single", "exp": None, "subject_name": "Anatomy"}  # fmt: skip


def every_row(task) -> list:
    return [row for split in splits.SPLITS for row in task.rows(split)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", [gsm8k, dapo, lambda n: dapo(n, "content")], ids=["gsm8k", "dapo", "reference"])
def test_mathematics_in_every_layout(row, ending, tmp_path):
    task = math(written(tmp_path / f"rows.{ending}", [row(n) for n in range(1100)]))
    rows = every_row(task)
    assert len({row.id for row in rows}) == 1100 and {row.context for row in rows} == {"Think."}
    by_question = {row.question: row for row in rows}
    if row is gsm8k:
        asked = by_question[f"What is 1000 + 1?\n\n{FORMAT}"]
        assert asked.reference == "1,001"
    else:  # a chat is asked as it stands
        asked = by_question["Solve 1000 + 1. Answer: on the last line."]
    assert task.grade(r"\boxed{1001}", asked.reference).correct
    assert not task.grade(r"\boxed{1002}", asked.reference).correct


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_medmcqa(ending, tmp_path):
    path, rows = tmp_path / f"rows.{ending}", [medmcqa(n) for n in range(40)]
    if ending == "csv":
        lines = [",".join(str(row[c]) for c in ("id", "opa", "opb", "opc", "opd", "cop")) for row in rows]
        questions = [f'"{row["question"]}"' for row in rows]
        body = "".join(f"{line},{question}\n" for line, question in zip(lines, questions))
        path.write_text("id,opa,opb,opc,opd,cop,question\n" + body)
    else:
        written(path, rows)
    task = medical(path)
    first = next(row for row in every_row(task) if row.question.startswith("Which organ, 6?"))
    assert first.question.startswith("Which organ, 6?\nA. liver\nB. lung\nC. eye\nD. ear\n\nGive the letter")
    assert first.reference == "C" and task.grade("<answer>C</answer>", "C").correct
    assert sorted(row.reference for row in every_row(task)) == sorted("ABCD" * 10)


def test_the_authors_files_of_medmcqa_count_options_from_one(tmp_path):
    rows = [medmcqa(n) | {"cop": 1 + n % 4} for n in range(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"line 4: cop = 4 is not one of 0 to 3; .*\(medical.first_label\)"):
        medical(path)
    assert sorted(row.reference for row in every_row(medical(path, first_label=1))) == sorted("ABCD" * 10)


def test_the_references_copy_of_medmcqa_is_asked_as_it_stands(tmp_path):
    rows = [{"content": [{"role": "user", "content": f"Which, {n}? A..D"}], "answer": "ABCD"[n % 4]} for n in range(40)]
    task = medical(written(tmp_path / "rows.parquet", rows))
    assert {row.question for row in every_row(task)} == {f"Which, {n}? A..D" for n in range(40)}


def test_hints_are_each_rows_own_and_graded_as_configured(tmp_path):
    rows = [{"q": f"{n} + 1?", "a": str(n + 1), "h": f"count from {n}"} for n in range(40)]
    task = hints(written(tmp_path / "rows.jsonl", rows))
    contexts = {row.context for row in every_row(task)}
    assert len(contexts) == 40 and "Look: count from 7" in contexts
    assert task.grade("#### 8", "8").correct and not task.grade("8", "8").correct
    assert hints(tmp_path / "rows.jsonl", grading="numeric").grade("8", "8").correct


def test_the_default_hints_read_the_final_answer_of_a_worked_solution(tmp_path):
    """configs/base.py: hints.reference = hints.hint = "answer", graded as math."""
    path = written(tmp_path / "rows.jsonl", [gsm8k(n) for n in range(40)])
    task = hints(path, question="question", reference="answer", hint="answer")
    for row in task.rows("train"):
        n = int(row.question.split()[2])
        assert row.reference == f"{n + 1:,}" and "####" in row.context
        assert task.grade(rf"So it is \boxed{{{n + 1}}}.", row.reference).correct
        assert not task.grade(rf"\boxed{{{n + 2}}}", row.reference).correct


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        (lambda n: {"problem": f"p {n}", "solution": rf"Thus \boxed{{{n}}}."}, str),
        (lambda n: {"problem": f"p {n}", "solution": "", "answer": rf"\sqrt{{{n}}}"}, lambda n: rf"\sqrt{{{n}}}"),
        (lambda n: {"ID": n, "Problem": f"p {n}", "Solution": "None.", "Answer": n}, str),
        (lambda n: {"question": f"p {n}", "answer": n + 0.5}, lambda n: f"{n}.5"),
    ],
)  # fmt: skip
def test_mathematics_as_other_sets_lay_it_out(row, reference, tmp_path):
    task = math(written(tmp_path / "rows.jsonl", [row(n) for n in range(40)]))
    rows = {row.question: row.reference for split in splits.SPLITS for row in task.rows(split)}
    assert rows == {f"p {n}\n\n{FORMAT}": reference(n) for n in range(40)}


def qa(path, **changes) -> QaJsonl:
    fields = CONTEXT | {
        "question": "q",
        "reference": "a",
        "messages": "",
        "limit": 0,
        "dev_questions": 4,
        "test_questions": 4,
    }
    fields |= {"other_contexts_file": "", "context_column": "", "grading": "exact", "path": str(path)} | changes
    fields.pop("ask_format")
    return QaJsonl(QaConfig(**fields))


def test_variants_of_one_question_never_lie_in_two_splits(tmp_path):
    variants = [lambda n: f"How many legs, {n}?", lambda n: f"HOW many  legs, {n}?", lambda n: f" how many legs,\t{n}?"]
    task = qa(written(tmp_path / "rows.jsonl", [{"q": v(n), "a": "four"} for v in variants for n in range(40)]))
    assert sum(len(task.rows(split)) for split in splits.SPLITS) == 40 and task.skipped == {"duplicate": 80}


def test_letters_of_another_width_are_the_same_and_powers_and_fractions_are_not():
    assert splits.normalize("Ｗhat\u3000ｉs １０ ｶﾞ?") == splits.normalize("what is 10 ガ?") == "what is 10 ガ?"
    assert splits.normalize("Café") == splits.normalize("CAFE\N{COMBINING ACUTE ACCENT}")
    values = ["10²", "102", "10₂", "1½", "11⁄2", "①", "1"]
    assert len({splits.normalize(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("grading", "value", "reference", "response"),
    [
        ("yes_no", "Yes", "yes", "<answer>yes</answer>"), ("yes_no", False, "no", "<answer>no</answer>"),
        ("letter", "B. liver", "B", "<answer>b</answer>"), ("letter", 2, "C", "<answer>C</answer>"),
        ("math", r"\boxed{4}", "4", r"\boxed{4.0}"), ("numeric", 204, "204", "so 204"),
        ("exact", True, "True", "true"),
    ],
)  # fmt: skip
def test_references_of_a_users_file_are_read_for_their_grader(grading, value, reference, response, tmp_path):
    task = qa(written(tmp_path / "rows.jsonl", [{"q": f"{n}?", "a": value} for n in range(20)]), grading=grading)
    (row, *_) = task.rows("test")
    assert row.reference == reference and task.grade(response, row.reference).correct


def test_what_cannot_be_a_reference_names_the_row_or_is_left_out(tmp_path):
    rows = [{"q": f"{n}?", "a": "liver" if n == 3 else "B"} for n in range(20)]
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError, match="line 4: column 'a': 'liver' cannot be a reference; give a letter from A to D"
    ):
        qa(path, grading="letter")
    task = qa(path, grading="letter", records=RecordsConfig(skip=("label",)))
    assert task.skipped == {"label": 1} and sum(len(task.rows(split)) for split in splits.SPLITS) == 19


def talk(*texts: str, system: str = "") -> list[dict[str, str]]:
    """A chat of these texts, users and assistants in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system else said


def test_a_chat_is_a_question_with_its_earlier_turns_and_the_last_response_is_the_reference(tmp_path):
    rows = [{"chat": talk("Hello.", "Yes?", f"What is {n}?", f"It is {n}.", "Sure?", "yes")} for n in range(20)]
    task = qa(written(tmp_path / "rows.jsonl", rows), messages="chat", context="Be brief.")
    found = {row.conversation: row for row in every_row(task)}
    assert len(found) == 20  # the same last question in every one
    row = found["Hello.\nYes?\nWhat is 7?\nIt is 7.\nSure?"]
    assert (row.question, row.reference, row.context) == ("Sure?", "yes", "Be brief.")
    assert row.earlier == (("Hello.", "Yes?"), ("What is 7?", "It is 7."))
    assert row.id == hash_text("hello. yes? what is 7? it is 7. sure?")[:16]


def test_without_a_last_response_the_reference_has_its_own_column(tmp_path):
    rows = [{"chat": talk(f"What is {n}?"), "a": f"{n}"} for n in range(20)]
    task = qa(written(tmp_path / "rows.jsonl", rows), messages="chat")
    assert {(row.question, row.reference, row.earlier) for row in every_row(task)} == {
        (f"What is {n}?", f"{n}", ()) for n in range(20)
    }


def test_the_system_message_of_a_chat_may_be_the_context_to_internalize(tmp_path):
    rows = [{"chat": talk(f"{n}?", "yes", system=f"Rule {n % 3}.")} for n in range(20)]
    path = written(tmp_path / "rows.jsonl", rows)
    task = qa(path, messages="chat", context="", context_column="chat")
    assert {(row.question, row.context) for row in every_row(task)} == {(f"{n}?", f"Rule {n % 3}.") for n in range(20)}
    with pytest.raises(ValueError, match="line 1: column 'chat': the system message .*; .* set context_column=chat"):
        qa(path, messages="chat")


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "line 3: column 'chat' has no list of messages"),
        ("Hello?", "column 'chat' has no list of messages"),
        (talk("Hello?")[0], "column 'chat' has no list of messages"),
        (["Hello?"], "it has no message with the role user"),
        ([{"role": "assistant", "content": "Hello?"}], "it has no message with the role user"),
        ([*talk("Hello?"), *talk("Hello?")], r"in turn, beginning with user; they are \['user', 'user'\]"),
        ([*talk("Hello?", "Yes?"), {"role": "tool", "content": "4"}], "in turn, beginning with user"),
        (talk("Hello?", "Yes?", " "), "a message has no text"),
        ([{"role": "user", "content": None}], "a message has no text"),
    ],
)
def test_a_chat_that_cannot_be_read_names_the_row_and_what_is_wrong(chat, message, tmp_path):
    rows = [{"chat": talk(f"{n}?"), "a": "yes"} for n in range(20)]
    rows[2]["chat"] = chat
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        qa(path, messages="chat")
    left = qa(path, messages="chat", records=RecordsConfig(skip=("missing", "not_text")))
    assert sum(left.skipped.values()) == 1 and len(every_row(left)) == 19


def test_a_template_over_any_columns_is_the_context_of_each_row(tmp_path):
    rows = [{"q": f"{n}?", "a": f"{n}", "notes": {"text": f"note {n}"}, "size": n} for n in range(20)]
    template = 'Notes: {notes.text} ({size}). {"json": 1} {}'
    task = qa(written(tmp_path / "rows.jsonl", rows), context="", context_template=template)
    assert {(row.question, row.context) for row in every_row(task)} == {
        (f"{n}?", f'Notes: note {n} ({n}). {{"json": 1}} {{}}') for n in range(20)
    }


@pytest.mark.parametrize("chats", [False, True])
def test_a_template_with_the_question_is_the_teachers_turn_in_its_place(tmp_path, chats):
    rows = [{"q": f"{n}?", "a": f"{n}"} for n in range(20)]
    if chats:
        rows = [{"chat": talk("Hi {a}.", "Yes?", f"{n}?", f"{n}")} for n in range(20)]
    template = "Asked: {q} Right: {a}"
    task = qa(
        written(tmp_path / "rows.jsonl", rows), context="", context_template=template, messages="chat" if chats else ""
    )
    before = talk("Hi {a}.", "Yes?") if chats else []
    for row in every_row(task):
        n = row.reference
        assert row.question == f"{n}?"
        assert build_messages(row, "system") == [*before, {"role": "user", "content": f"Asked: {n}? Right: {n}"}]
        assert build_messages(row._replace(context=None), "system")[-1]["content"] == f"{n}?"
        other = build_messages(row._replace(context="Other."), "system")
        assert other == [{"role": "system", "content": "Other."}, *before, {"role": "user", "content": f"{n}?"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_template": "Just think."}, "qa_jsonl.context_template = 'Just think.' names no column in braces"),
        ({"context_template": "{nothing}"}, "line 1: no text in column 'nothing'; its columns are"),
        ({"context_template": "{list}"}, "line 1: no text in column 'list', but list"),
        ({"context_template": "{q}", "context": "c"}, "qa_jsonl.context and qa_jsonl.context_template are both set"),
        ({"context_template": "{q}", "teacher_messages": "chat"}, "context_template and qa_jsonl.teacher_messages are"),
    ],
)
def test_a_template_that_cannot_be_filled_names_the_row_and_the_column(tmp_path, changes, message):
    path = written(tmp_path / "rows.jsonl", [{"q": f"{n}?", "a": "1", "list": [1]} for n in range(20)])
    with pytest.raises(ValueError, match=message):
        qa(path, **({"context": ""} | changes))


@pytest.mark.parametrize("ends", [[], ["yes"]])
def test_the_teacher_may_read_a_chat_of_its_own(tmp_path, ends):
    rows = [
        {
            "student": talk(f"{n}?", "yes"),
            "teacher": talk("Example?", "no", f"{n}? Say yes.", *ends, system="Be brief."),
        }
        for n in range(20)
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    task = qa(path, context="", messages="student", teacher_messages="teacher")
    for row in every_row(task):
        bare = row._replace(context=None)
        assert build_messages(bare, "user") == talk(row.question)
        wanted = talk("Example?", "no", f"{row.question} Say yes.", system="Be brief.")
        assert build_messages(row, "user") == wanted
        assert json.loads(json.dumps(row.context)) == row.context  # as files of a run hold it
        assert describe_context(row.context) == (
            f"system: Be brief.\n\nuser: Example?\n\nassistant: no\n\nuser: {row.question} Say yes."
        )


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "line 3: column 'teacher' has no list of messages"),
        (talk(system="Be brief."), "it has no message with the role user"),
        ([*talk("Hello?"), *talk("Hello?")], r"in turn, beginning with user; they are \['user', 'user'\]"),
        (talk("Hello?", " ", "Hello?"), "a message has no text"),
        ([{"role": "user", "content": "Hello?"}, {"role": "system", "content": "late"}], "in turn, beginning with us"),
    ],
)
def test_a_teachers_chat_that_cannot_be_read_names_the_row(tmp_path, chat, message):
    rows = [{"q": f"{n}?", "a": "yes", "teacher": talk(f"{n}? Say yes.")} for n in range(20)]
    rows[2]["teacher"] = chat
    with pytest.raises(ValueError, match=message):
        qa(written(tmp_path / "rows.jsonl", rows), context="", teacher_messages="teacher")


def test_rows_may_be_files_of_the_hub_and_a_pattern(tmp_path, monkeypatch):
    for part in range(2):
        rows = [{"q": f"{n}?", "a": f"{n}"} for n in range(10 * part, 10 * part + 10)]
        written(tmp_path / f"train-{part}.jsonl", rows)
    calls = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **options: calls.append((name, options)) or str(tmp_path)
    )
    task = qa("org/name@v1:train-*")
    assert {row.question for row in every_row(task)} == {f"{n}?" for n in range(20)}
    assert calls == [("org/name", {"repo_type": "dataset", "allow_patterns": ["train-*"], "revision": "v1"})]
    assert [row.id for row in every_row(qa(tmp_path / "train-*"))] == [row.id for row in every_row(task)]
    assert len(every_row(qa(tmp_path / "train-*", limit=6))) == 12  # of each file


def test_rows_of_the_hub_without_a_connection_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="org/name is neither on this machine nor in the Hub's cache, and the"):
        qa("org/name:train-*")
    with pytest.raises(FileNotFoundError, match="of a Hub data set name the files too, such as org/name:data/train"):
        qa("org/name")


def test_a_column_may_hold_the_context(tmp_path):
    rows = [gsm8k(n) | {"note": f"note {n % 3}"} for n in range(40)]
    task = math(written(tmp_path / "rows.jsonl", rows), context="", context_column="note")
    assert {row.context for row in every_row(task)} == {"note 0", "note 1", "note 2"}


def test_a_limit_is_of_the_first_rows_of_each_file(tmp_path):
    for name, first in (("a1", 0), ("a2", 100), ("b", 200)):
        written(tmp_path / f"{name}.jsonl", [gsm8k(n) for n in range(first, first + 40)])
    numbers = [*range(30), *range(100, 130), *range(200, 230)]
    task = math(tmp_path / "a*.jsonl", test_path=str(tmp_path / "b.jsonl"), limit=30)
    assert sorted(int(row.question.split()[2]) for row in every_row(task)) == numbers
    assert sorted(int(row.question.split()[2]) for row in task.rows("test")) == numbers[60:]
    rows = [{"q": f"{n}?", "a": "B"} for n in range(40)]
    asked = {row.question for row in every_row(qa(written(tmp_path / "rows.jsonl", rows), limit=30))}
    assert asked == {f"{n}?" for n in range(30)}


def test_splits_go_by_the_question_and_not_by_its_place_or_file(tmp_path):
    rows = [gsm8k(n) for n in range(300)]
    whole = math(written(tmp_path / "a.jsonl", rows))
    sizes = {split: len(whole.rows(split)) for split in splits.SPLITS}
    assert sum(sizes.values()) == 300 and 15 < sizes["dev"] < 50 and 40 < sizes["test"] < 80
    written(tmp_path / "b1.jsonl", rows[:150:-1])
    written(tmp_path / "b2.jsonl", rows[150::-1] + rows[:10])  # ten questions stand there twice
    shuffled = math(tmp_path / "b*.jsonl")
    assert all(shuffled.rows(split) == whole.rows(split) for split in splits.SPLITS)
    assert shuffled.skipped == {"duplicate": 10}
    fewer = math(tmp_path / "a.jsonl", test_questions=5, train_questions=7)
    assert fewer.rows("test") == whole.rows("test")[:5] and fewer.rows("train") == whole.rows("train")[:7]
    assert fewer.facts["rows"] == {"train": 7, "dev": sizes["dev"], "test": 5}


def test_published_test_files_are_the_test_split_and_are_not_trained_on(tmp_path):
    train = written(tmp_path / "train.jsonl", [gsm8k(n) for n in range(100)])
    test = written(tmp_path / "test.jsonl", [gsm8k(n) for n in range(95, 115)])
    task = math(train, test_path=test)
    assert {row.reference for row in task.rows("test")} == {str(n + 1) for n in range(95, 115)}
    assert len(task.rows("train")) + len(task.rows("dev")) == 95 and task.skipped == {"duplicate": 5}
    assert len(task.rows("dev")) < 20


def test_a_question_with_two_answers_is_left_out_and_counted(tmp_path):
    rows = [gsm8k(n) for n in range(40)] + [gsm8k(3) | {"answer": "#### 5"}]
    assert math(written(tmp_path / "rows.jsonl", rows)).skipped == {"conflict": 1}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            math,
            {"exercise": "?", "answer": "#### 1"},
            "no columns question and answer or .*; its columns are .'answer', ",
        ),
        (math, {"question": "?", "answer": "one"}, "column 'answer': 'one' cannot be a reference"),
        (
            math,
            {"question": "?", "answer": "#### seven"},
            "column 'answer': '#### seven' cannot be a reference; give a number",
        ),
        (math, {"question": "", "answer": "#### 1"}, "no text in column 'question'; it is empty"),
        (math, dapo(1) | {"reward_model": {}}, "no reference in column 'reward_model.ground_truth'"),
        (
            math,
            dapo(1) | {"prompt": [{"role": "system", "content": "x"}]},
            "must have one message with the role user; the roles",
        ),
        (math, dapo(1) | {"prompt": ["x"]}, "the roles are .None."),
        (math, dapo(1) | {"prompt": []}, "the roles are .."),
        (math, [1], "its columns are .."),
        (medical, medmcqa(1) | {"cop": -1}, "cop = -1 is not one of 0 to 3"),
        (medical, medmcqa(1) | {"cop": "b"}, "cop = 'b' is not one of 0 to 3"),
        (medical, medmcqa(1) | {"opc": None}, "no text in column 'opc'"),
        (medical, {"question": "?", "answer": "A"}, "no text in column 'opa'"),
        (
            medical,
            {"content": [{"role": "user", "content": "?"}], "answer": "E"},
            "column 'answer': 'E' cannot be a reference; give a letter from A to D",
        ),
        (hints, {"q": "?", "a": "1"}, "no text in column 'h'"),
    ],
)
def test_a_bad_row_is_named_or_left_out_and_counted(task, row, message, tmp_path):
    good = {math: gsm8k, medical: medmcqa, hints: lambda n: {"q": f"{n}", "a": "1", "h": "x"}}[task]
    path = written(tmp_path / "rows.jsonl", [good(0), row, *map(good, range(1, 40))])
    with pytest.raises(ValueError, match=message) as error:
        task(path)
    assert "rows.jsonl, line 2: " in str(error.value) and "--config.records.skip=" in str(error.value)
    skip = ("missing", "not_text", "label")
    left = task(path, records=RecordsConfig(skip=skip))
    assert left.skipped.total() == 1 and len(every_row(left)) == 40


def test_where_all_rows_are_left_out_nothing_is_trained(tmp_path):
    path = written(tmp_path / "rows.jsonl", [medmcqa(n) | {"cop": -1} for n in range(9)])
    with pytest.raises(ValueError, match=r"has no train rows left \(train 0, dev .*\); give more questions"):
        splits.check_splits(medical(path, records=RecordsConfig(skip=("label",))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "data file '' does not exist; set math.path to a file, a pattern"),
        ({"path": "rows.jsonl"}, "data file 'rows.jsonl' does not exist"),
        ({"path": "openai/gsm8k"}, "is no file here; of a Hub data set name the files too, such as openai/gsm8k:data/"),
        ({"test_path": "missing.jsonl"}, "data file 'missing.jsonl' does not exist; set math.test_path"),
        ({"context": "", "context_column": "hint"}, "line 1: no text in column 'hint'; its columns are"),
    ],
)
def test_a_missing_file_or_column_is_named(changes, message, tmp_path):
    path = written(tmp_path / "rows.jsonl", [gsm8k(n) for n in range(40)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        math(**({"path": path} | changes))


def test_a_template_without_a_place_for_the_hint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hints.template = 'Look!' must contain {hint}"):
        hints(tmp_path, template="Look!")


def test_a_hub_data_sets_files_are_fetched_and_read_in_order(tmp_path, monkeypatch):
    (tmp_path / "main").mkdir()
    for shard in range(2):
        rows = [gsm8k(n) for n in range(20 * shard, 20 * shard + 20)]
        written(tmp_path / "main" / f"train-{shard:05}-of-00002.parquet", rows)
    calls = []

    def fetch(name, **options):
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    task = math("openai/gsm8k@v1:main/train-*")
    assert len(every_row(task)) == 40
    assert calls == [("openai/gsm8k", {"repo_type": "dataset", "allow_patterns": ["main/train-*"], "revision": "v1"})]
    with pytest.raises(FileNotFoundError, match="the Hub data set openai/gsm8k has no file 'dev-.*'"):
        math("openai/gsm8k:dev-*")


def test_offline_a_data_set_that_is_not_here_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="data set openai/gsm8k is neither on this machine nor in the Hub's cache"
    ):
        math("openai/gsm8k:main/train-*")


def test_gsm8k_as_published():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not here")
    task = math(GSM8K / "gsm8k_train.jsonl", test_path=str(GSM8K / "gsm8k_test.jsonl"))
    assert len(every_row(task)) + task.skipped.total() == 7473 + 1319 and len(task.rows("test")) == 1319
    splits.check_splits(task)


def other_row(context: int, question: int) -> dict:
    return {"q": f"Under {context}: {question}?", "a": f"{context} {question}", "context": f"Note {context}."}


def qa_with_rows(tmp_path, rows: list, **changes) -> QaJsonl:
    path = written(tmp_path / "rows.jsonl", [{"q": f"{n}?", "a": f"answer {n}"} for n in range(30)])
    return qa(path, other_rows=written(tmp_path / "others.jsonl", rows), **changes)


def test_rows_under_other_contexts_are_split_by_context_and_keep_their_references(tmp_path):
    task = qa_with_rows(tmp_path, [other_row(c, q) for q in range(3) for c in range(8)], other_contexts_file="builtin")
    contexts = {split: task.other_contexts(split) for split in splits.SPLITS}
    assert contexts == {
        "train": ["Note 0.", "Note 2.", "Note 4.", "Note 6."], "dev": ["Note 3."],
        "test": ["Note 1.", "Note 5.", "Note 7."],
    }  # fmt: skip
    rows = task.rows("test") * 3
    views = make_evaluation_views(task, rows, "test")
    assert [row.id for row in views["other"]] == [row.id for row in rows]
    assert {(row.context, row.question, row.reference) for row in views["other"]} == {
        (f"Note {c}.", f"Under {c}: {q}?", f"{c} {q}") for c in (1, 5, 7) for q in range(3)
    }
    assert all(task.grade(row.reference, row.reference).correct and row.check is None for row in views["other"])


def test_retention_draws_every_row_under_a_context_to_train_on(tmp_path):
    tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    rows = [{"q": f"#1:{'abcde'[:n]}", "a": "a", "context": f"{c}>b;"} for c in "abcdef" for n in (4, 5)]
    path = written(tmp_path / "rows.jsonl", [{"q": f"#1:{a}{b}", "a": a} for a in "abcdef" for b in "abc"])
    task = qa(path, other_rows=written(tmp_path / "others.jsonl", rows), context="f>a;")
    encoded = encode_rows(tokenizer, task.rows("train"), PromptConfig())
    retention = RetentionRows.build(tokenizer, task, encoded, PromptConfig())
    wanted = [row for context in task.other_contexts("train") for row in task.rows_under(encoded.rows[0], context)]
    assert len(wanted) == 6
    drawn = {tuple(retention.draw(0, index)[0]) for index in range(200)}
    assert drawn == {tuple(tokens) for tokens in prompts.encode(tokenizer, wanted, PromptConfig())}
    assert retention.shape.longest == max(map(len, drawn)) > max(map(len, encoded.bare))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": ""}, "others.jsonl, line 2: no text in column 'context'; it is empty"),
        ({"q": 7}, "others.jsonl, line 2: no text in column 'q', but int 7"),
        ({"a": None}, "others.jsonl, line 2: no reference in column 'a'"),
        ({"a": "  "}, "others.jsonl, line 2: no reference in column 'a'"),
        ({"context": " Think. "}, "others.jsonl, line 2: this is the context to internalize; remove it"),
        ({"q": "Under 0: 0?", "context": "Note 0."}, "others.jsonl, line 2: the same as line 1, with another answer"),
    ],
)
def test_a_bad_row_under_another_context_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        qa_with_rows(tmp_path, [other_row(0, 0), other_row(1, 1) | change, *(other_row(c, 0) for c in range(2, 9))])


def test_rows_under_too_few_contexts_or_beside_a_pool_are_refused(tmp_path):
    with pytest.raises(ValueError, match="others.jsonl has rows under 3 contexts: too few .* qa_jsonl.other_rows"):
        qa_with_rows(tmp_path, [other_row(c, q) for c in range(3) for q in range(3)])
    with pytest.raises(ValueError, match="qa_jsonl.other_rows and qa_jsonl.other_contexts_file are both set"):
        qa_with_rows(tmp_path, [other_row(c, 0) for c in range(8)], other_contexts_file="mine.jsonl")
    with pytest.raises(FileNotFoundError, match="data file 'none.jsonl' does not exist; set qa_jsonl.other_rows"):
        qa(tmp_path / "rows.jsonl", other_rows="none.jsonl")
