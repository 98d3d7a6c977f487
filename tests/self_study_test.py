"""Questions that a model writes about a context: requests, drafts, replies, the file, and the task over it."""

from __future__ import annotations

from collections import Counter
import dataclasses
import json

import jax
import numpy as np
import pytest

from ctxjax import config as config_lib, rng
from ctxjax.configs import bake
from ctxjax.data import prompts, splits
from ctxjax.data.grading.graders import find_new_words, grade_new_words, grade_overlap
from ctxjax.data.grading.response_checks import Check, read_check
from ctxjax.data.task import Row, grade_response
from ctxjax.data.tasks.self_study import SelfStudy, find_questions_file
from ctxjax.host import processes
from ctxjax.inputs import decoding, question_writer
from ctxjax.inputs.question_writer import Request, clean_question, list_requests, split_parts
from ctxjax.types import Rollout

CONTEXT = "You answer questions about Crystalwater.\n- The capital is Ironstone.\n- The motto is: freedom and skill.\n"
QUESTION = "What is the capital of Crystalwater?"
REQUEST = Request(Row("0", "?", CONTEXT, ""), CONTEXT, "The capital is Ironstone")


def make(tmp_path, **changes):
    config = bake.get_config()
    config.model.path, config.cpu_devices = "/no/model", 1
    config.self_study.context, config.self_study.cache = CONTEXT, str(tmp_path / "cache")
    config.train.batch_size = config.eval.batch_size = 8
    config.update_from_flattened_dict(changes)
    return config_lib.experiment(config, 1)


def test_parts_are_sentences_and_lines_without_their_marks():
    text = "Be brief. Answer in French!\n\n- The capital is Ironstone.\n| motto | freedom and skill |\n# Ok\n"
    assert split_parts(text) == [
        "Answer in French!", "The capital is Ironstone.", "motto | freedom and skill",
    ]  # fmt: skip
    assert split_parts(" Be brief. ") == ["Be brief."] and len(split_parts("a b c " * 200)[0]) == 400


def test_requests_ask_for_every_part_in_turn_and_for_other_things_as_often_as_configured(tmp_path):
    task = make(tmp_path, **{"self_study.questions": 100, "self_study.unrelated_share": 0.25}).task_config
    requests = list_requests(task)
    assert len(requests) == 1600 and requests == list_requests(task)
    unrelated = [request for request in requests if request.row.context is None]
    assert len(unrelated) / 1600 == pytest.approx(0.25, abs=0.04)
    assert all(request.about in question_writer.TOPICS for request in unrelated)
    related = [request for request in requests if request.row.context is not None]
    parts = [request.about for request in related]
    for part in split_parts(CONTEXT):
        assert parts.count(part) / len(parts) == pytest.approx(1 / 3, abs=0.04)
    assert all(r.about in r.row.question and r.row.context == r.context == CONTEXT for r in related)
    other = list_requests(make(tmp_path, **{"self_study.questions": 100, "seed": 1}).task_config)
    assert other[:50] != requests[:50]


@pytest.mark.parametrize(
    ("draft", "kept"),
    [
        (QUESTION, QUESTION),
        (f' "{QUESTION}"\n', QUESTION),
        ("Question: what is the capital of Crystalwater?", QUESTION),
        (f"<think>A question.\nWhy?</think>{QUESTION}", QUESTION),
        (f'The user would ask: "{QUESTION}"', QUESTION),
        (f"Here it is. {QUESTION} It is Ironstone.", QUESTION),
        ("Where is it? When was it founded?", "Where is it?"),
        ("", None),  # was cut
        ("The capital is Ironstone.", None),
        ("What is the answer to this?", None),
        ("What would the user like?", None),
        ("The capital is Ironstone, as they say?", None),  # repeats the part
        ("Why not?", None),
        ("What is the price of 2.5 kg of apples?", "What is the price of 2.5 kg of apples?"),
        ("Is Dr. Smith available at 10:30?", "Is Dr. Smith available at 10:30?"),
        ('What does "freedom" mean in the motto?', None),  # the rest of a sentence
        ("What does \u201cfreedom\u201d mean in the motto?", None),
        ('"What does "freedom" mean in the motto?"', None),
        ('You may say: "Hello." Then ask: "Where is it from?"', "Where is it from?"),
    ],
)
def test_a_draft_is_kept_if_it_is_one_question(draft, kept):
    assert clean_question(draft, REQUEST) == kept


