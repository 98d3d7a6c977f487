"""Offensive and hateful language: TweetEval offensive, HateCheck and Ethos pooled, answered yes or no.

The files are those that their authors publish:

    tweeteval   datasets/offensive of cardiffnlp/tweeteval: {train,val,test}_{text,labels}.txt, 1 = offensive
    hatecheck   test_suite_cases.csv of paul-rottger/hatecheck-data: test_case, label_gold, templ_id
    ethos       Ethos_Dataset_Binary.csv of intelligence-csd-auth-gr: comment;isHate, hateful from 0.5 on

TweetEval keeps its publishers' splits. The others have none: a hash decides, of HateCheck's template, so that no test
case is a training case with another group's name in it, and of Ethos's comment.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctxjax.data import splits
from ctxjax.data.contexts import ContextConfig, Contexts, OtherContexts, digest
from ctxjax.data.graders import yes_no
from ctxjax.data.task import Grade, Row

HATEFUL_FROM = 0.5  # Ethos: the share of annotators who called the comment hateful
QUESTIONS = {
    "tweeteval": "Is this tweet offensive?",
    "hatecheck": "Is this text hateful towards people for the group that they belong to?",
    "ethos": "Is this comment hateful?",
}
FORMAT = "Answer yes or no, as <answer>yes</answer> or <answer>no</answer>."
TWEETEVAL_SPLITS = {"train": "train", "val": "dev", "test": "test"}
# Names that the files go by: the publishers' own, and those of common copies.
FILES = {
    "tweeteval {split} text": ("offensive/{split}_text.txt", "tweeteval_offensive_{split}_text.txt"),
    "tweeteval {split} labels": ("offensive/{split}_labels.txt", "tweeteval_offensive_{split}_labels.txt"),
    "hatecheck": ("test_suite_cases.csv", "hatecheck_cases.csv"),
    "ethos": ("Ethos_Dataset_Binary.csv", "ethos_binary.csv"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig(ContextConfig):
    """See configs/base.py, ``config.safety``."""

    path: str
    sets: tuple[str, ...]
    ask_format: bool
    train_questions: int
    dev_questions: int
    test_questions: int


class Example(NamedTuple):
    """One labelled text; ``id`` names its set, and the place or the number that it has there."""

    id: str
    set: str
    split: str
    text: str
    harmful: bool


def _find(folder: Path, what: str, split: str = "") -> Path:
    names = [name.format(split=split) for name in FILES[what]]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"safety.path = {str(folder)!r} has no {what.format(split=split)} file ({' or '.join(names)}); get it from its "
        "publisher (ctxjax/data/tasks/safety.py says where), or leave the set out of safety.sets"
    )


def _text(path: Path) -> str:
    try:
        # Without translation of line ends: inside a quoted cell or a tweet they are text.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _lines(path: Path) -> list[str]:
    """Lines end at newlines alone: tweets may hold other separators of Unicode."""
    return [line.removesuffix("\r") for line in _text(path).removesuffix("\n").split("\n")]


def _table(path: Path, delimiter: str, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a CSV file that must have these columns."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} has no column {sorted(missing)}; its columns are {reader.fieldnames}")
    for number, row in enumerate(rows):
        if any(row[column] is None for column in columns):
            raise ValueError(f"{path}, row {number}: has fewer cells than the {len(reader.fieldnames)} columns")
    return rows


def tweeteval(folder: Path) -> tuple[list[Example], list[Path]]:
    examples, files = [], []
    for theirs, ours in TWEETEVAL_SPLITS.items():
        paths = [_find(folder, f"tweeteval {{split}} {kind}", theirs) for kind in ("text", "labels")]
        texts, labels = (_lines(path) for path in paths)
        files += paths
        if len(texts) != len(labels):
            raise ValueError(f"{paths[0]} has {len(texts)} lines, {paths[1]} {len(labels)}; they must be parallel")
        for number, (text, label) in enumerate(zip(texts, labels)):
            if label not in ("0", "1"):
                raise ValueError(f"{paths[1]}, line {number + 1}: label {label!r} is neither 0 nor 1")
            examples.append(Example(f"tweeteval-{theirs}-{number}", "tweeteval", ours, text.strip(), label == "1"))
    return examples, files


def hatecheck(folder: Path) -> tuple[list[Example], list[Path]]:
    path, examples = _find(folder, "hatecheck"), []
    for number, row in enumerate(_table(path, ",", ("case_id", "test_case", "label_gold", "templ_id"))):
        if row["label_gold"] not in ("hateful", "non-hateful"):
            raise ValueError(f"{path}, row {number}: label_gold {row['label_gold']!r} is not hateful or non-hateful")
        split = splits.split_of(f"hatecheck {row['templ_id']}")
        harmful = row["label_gold"] == "hateful"
        examples.append(Example(f"hatecheck-{row['case_id']}", "hatecheck", split, row["test_case"].strip(), harmful))
    return examples, [path]


def ethos(folder: Path) -> tuple[list[Example], list[Path]]:
    path, examples = _find(folder, "ethos"), []
    for number, row in enumerate(_table(path, ";", ("comment", "isHate"))):
        try:
            score = float(row["isHate"])
        except ValueError:
            score = float("nan")
        if not 0 <= score <= 1:
            raise ValueError(f"{path}, row {number}: isHate {row['isHate']!r} is not a share from 0 to 1")
        text = row["comment"].strip()
        split = splits.split_of(f"ethos {splits.folded(text)}")
        examples.append(Example(f"ethos-{number}", "ethos", split, text, score >= HATEFUL_FROM))
    return examples, [path]


SETS = {"tweeteval": tweeteval, "hatecheck": hatecheck, "ethos": ethos}


def read_examples(folder: str | Path, sets: tuple[str, ...] = tuple(SETS)) -> tuple[list[Example], dict[str, str]]:
    """All labelled texts of the sets, repeats included, and the sha256 of every file that was read.

    Raises FileNotFoundError or ValueError that names the file, the row and what is wrong with it.
    """
    folder, examples, files = Path(folder).expanduser(), [], []
    if not folder.is_dir():
        raise FileNotFoundError(f"safety.path = {str(folder)!r} is not a folder; put the sets' published files there")
    for name in sets:
        if name not in SETS:
            raise ValueError(f"safety.sets = {name!r} is not known; choose from {', '.join(sorted(SETS))}")
        found, paths = SETS[name](folder)
        examples += found
        files += paths
    for example in examples:
        if not example.text:
            raise ValueError(f"safety row {example.id} has no text")
    return examples, {path.name: digest(path.read_bytes()) for path in files}


class Safety:
    """The task of one context over the pooled sets."""

    def __init__(self, config: SafetyConfig):
        self.contexts = Contexts(config, "safety")
        self.others = OtherContexts(config, "safety")
        examples, files = read_examples(config.path, config.sets)
        pooled = {split: [] for split in splits.SPLITS}
        for example in examples:
            pooled[example.split].append((example.text, self._row(example, config.ask_format)))
        unique, counts = splits.without_repeats(pooled)
        self.splits = {}
        for split, rows in unique.items():
            limit = getattr(config, f"{split}_questions")
            self.splits[split] = splits.shuffled(rows)[: limit or None]
        self.facts = {
            "data": files,
            "rows": {split: len(rows) for split, rows in unique.items()},
            "left out": counts,
            "contexts": self.contexts.facts(),
            "other contexts": self.others.facts(),
        }

    def _row(self, example: Example, ask_format: bool) -> Row:
        record = {"text": example.text, "set": example.set}
        question = f"{QUESTIONS[example.set]}\n\n{example.text}"
        if ask_format:
            question += f"\n\n{FORMAT}"
        context = self.contexts.of(example.id, record)
        return Row(example.id, question, context, "yes" if example.harmful else "no")

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def grade(self, response: str, reference: str) -> Grade:
        return yes_no(response, reference)

    def other_contexts(self, split: str) -> list[str]:
        return self.others.split(split)

    def under(self, row: Row, context: str) -> Row:
        return self.others.under(row, context)

    def paraphrase(self, row: Row, rng: np.random.Generator) -> None:
        return None
