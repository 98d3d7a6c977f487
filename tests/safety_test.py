"""The safety task: three published layouts pooled, their splits and labels, and files that are not as published."""

from collections import Counter
from pathlib import Path

import pytest

from ctxjax.data import safety_sets, splits
from ctxjax.data.records import Reader, RecordsConfig
from ctxjax.data.tasks.safety import FORMAT, QUESTIONS, Safety, SafetyConfig

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"
HATECHECK = ",functionality,case_id,test_case,label_gold,templ_id\n"


def task(path: Path, **changes) -> Safety:
    settings = {
        "path": str(path), "sets": ("tweeteval", "hatecheck", "ethos"), "ask_format": True, "train_questions": 0,
        "dev_questions": 0, "test_questions": 0, "context": "Weigh your words.", "context_file": "",
        "context_files": (), "context_seed": 0, "other_contexts_file": "builtin",
    }  # fmt: skip
    return Safety(SafetyConfig(**(settings | changes)))


@pytest.fixture
def folder(tmp_path):
    """Forty tweets, sixty templates of two test cases, and sixty comments, in the published layouts."""
    (tmp_path / "offensive").mkdir()
    for split, count in (("train", 20), ("val", 10), ("test", 10)):
        tweets = [f"tweet {split} {n}\u2028 on one line " for n in range(count)]
        (tmp_path / "offensive" / f"{split}_text.txt").write_text("\n".join(tweets) + "\n", encoding="utf-8")
        (tmp_path / "offensive" / f"{split}_labels.txt").write_text("\n".join(str(n % 2) for n in range(count)) + "\n")
    cases = [(n, who) for n in range(60) for who in ("women", "men")]
    lines = [
        f'{i},f{n},{i},"I like {who}, {n}",{("hateful", "non-hateful")[n % 2]},{n}\n'
        for i, (n, who) in enumerate(cases)
    ]
    (tmp_path / "test_suite_cases.csv").write_text(HATECHECK + "".join(lines))
    comments = [f'"comment; with ""marks"" {n}";{(0.0, 0.5, 0.4999, 1.0)[n % 4]}\n' for n in range(60)]
    (tmp_path / "Ethos_Dataset_Binary.csv").write_text("comment;isHate\n" + "".join(comments))
    return tmp_path


def test_every_published_layout_is_read(folder):
    reader = Reader(RecordsConfig())
    examples = safety_sets.read_examples(folder, reader=reader)
    assert Counter(example.set for example in examples) == {"tweeteval": 40, "hatecheck": 120, "ethos": 60}
    by_id = {example.id: example for example in examples}
    assert by_id["tweeteval-val-3"] == (
        "tweeteval-val-3", "tweeteval", "dev", "tweet val 3\u2028 on one line", True, "",
    )  # fmt: skip
    assert by_id["hatecheck-3"][3:] == ("I like men, 1", False, "hatecheck 1")
    assert [by_id[f"ethos-{n}"].harmful for n in range(4)] == [False, True, False, True]
    assert by_id["ethos-2"].text == 'comment; with "marks" 2'
    assert len(reader.digests) == 8