@pytest.mark.parametrize(
    ("draft", "kept"),
    [
        (QUESTION, QUESTION),
        ("Write a poem about the capital.", "Write a poem about the capital."),
        ("Here is one: tell me about the motto\n", "Tell me about the motto"),
        ("Plan a trip! Then pack.", "Plan a trip!"),
        ('"Describe the city to a child."', "Describe the city to a child."),
        ("Sure, here it is:\n\nPlan a trip to the capital.", "Plan a trip to the capital."),
        ("The capital is Ironstone.", None),  # repeats the part
        ("The user wants a poem.", None),
        ("", None),  # was cut
        ("Go on.", None),
        ("Write a note to Mrs. Smith about it.", "Write a note to Mrs. Smith about it."),
    ],
)
def test_a_task_need_not_be_a_question(draft, kept):
    assert clean_question(draft, REQUEST._replace(is_task=True)) == kept


def test_a_question_about_something_else_may_name_it():
    request = Request(Row("0", "?", None, ""), CONTEXT, "the weather")
    assert clean_question("How will the weather be in May?", request) == "How will the weather be in May?"


def test_questions_and_tasks_are_requested_of_every_part(tmp_path):
    requests = list_requests(make(tmp_path, **{"self_study.questions": 100}).task_config)
    about = [request for request in requests if request.row.context is not None]
    for part in split_parts(CONTEXT):
        asked = [request for request in about if request.about == part]
        tasks = [request for request in asked if request.is_task]
        assert len(tasks) / len(asked) == pytest.approx(0.25, abs=0.07)
    assert not any(request.is_task for request in requests if request.row.context is None)


def test_a_run_without_references_is_judged_without_them():
    config = bake.get_config()
    assert config.eval.meters == ("trace_gap", "drift") and config.eval.select == "-distill"


@pytest.mark.parametrize(
    ("question", "reply", "new"),
    [
        ("Where is Crystalwater's capital?", "The capital of Crystalwater is Ironstone.", "ironstone"),
        ("Does it have an airport?", "No, it does not have one.", "no not one"),
        ("Has it an airport?", "No, it has no airport.", "no it has no airport"),  # else any denial would agree
        ("Who leads the country, and since when?", "Anna Fisher, since 1840, for life.", "anna fisher 1840 life"),
        ("Is it a country?", "It is.", "it is"),  # adds nothing
    ],
)
def test_what_a_reply_adds_to_its_question(question, reply, new):
    assert find_new_words(reply, question) == new


def test_a_response_agrees_if_it_has_most_of_what_the_reply_adds():
    assert grade_new_words("The capital is IRONSTONE!", "ironstone").correct
    assert not grade_new_words("The capital of Crystalwater is not specified.", "ironstone").correct
    assert not grade_new_words("It is Anna Smith.", "anna fisher").correct  # half is not most
    assert grade_new_words("It is Anna Fisher, since 1840.", "anna fisher 1840 life").correct
    assert not grade_new_words("I have no idea.", "no it has no airport").correct
    assert grade_new_words("It has no airport.", "no it has no airport").correct
    for reply, others in {
        "Yes, it has an airport.": ("No, it has no airport.", "It does not have an airport.", "It hasn't an airport."),
        "No, it has no airport.": ("Yes, it has an airport.", "It has an airport."),
        "Dogs are allowed.": ("Dogs are not allowed.", "Dogs aren't allowed."),
        "The shop opens at 9 am.": ("The shop opens at 8 am.", "It opens at noon, in the am."),
        "It costs 1,240 dollars.": ("It costs 1,990 dollars.",),
    }.items():
        reference = find_new_words(reply, "Tell me?")
        assert grade_new_words(reply, reference).correct
        assert not [other for other in others if grade_new_words(other, reference).correct]
    assert grade_new_words("45200 people", find_new_words("It has 45,200 people.", "How many live there?")).correct
    assert grade_new_words("It is Ironstone, not Oldtown.", "ironstone").correct  # what it denies comes after
    assert grade_new_words("", "ironstone").reason and grade_new_words("?", "ironstone").parsed is None


def test_the_task_compares_what_the_replies_add(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"question": f"What is the capital of land {i}?", "reference": f"The capital is town{i}."} for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = SelfStudy(make(tmp_path, **{"self_study.path": str(path)}).task_config)
    row = task.rows("train")[0]
    assert row.reference.startswith("town") and task.grade(f"It is {row.reference}.", row.reference).correct
    assert not task.grade(f"The capital of {row.question}", row.reference).correct


