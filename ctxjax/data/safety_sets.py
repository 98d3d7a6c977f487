"""Offensive and hateful language: the texts and labels of TweetEval offensive, HateCheck and Ethos.

The files are those that their authors publish:

    tweeteval   datasets/offensive of cardiffnlp/tweeteval: {train,val,test}_{text,labels}.txt, 1 = offensive
    hatecheck   test_suite_cases.csv of paul-rottger/hatecheck-data: test_case, label_gold, templ_id
    ethos       Ethos_Dataset_Binary.csv of intelligence-csd-auth-gr: comment;isHate, hateful from 0.5 on

TweetEval keeps its publishers' splits. The others have none: a hash decides, of HateCheck's template, so that no test
case is a training case with another group's name in it, and of Ethos's comment.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ctxjax.data import splits
from ctxjax.data.records import Reader, Record, RecordsConfig

HATEFUL_FROM = 0.5  # Ethos: the share of annotators who called the comment hateful


TWEETEVAL_SPLITS = {"train": "train", "val": "dev", "test": "test"}


# Names that the files go by: the publishers' own, and those of common copies.
FILES = {
    "tweeteval {split} text": ("offensive/{split}_text.txt", "tweeteval_offensive_{split}_text.txt"),
    "tweeteval {split} labels": ("offensive/{split}_labels.txt", "tweeteval_offensive_{split}_labels.txt"),
    "hatecheck": ("test_suite_cases.csv", "hatecheck_cases.csv"),
    "ethos": ("Ethos_Dataset_Binary.csv", "ethos_binary.csv"),
}


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
        "publisher (ctxjax/data/safety_sets.py says where), or leave the set out of safety.sets"
    )


def _label(reader: Reader, record: Record, text: str, labels: dict[str, bool], known: str) -> bool | None:
    """What a label's text means; None where the row was left out."""
    if text not in labels:
        reader.reject("label", record.where, f"label {text!r} is not {known}")
    return labels.get(text)


def tweeteval(folder: Path, reader: Reader) -> list[Example]:
    examples = []
    for theirs, ours in TWEETEVAL_SPLITS.items():
        paths = [_find(folder, f"tweeteval {{split}} {kind}", theirs) for kind in ("text", "labels")]
        texts, labels = (reader.records(path, field="safety.path") for path in paths)
        if len(texts) != len(labels):
            raise ValueError(f"{paths[0]} has {len(texts)} lines, {paths[1]} {len(labels)}; they must be parallel")
        for number, (record, label) in enumerate(zip(texts, labels)):
            text, harmful = reader.text(record), _label(reader, label, label.value, {"0": False, "1": True}, "0 or 1")
            if text is not None and harmful is not None:
                examples.append(Example(f"tweeteval-{theirs}-{number}", "tweeteval", ours, text.strip(), harmful))
    return examples


def hatecheck(folder: Path, reader: Reader) -> list[Example]:
    labels, examples = {"hateful": True, "non-hateful": False}, []
    for record in reader.records(_find(folder, "hatecheck"), field="safety.path"):
        texts = reader.texts(record, "case_id", "test_case", "label_gold", "templ_id")
        if texts is None:
            continue
        case, text, label, template = texts
        harmful, split = _label(reader, record, label, labels, "hateful or non-hateful"), f"hatecheck {template}"
        if harmful is not None:
            examples.append(Example(f"hatecheck-{case}", "hatecheck", splits.split_of(split), text.strip(), harmful))
    return examples


def ethos(folder: Path, reader: Reader) -> list[Example]:
    examples = []
    for number, record in enumerate(reader.records(_find(folder, "ethos"), field="safety.path")):
        texts = reader.texts(record, "comment", "isHate")
        if texts is None:
            continue
        text, score = texts[0].strip(), _share(texts[1])
        if score is None:
            reader.reject("label", record.where, f"isHate {texts[1]!r} is not a share from 0 to 1")
            continue
        split = splits.split_of(f"ethos {splits.folded(text)}")
        examples.append(Example(f"ethos-{number}", "ethos", split, text, score >= HATEFUL_FROM))
    return examples


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


SETS = {"tweeteval": tweeteval, "hatecheck": hatecheck, "ethos": ethos}


def read_examples(
    folder: str | Path, sets: tuple[str, ...] = tuple(SETS), reader: Reader | None = None
) -> list[Example]:
    """All labelled texts of the sets, repeats included.

    Raises FileNotFoundError or ValueError that names the file, the row and what is wrong with it.
    """
    folder, reader = Path(folder).expanduser(), reader or Reader(RecordsConfig())
    if not folder.is_dir():
        raise FileNotFoundError(f"safety.path = {str(folder)!r} is not a folder; put the sets' published files there")
    for name in sets:
        if name not in SETS:
            raise ValueError(f"safety.sets = {name!r} is not known; choose from {', '.join(sorted(SETS))}")
    return [example for name in sets for example in SETS[name](folder, reader)]