def test_splits_are_the_publishers_or_by_hash_and_keep_a_template_together(folder):
    splits_of = {}
    for split in splits.SPLITS:
        for row in task(folder).rows(split):
            name, *rest = row.id.split("-")
            if name == "tweeteval":
                assert {"train": "train", "val": "dev", "test": "test"}[rest[0]] == split
            elif name == "hatecheck":
                splits_of.setdefault(int(rest[0]) // 2, set()).add(split)
    assert all(len(found) == 1 for found in splits_of.values())
    assert {split for found in splits_of.values() for split in found} == set(splits.SPLITS)


def test_texts_of_one_template_are_one_group_and_others_are_in_none(folder):
    asked = task(folder)
    groups = {}
    for row in asked.rows("train"):
        groups.setdefault(asked.group(row), []).append(row.id)
    assert all(name.startswith("hatecheck") for names in (own for g, own in groups.items() if g) for name in names)
    assert not any(name.startswith("hatecheck") for name in groups[""]) and len(groups) > 20


def test_a_row_asks_its_sets_question_and_for_the_format_unless_told_not_to(folder):
    row = next(row for row in task(folder).rows("train") if row.id.startswith("ethos"))
    assert row.question.startswith(QUESTIONS["ethos"]) and row.question.endswith(FORMAT)
    assert row.context == "Weigh your words." and row.reference in ("yes", "no")
    bare = next(r for r in task(folder, ask_format=False).rows("train") if r.id == row.id)
    assert "<answer>" not in bare.question


def test_a_text_that_stands_twice_is_asked_once_and_never_trained_on_where_it_is_tested(folder):
    for split, text in (("train", "tweet  TEST 3\u2028 on one line"), ("val", "tweet train 1\u2028 on one line")):
        for kind, line in (("text", text), ("labels", "0")):
            with (folder / "offensive" / f"{split}_{kind}.txt").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
    pooled = task(folder)
    assert pooled.skipped == {"conflict": 2}
    ids = {split: {row.id for row in pooled.rows(split)} for split in splits.SPLITS}
    assert "tweeteval-test-3" in ids["test"] and "tweeteval-val-10" in ids["dev"]
    assert not {"tweeteval-train-20", "tweeteval-train-1"} & ids["train"]


def test_limits_take_a_mixture_of_the_sets_and_do_not_move_rows_between_splits(folder):
    whole, few = task(folder), task(folder, test_questions=15, train_questions=30)
    assert len(few.rows("test")) == 15 and len(few.rows("train")) == 30
    assert few.rows("test") == whole.rows("test")[:15]
    assert {row.id.split("-")[0] for row in few.rows("train")} == {"tweeteval", "hatecheck", "ethos"}


def test_one_set_alone_needs_no_other_sets_files(folder):
    (folder / "test_suite_cases.csv").unlink()
    assert {row.id.split("-")[0] for row in task(folder, sets=("ethos",)).rows("train")} == {"ethos"}


def _replace(name: str, old: str, new: str):
    def change(folder: Path):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "offensive/val_text.txt").unlink(),
            "has no tweeteval val text file .offensive/val_text.txt or",
        ),
        (
            lambda f: (f / "Ethos_Dataset_Binary.csv").unlink(),
            "has no ethos file .*or leave the set out of safety.sets",
        ),
        (
            _replace("offensive/test_labels.txt", "1\n", ""),
            "test_text.txt has 10 lines, .*test_labels.txt 9; these must",
        ),
        (_replace("offensive/val_labels.txt", "1\n", "2\n"), "val_labels.txt, line 2: label '2' is not 0 or 1"),
        (_replace("test_suite_cases.csv", ",non-hateful,", ",unsure,"), "line 4: label 'unsure' is not hateful or"),
        (
            _replace("test_suite_cases.csv", "label_gold", "label"),
            "line 2: no text in column 'label_gold'",
        ),
        (_replace("Ethos_Dataset_Binary.csv", ";0.5", ";high"), "line 3: isHate 'high' is not a share from 0 to 1"),
        (_replace("Ethos_Dataset_Binary.csv", ";0.5", ";7"), "line 3: isHate '7' is not a share from 0 to 1"),
        (_replace("Ethos_Dataset_Binary.csv", ";0.5", ""), "line 3: not valid CSV: 1 fields, but the header names 2"),
        (_replace("Ethos_Dataset_Binary.csv", "comment;isHate", "comment,isHate"), "line 2: not valid CSV"),
        (
            _replace("offensive/val_text.txt", "tweet val 4\u2028 on one line", ""),
            "val_text.txt, line 5: not a text; it is empty",
        ),
        (lambda f: (f / "offensive/val_text.txt").write_bytes(b"\xff\n" * 10), "val_text.txt, line 1: not UTF-8 text"),
        (_replace("test_suite_cases.csv", "\n1,f0,1,", "\n1,f0,0,"), "row id 'hatecheck-0' occurs twice in"),
    ],
)
def test_files_that_are_not_as_published_are_named(folder, change, message):
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        splits.check_splits(task(folder))


def test_an_unknown_label_is_left_out_and_counted_where_that_is_configured(folder):
    _replace("offensive/val_labels.txt", "1\n", "2\n")(folder)
    _replace("test_suite_cases.csv", ",non-hateful,", ",unsure,")(folder)
    _replace("Ethos_Dataset_Binary.csv", ";0.5", ";7")(folder)
    pooled = task(folder, records=RecordsConfig(skip=("label",)))
    assert pooled.skipped == {"label": 3} and sum(pooled.facts["rows"].values()) == 40 + 120 + 60 - 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "safety.path = 'nowhere' is not a folder"),
        ({"sets": ("olid",)}, "safety.sets = 'olid' is not known; choose from ethos, hatecheck, tweeteval"),
        ({"sets": ()}, "has no train rows left"),
    ],
)
def test_settings_that_leave_nothing_to_ask_are_refused(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        splits.check_splits(task(**({"path": folder} | changes)))


def test_label_counts_are_the_published_ones():
    """TweetEval (Barbieri et al. 2020): 11,916 / 1,324 / 860; HateCheck (Röttger et al. 2021): 2,563 hateful of
    3,728 cases; Ethos (Mollas et al. 2022): 433 hateful of 998 comments."""
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is not here")
    examples = safety_sets.read_examples(PUBLISHED)
    tweets = Counter((e.split, e.harmful) for e in examples if e.set == "tweeteval")
    assert tweets == {
        ("train", False): 7975, ("train", True): 3941, ("dev", False): 865, ("dev", True): 459, ("test", False): 620,
        ("test", True): 240,
    }  # fmt: skip
    others = Counter((e.set, e.harmful) for e in examples if e.set != "tweeteval")
    assert others == {
        ("hatecheck", True): 2563, ("hatecheck", False): 1165, ("ethos", True): 433, ("ethos", False): 565,
    }  # fmt: skip
    pooled = task(PUBLISHED)
    splits.check_splits(pooled)
    rows = sum(pooled.facts["rows"].values())
    assert pooled.skipped == {"duplicate": 66, "conflict": 10}
    assert rows + 76 == 11916 + 1324 + 860 + 3728 + 998