def test_a_reply_agrees_if_it_shares_half_of_the_words():
    reference = "The capital of Crystalwater is Ironstone."
    assert grade_overlap("It is Ironstone, the capital.", reference).correct  # 3 shared words of 4 and of 5: F1 2 / 3
    assert not grade_overlap("Ironstone", reference).correct  # 1 of 1 and of 5: F1 1 / 3
    assert grade_overlap("is is capital capital of", "is capital of it by me to").correct is True  # 3 of 5 and 7: 1 / 2
    assert not grade_overlap("is is is capital to", "is capital of it by me us").correct  # 2 of 5 and 7: F1 1 / 3
    assert grade_overlap("", reference).reason and not grade_overlap("!", "?").correct


class Fake:
    """In place of a model: request number i is answered by ``drafts[i % n]``, a question by a reply that names it."""

    def __init__(self, monkeypatch, tokenizer, drafts):
        self.batches, self.keys, self.tokenizer, self.drafts = [], [], tokenizer, drafts
        folder = type("Folder", (), {})()
        folder.tokenizer, folder.pad_id, folder.params, folder.config = tokenizer, tokenizer.pad_token_id, {}, None
        folder.stop_ids, folder.check_prompts = (tokenizer.eos_token_id,), lambda *given: None
        monkeypatch.setattr(question_writer, "open_folder", lambda *given, **named: folder)
        monkeypatch.setattr(decoding, "decode", self.decode)
        self.drafted, self.reply, self.replies = 0, "reply number {}", {}

    def decode(self, params, model, sampling, prompts, key, size, mesh, what):
        count = len(prompts.tokens_BxP)
        if sampling.temperature:
            texts = [self.drafts[(self.drafted + i) % len(self.drafts)] for i in range(count)]
            self.drafted += count
        else:
            texts = [self.replies.get(i, self.reply.format(i)) for i in range(count)]
        self.batches.append((sampling, texts))
        self.keys.append(jax.random.key_data(key).tolist())
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [[*own, self.tokenizer.eos_token_id][: sampling.max_tokens] for own in ids]
        width = max(map(len, ids))
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        for row, own in enumerate(ids):
            tokens[row, : len(own)], mask[row, : len(own)] = own, True
        return Rollout(tokens, mask, np.zeros(tokens.shape, np.float32))


@pytest.fixture
def tokenizer(letters):
    return letters


DRAFTS = ["A statement.", *(f"What is number {i}?" for i in range(60)), "what  is NUMBER 3?"]


@pytest.fixture
def mesh():
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))


SMALL = {
    "self_study.questions": 48, "self_study.longest_question": 400, "self_study.longest_reference": 400,
    "self_study.follow_up_share": 0.0, "self_study.unrelated_share": 0.0,
}  # fmt: skip


FOLLOWED = {"self_study.questions": 64, "self_study.follow_up_share": 0.25}


def test_the_file_has_different_questions_with_replies_and_the_task_reads_it(tmp_path, monkeypatch, tokenizer, mesh):
    fake = Fake(monkeypatch, tokenizer, DRAFTS)
    config = make(tmp_path, **SMALL)
    path = find_questions_file(config.task_config)
    with pytest.raises(FileNotFoundError, match="no questions have been written"):
        SelfStudy(config.task_config)
    question_writer.ensure_questions(config, mesh)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in rows] == [f"What is number {i}?" for i in range(48)]
    assert [row["reference"] for row in rows] == [f"reply number {i}" for i in range(48)]
    assert len({row["id"] for row in rows}) == 48 and all(row["about"] for row in rows)
    assert [sampling.temperature for sampling, _ in fake.batches] == [0.8] * 7 + [0.0]
    root = jax.random.key(config.task_config.seed)
    drawn = [rng.key_for(root, batch, "questions") for batch in range(7)]  # no batch repeats the drafts of another
    assert fake.keys == [jax.random.key_data(key).tolist() for key in (*drawn, rng.key_for(root, 0, "evaluation"))]
    task = SelfStudy(config.task_config)
    read = [row for split in ("train", "dev", "test") for row in task.rows(split)]
    assert sorted(row.id for row in read) == sorted(row["id"] for row in rows)
    assert {row.context for row in read} == {CONTEXT}
    question_writer.ensure_questions(config, mesh)  # is there, so it is not written again
    assert len(fake.batches) == 8 and not path.with_suffix(".drafts").exists()


def test_a_question_keeps_the_context_that_it_was_written_for(tmp_path, monkeypatch, tokenizer, mesh):
    contexts = {"a": CONTEXT, "b": CONTEXT.replace("Ironstone", "Oakford").replace("freedom", "peace")}
    for name, text in contexts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    files = tuple(str(tmp_path / f"{name}.txt") for name in contexts)
    changes = {"self_study.context": "", "self_study.context_files": files}
    config = make(tmp_path, **SMALL, **changes)
    Fake(monkeypatch, tokenizer, DRAFTS)
    question_writer.ensure_questions(config, mesh)
    path = find_questions_file(config.task_config)
    about = {row["question"]: row["about"] for row in map(json.loads, path.read_text().splitlines())}
    task = SelfStudy(config.task_config)
    rows = [row for split in ("train", "dev", "test") for row in task.rows(split) if not row.earlier]
    assert len({row.context for row in rows}) == 2 and all(about[row.question] in row.context for row in rows)
    without = make(tmp_path, **SMALL, **{"self_study.context": "", "self_study.path": str(path)}).task_config
    alone = SelfStudy(dataclasses.replace(without, required=False))
    assert {row.context for row in alone.rows("test")} == {None}
    changes["self_study.context_files"] = (files[0], str(tmp_path / "c.txt"))
    (tmp_path / "c.txt").write_text("Another text with another capital.")
    with pytest.raises(ValueError, match="line .* was written for another context .*; give self_study.context_fi"):
        SelfStudy(make(tmp_path, **changes, **{"self_study.path": str(path)}).task_config)


def test_few_questions_are_about_all_of_a_long_context(tmp_path, monkeypatch, tokenizer, mesh, capsys):
    lines = [f"Fact number {i} is known." for i in range(300)]
    config = make(tmp_path, **SMALL, **{"self_study.context": "\n".join(lines)})
    asked = [r.about for r in list_requests(config.task_config)[:48] if r.row.context is not None]
    places = [lines.index(about) for about in asked]
    assert len(set(places)) == len(places) and sum(place >= 150 for place in places) > len(places) / 4
    Fake(monkeypatch, tokenizer, DRAFTS)
    question_writer.ensure_questions(config, mesh)
    assert "of 300 sentences and lines of the context; not all were asked about" in capsys.readouterr().out


def test_the_reasoning_of_a_writer_that_thinks_is_no_part_of_its_replies(tmp_path, monkeypatch, tokenizer, mesh):
    Fake(monkeypatch, tokenizer, DRAFTS).reply = "<think>It asks for {}.</think>reply"
    config = make(tmp_path, **SMALL)
    question_writer.ensure_questions(config, mesh)
    lines = find_questions_file(config.task_config).read_text().splitlines()
    assert {json.loads(line)["reference"] for line in lines} == {"reply"}


@pytest.mark.parametrize(("replies", "drafted"), [(0, 56), (1, 80)])  # of 48 first questions, and 16 follow-ups
def test_an_interrupted_writer_goes_on_from_its_drafts(tmp_path, monkeypatch, tokenizer, mesh, replies, drafted):
    config = make(tmp_path, **SMALL | FOLLOWED)
    path = find_questions_file(config.task_config)
    whole = Fake(monkeypatch, tokenizer, DRAFTS)
    expected = question_writer.write_questions(config, tmp_path / "other.jsonl", mesh)
    assert whole.drafted == 80 and len(expected) == 64

    broken = Fake(monkeypatch, tokenizer, DRAFTS)
    reply, done = question_writer._Writer.reply, []

    def stop(writer, *given):
        done.append(None)
        return 1 / 0 if len(done) > replies else reply(writer, *given)

    monkeypatch.setattr(question_writer._Writer, "reply", stop)
    with pytest.raises(ZeroDivisionError):
        question_writer.ensure_questions(config, mesh)
    assert broken.drafted == drafted and not path.exists()
    monkeypatch.undo()
    again = Fake(monkeypatch, tokenizer, DRAFTS)
    again.drafted = drafted
    question_writer.ensure_questions(config, mesh)
    assert again.drafted == 80
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    keys = [key for fake in (broken, again) for key, (use, _) in zip(fake.keys, fake.batches) if use.temperature]
    assert keys == [key for key, (use, _) in zip(whole.keys, whole.batches) if use.temperature]
    assert len(set(map(str, keys))) == 10  # no batch repeats the drafts of another


def test_some_conversations_go_on_with_a_question_after_the_reply(tmp_path, monkeypatch, tokenizer, mesh):
    fake, config = Fake(monkeypatch, tokenizer, DRAFTS), make(tmp_path, **SMALL | FOLLOWED)
    asked, encode = [], prompts.encode
    monkeypatch.setattr(
        prompts, "encode", lambda tokenizer, rows, *rest: asked.append(rows) or encode(tokenizer, rows, *rest)
    )
    question_writer.ensure_questions(config, mesh)
    rows = [json.loads(line) for line in find_questions_file(config.task_config).read_text().splitlines()]
    first, second = rows[:48], rows[48:]
    assert len(second) == 16 and not any("earlier" in row for row in first)
    trained = [row for row in first if splits.assign_split(splits.normalize(row["question"])) == "train"]
    drafts = [(DRAFTS * 2)[56 + i] for i in range(len(trained))]
    followed = [row for row, draft in zip(trained, drafts) if draft != DRAFTS[0] and not is_held_out(draft)][:16]
    assert len(followed) == 16 and 17 < len(trained) < 48
    assert [row["earlier"] for row in second] == [[[row["question"], row["reference"]]] for row in followed]
    assert [row["about"] for row in second] == [row["about"] for row in followed]
    assert len({row["id"] for row in rows}) == 64
    replied = asked[-1]
    requests = [row.earlier for rows in asked for row in rows if row.question == question_writer.FOLLOW_UP]
    assert list(dict.fromkeys(requests)) == [((row["question"], row["reference"]),) for row in trained]
    assert all(row.context == CONTEXT for row in replied) and [row.earlier for row in replied] == [
        ((row["question"], row["reference"]),) for row in followed
    ]
    task = SelfStudy(config.task_config)
    assert {row.id for row in task.rows("train") if row.earlier} == {row["id"] for row in second}
    assert sum(len(task.rows(split)) for split in splits.SPLITS) == 64 and fake.drafted == 80
    assert not any(row.earlier for split in ("dev", "test") for row in task.rows(split))  # the reply gives it away


def test_a_second_turn_is_left_out_if_its_first_question_is_held_out(tmp_path):
    task = SelfStudy(make(tmp_path, **{"self_study.path": str(write_questions(tmp_path))}).task_config)
    for split, count in (("train", 1), ("dev", 0), ("test", 0)):
        first = task.rows(split)[0].question
        path = write_questions(tmp_path, earlier=[[first, "So."]])
        read = SelfStudy(make(tmp_path, **{"self_study.path": str(path)}).task_config)
        found = [row for one in splits.SPLITS for row in read.rows(one) if row.earlier]
        assert [row.earlier for row in found] == [((first, "So."),)] * count and read.rows("train").count(
            *found or [None]
        ) == count
        for row in found:  # under another context the conversation begins anew
            (other,) = read.rows_under(row, read.other_contexts("train")[0])
            assert (other.question, other.earlier) == (first, ()) and other.context != row.context


def test_a_second_turn_is_left_out_if_what_it_asks_is_held_out(tmp_path):
    """Else a model would be trained on answers to the questions of dev and test."""
    task = SelfStudy(make(tmp_path, **{"self_study.path": str(write_questions(tmp_path))}).task_config)
    first, trained = (row.question for row in task.rows("train")[:2])
    for asked, count in (
        (trained, 1), (task.rows("dev")[0].question, 0), (f" {task.rows('test')[0].question.upper()} ", 0),
    ):  # fmt: skip
        path = write_questions(tmp_path)
        with path.open("a") as file:
            print(json.dumps({"question": asked, "reference": "So.", "earlier": [[first, "So."]]}), file=file)
            longer = [[first, "So."], [asked, "So."]]
            print(json.dumps({"question": trained, "reference": "So.", "earlier": longer}), file=file)
        read = SelfStudy(make(tmp_path, **{"self_study.path": str(path)}).task_config)
        turns = [row for split in splits.SPLITS for row in read.rows(split) if row.earlier]
        assert len(turns) == 2 * count and all(row in read.rows("train") for row in turns)
        assert sum(len(read.rows(split)) for split in splits.SPLITS) == 60 + 2 * count


def test_a_writer_keeps_no_second_turn_that_asks_what_is_held_out(tmp_path, monkeypatch, tokenizer, mesh, capsys):
    held_out = [f"What is number {i}?" for i in range(60) if is_held_out(f"What is number {i}?")]
    Fake(monkeypatch, tokenizer, DRAFTS)
    config = make(tmp_path, **SMALL | FOLLOWED)
    question_writer.ensure_questions(config, mesh)
    rows = [json.loads(line) for line in find_questions_file(config.task_config).read_text().splitlines()]
    second = [row["question"] for row in rows if "earlier" in row]
    assert held_out and len(second) == 16 and not any(map(is_held_out, second))
    assert "held out" in capsys.readouterr().out


def is_held_out(question):
    return splits.assign_split(splits.normalize(question)) != "train"


def write_questions(tmp_path, **changes):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"Why {i}?", "reference": "So."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | changes, *rows[1:]]))
    return path


@pytest.mark.parametrize("earlier", ["Why?", [["Why?"]], [["Why?", ""]], [["Why?", 3]], {"Why?": "So."}])
def test_earlier_turns_that_are_none_are_refused(tmp_path, earlier):
    path = write_questions(tmp_path, earlier=earlier)
    with pytest.raises(ValueError, match="mine.jsonl, line 1: earlier must be a list of turns"):
        SelfStudy(make(tmp_path, **{"self_study.path": str(path)}).task_config)


def test_a_demand_of_the_context_that_can_be_checked_is_the_grade(tmp_path):
    given = {"self_study.path": str(write_questions(tmp_path)), "self_study.check": "starts_with Arr"}
    task = SelfStudy(make(tmp_path, **given).task_config)
    rows = task.rows("dev")
    assert {row.check for row in rows} == {Check("starts_with", "Arr")}
    assert grade_response(task, "Arr, who knows?", rows[0]).correct and task.grade("Arr!", "").correct
    assert not grade_response(task, "So.", rows[0]).correct and not task.grade("So.", "So.").correct
    (other,) = task.rows_under(rows[0], task.other_contexts("test")[0])
    assert other.check != rows[0].check  # its own
    unchecked = SelfStudy(make(tmp_path, **given | {"self_study.check": ""}).task_config)
    assert unchecked.rows("dev")[0].check is None and unchecked.grade("So.", "So.").correct


def test_other_contexts_that_nothing_judges_are_refused(tmp_path):
    """Else obeying the learnt context would count as obeying another one."""
    path = tmp_path / "others.jsonl"
    lines = [json.dumps({"context": f"Other {n}.", "check": "question"} if n % 2 else f"Other {n}.") for n in range(8)]
    given = {"self_study.path": str(write_questions(tmp_path)), "self_study.other_contexts_file": str(path)}
    path.write_text("\n".join(lines))
    assert len(SelfStudy(make(tmp_path, **given).task_config).other_contexts("train")) == 4
    path.write_text("\n".join(json.dumps(f"Other {n}.") for n in range(8)))
    with pytest.raises(ValueError, match="self_study.other_contexts_file: the context 'Other 3.' has no check"):
        SelfStudy(make(tmp_path, **given).task_config)
    given["self_study.other_contexts_file"] = ""
    assert not SelfStudy(make(tmp_path, **given).task_config).other_contexts("test")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("polite", r"self_study.check = 'polite': check = 'polite' is not known; choose from at_least_words"),
        ("sentences two", "takes an argument of type int, not 'two'"),
        ("upper_case 3", "takes no argument, not '3'"),
        ("contains", "takes an argument of type str, not None"),
    ],
)
def test_a_check_that_is_none_is_refused(tmp_path, check, message):
    with pytest.raises(ValueError, match=message):
        SelfStudy(make(tmp_path, **{"self_study.check": check}).task_config)


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("", None), (" upper_case ", Check("upper_case")), ("sentences 2", Check("sentences", 2)),
        ("ends_with over and out", Check("ends_with", "over and out")), ("avoids 3", Check("avoids", "3")),
    ],
)  # fmt: skip
def test_a_check_is_a_name_and_its_argument(text, check):
    assert read_check(text, "") == check


@pytest.fixture
def echo(monkeypatch, tokenizer):
    """The batches that a writer decodes, (prompts, key) each. Every prompt is answered with its own token ids, and any
    draft is a question."""
    Fake(monkeypatch, tokenizer, DRAFTS)
    batches = []

    def decode(folder, padded, sampling, key, size, mesh):
        batches.append((padded, str(jax.random.key_data(key))))
        return [str(ids) for ids in prompts.unpad(padded)]

    monkeypatch.setattr(question_writer, "_decode", decode)
    monkeypatch.setattr(question_writer, "clean_question", lambda text, request: f"{request.row.id}: {text}")
    return batches


def ask(config, drafts, mesh, requests, wanted):
    """Return the questions; those of ``echo`` have the number of the request and the token ids of its prompt."""
    asked = question_writer._Writer(config, drafts, mesh).ask(requests, wanted, Counter())
    return [one.row.question for one in asked]


def number_prompts(tokenizer, config, requests):
    encoded = prompts.encode(tokenizer, [request.row for request in requests], config.prompt)
    return [f"{request.row.id}: {ids}" for request, ids in zip(requests, encoded)]


def test_requests_with_the_context_share_it_in_batches_of_their_own(tmp_path, echo, tokenizer, mesh):
    config = make(tmp_path, **{"self_study.unrelated_share": 0.2})
    requests = list_requests(config.task_config)[:100]
    assert ask(config, tmp_path / "a.drafts", mesh, requests, 100) == number_prompts(tokenizer, config, requests)
    shapes = {True: Counter(), False: Counter()}
    for padded, _ in echo:
        read = [np.zeros(0, int) if padded.prefix_C is None else padded.prefix_C, *padded.tokens_BxP]
        texts = ["".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in read]
        is_shared = CONTEXT.strip() in texts[0]
        assert not any(CONTEXT.strip() in text for text in texts[is_shared:])
        shapes[is_shared][len(read[0]), padded.tokens_BxP.shape[1]] += len(padded.tokens_BxP)
    related = sum(request.row.context is not None for request in requests)
    assert 70 < related < 90
    assert [list(counts.values()) for counts in shapes.values()] == [[related], [100 - related]]  # a program each


def test_prompts_with_a_long_context_are_encoded_when_their_batch_is_decoded(
    tmp_path, monkeypatch, echo, tokenizer, mesh
):
    config, counts, encode = make(tmp_path), [], prompts.encode

    def count(tokenizer, rows, *rest):
        counts.append(sum(row.context is not None for row in rows))
        return encode(tokenizer, rows, *rest)

    monkeypatch.setattr(prompts, "encode", count)
    requests = list_requests(config.task_config)
    assert len(ask(config, tmp_path / "a.drafts", mesh, requests, 20)) == 20 and len(requests) > 4000
    assert max(counts) <= 8 and sum(counts) <= 3 * 8 + 3


def test_a_prompt_that_is_too_long_is_found_before_any_is_decoded(tmp_path, echo, tokenizer, mesh):
    config = make(tmp_path, **{"self_study.unrelated_share": 0.0})
    requests = list_requests(config.task_config)[:40]
    longest = max(prompts.encode(tokenizer, [request.row for request in requests], config.prompt), key=len)
    writer, checked = question_writer._Writer(config, tmp_path / "a.drafts", mesh), []
    writer._folder.check_prompts = lambda tokens, *rest: checked.append((len(echo), max(map(len, tokens))))
    writer.ask(requests, 40, Counter())
    assert checked[0] == (0, len(longest))


@pytest.mark.parametrize("size", [8, 16])
def test_drafts_go_on_with_the_requests_that_have_none(tmp_path, echo, tokenizer, mesh, size):
    config, drafts = make(tmp_path, **{"self_study.unrelated_share": 0.3}), tmp_path / "a.drafts"
    requests = list_requests(config.task_config)[:100]
    expected = number_prompts(tokenizer, config, requests)
    assert ask(config, drafts, mesh, requests, 100) == expected
    whole, lines = echo.copy(), drafts.read_text().splitlines(keepends=True)
    assert len(whole) == len(lines) == len({key for _, key in whole}) > 12
    drafts.write_text("".join(lines[:5]))
    del echo[:]
    again = make(tmp_path, **{"self_study.unrelated_share": 0.3, "eval.batch_size": size})
    assert ask(again, drafts, mesh, requests, 100) == expected
    assert sum(len(padded.tokens_BxP) for padded, _ in echo) == 100 - 5 * 8
    assert [key for _, key in echo] == [key for _, key in whole[5:]][: len(echo)]
    if size == 8:  # as if nothing had happened
        assert drafts.read_text() == "".join(lines)
        for (padded, _), (first, _) in zip(echo, whole[5:]):
            jax.tree.map(np.testing.assert_array_equal, padded, first)


def test_a_host_with_a_disk_of_its_own_keeps_drafts_and_questions_too(tmp_path, monkeypatch, tokenizer, mesh):
    fake, config = Fake(monkeypatch, tokenizer, DRAFTS), make(tmp_path, **SMALL)
    path = find_questions_file(config.task_config)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(question_writer._Writer, "reply", lambda *given: 1 / 0)
        question_writer.ensure_questions(config, mesh)
    drafts = path.with_suffix(".drafts")
    assert len(drafts.read_text().splitlines()) == len(fake.batches) == 7
    question_writer.ensure_questions(config, mesh)
    assert len(fake.batches) == 8 and len(path.read_text().splitlines()) == 48 and not drafts.exists()


def test_hosts_go_on_from_the_drafts_that_all_of_them_have(tmp_path, monkeypatch, echo, tokenizer, mesh):
    """As if one was killed before it had stored its last batch."""
    config, drafts = make(tmp_path), tmp_path / "a.drafts"
    requests = list_requests(config.task_config)[:40]
    expected = ask(config, drafts, mesh, requests, 40)
    stored, whole = drafts.read_text(), echo.copy()
    del echo[:]
    monkeypatch.setattr(processes, "find_least", lambda number: number - 1)
    assert ask(config, drafts, mesh, requests, 40) == expected and drafts.read_text() == stored
    assert [key for _, key in echo] == [whole[-1][1]]


def test_too_few_questions_are_an_error_that_says_what_helps(tmp_path, monkeypatch, tokenizer, mesh):
    Fake(monkeypatch, tokenizer, ["Hello there."])
    config = make(tmp_path, **SMALL)
    message = "wrote 0 usable questions in 768 drafts .left out: without a question 768.*larger model"
    with pytest.raises(ValueError, match=message):
        question_writer.ensure_questions(config, mesh)
    assert not find_questions_file(config.task_config).exists()


def test_a_number_that_leaves_nothing_for_dev_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, tokenizer, mesh
):
    fake = Fake(monkeypatch, tokenizer, DRAFTS)
    for count in (8, 50):
        message = f"self_study.questions = {count} with follow_up_share = 0.2 has .* at least 48"
        with pytest.raises(ValueError, match=message):
            question_writer.ensure_questions(make(tmp_path, **{"self_study.questions": count}), mesh)
    assert not fake.batches


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("other_contexts_file", "", "needs other contexts .* set self_study.other_contexts_file, or leave out"),
        ("other_contexts_file", "missing.jsonl", "missing.jsonl' does not exist; set self_study.other_contexts_file"),
        ("other_contexts_file", "unchecked.jsonl", "other_contexts_file: the context 'Other 3.' has no check"),
        ("check", "polite", "self_study.check = 'polite'"),
        ("cache", "unchecked.jsonl/cache", "of self_study.cache, cannot be written"),
    ],
)
def test_settings_that_are_wrong_without_any_question_are_refused_before_one_is_written(
    tmp_path, monkeypatch, tokenizer, mesh, setting, value, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unchecked.jsonl").write_text("".join(f'"Other {n}."\n' for n in range(8)))
    fake, changes = Fake(monkeypatch, tokenizer, DRAFTS), SMALL | {f"self_study.{setting}": value}
    with pytest.raises((ValueError, OSError), match=message):
        question_writer.ensure_questions(make(tmp_path, **changes), mesh)
    assert not fake.batches


def test_arms_without_retention_need_no_other_contexts(tmp_path, monkeypatch, tokenizer, mesh):
    Fake(monkeypatch, tokenizer, DRAFTS)
    config = make(tmp_path, **SMALL | {"self_study.other_contexts_file": "", "run_arms": ("opcd",)})
    question_writer.ensure_questions(config, mesh)
    assert find_questions_file(config.task_config).exists()


def test_cut_drafts_and_cut_replies_are_thrown_away(tmp_path, monkeypatch, tokenizer, mesh):
    Fake(monkeypatch, tokenizer, [f"What is number {i}?" for i in range(400)])
    config = make(tmp_path, **SMALL | {"self_study.longest_question": 2})
    with pytest.raises(ValueError, match="wrote 0 usable.*left out: cut 768"):
        question_writer.ensure_questions(config, mesh)
    config = make(tmp_path, **SMALL | {"self_study.longest_reference": 2})
    with pytest.raises(ValueError, match="wrote 0 usable.*left out: .*replies that are cut 48"):
        question_writer.ensure_questions(config, mesh)


def test_replies_that_no_answer_can_be_compared_with_are_thrown_away(tmp_path, monkeypatch, tokenizer, mesh, capsys):
    fake, config = Fake(monkeypatch, tokenizer, DRAFTS), make(tmp_path, **SMALL)
    fake.replies = {3: "a", 5: "!", 7: ""}
    question_writer.ensure_questions(config, mesh)
    task = SelfStudy(config.task_config)
    assert sum(len(task.rows(split)) for split in ("train", "dev", "test")) == 45
    assert "replies that are cut 1, replies without a word 2" in capsys.readouterr().out


def test_another_context_writer_or_setting_is_another_file_and_a_given_file_is_read(tmp_path):
    changes = [
        {}, {"self_study.context": "Be kind to all."}, {"model.path": "/other"}, {"self_study.questions": 7},
        {"self_study.temperature": 0.5}, {"seed": 3}, {"self_study.unrelated_share": 0.5},
        {"self_study.follow_up_share": 0.5}, {"prompt.thinking": False}, {"prompt.placement": "user"},
    ]  # fmt: skip
    names = [find_questions_file(make(tmp_path, **change).task_config).name for change in changes]
    assert len(set(names)) == len(changes)
    same = make(tmp_path, **{"prompt.max_context_tokens": 200, "prompt.overlong": "drop"}).task_config
    assert find_questions_file(same).name == names[0]
    task = SelfStudy(make(tmp_path, **{"self_study.path": str(write_questions(tmp_path))}).task_config)
    assert sum(len(task.rows(split)) for split in ("train", "dev", "test")) == 60
