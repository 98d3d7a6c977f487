"""Read texts and labels of offensive and hateful language: TweetEval offensive, HateCheck and Ethos.

The files are the published ones:

    tweeteval   datasets/offensive of cardiffnlp/tweeteval: {train,val,test}_{text,labels}.txt, 1 = offensive
    hatecheck   test_suite_cases.csv of paul-rottger/hatecheck-data: test_case, label_gold, templ_id
    ethos       Ethos_Dataset_Binary.csv of intelligence-csd-auth-gr: comment;isHate, hateful from 0.5 on

TweetEval keeps its published splits. The other sets have none, so a hash decides: a hash of the template for HateCheck,
so that no test case is a training case with only the group's name changed, and of the comment for Ethos.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ctxjax.data import splits
from ctxjax.data.records import Reader, Record, RecordsConfig

HATEFUL_FROM = 0.5  # Ethos: smallest share of annotators who call a hateful comment hateful
TWEETEVAL_SPLITS = {"train": "train", "val": "dev", "test": "test"}
# File names: the published ones, and those of common copies.
FILES = {
    "tweeteval {split} text": ("offensive/{split}_text.txt", "tweeteval_offensive_{split}_text.txt"),
    "tweeteval {split} labels": ("offensive/{split}_labels.txt", "tweeteval_offensive_{split}_labels.txt"),
    "hatecheck": ("test_suite_cases.csv", "hatecheck_cases.csv"),
    "ethos": ("Ethos_Dataset_Binary.csv", "ethos_binary.csv"),
}


class Example(NamedTuple):
    """One labelled text. ``id``: the name of its set and its number there. ``template``: what HateCheck made it of, as
    well as other texts, which name other people."""

    id: str
    set: str
    split: str
    text: str
    harmful: bool
    template: str = ""


def _find_file(folder: Path, what: str, split: str = "") -> Path:
    names = [name.format(split=split) for name in FILES[what]]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"safety.path = {str(folder)!r} has no {what.format(split=split)} file ({' or '.join(names)}); download "
        "it (ctxjax/data/safety_sets.py names the source), or leave the set out of safety.sets"
    )


def _parse_label(reader: Reader, record: Record, text: str, labels: dict[str, bool], known: str) -> bool | None:
    """Return whether a label's text means harmful; None if the row was left out."""
    if text not in labels:
        reader.reject("label", record.where, f"label {text!r} is not {known}")
    return labels.get(text)


def read_tweeteval(folder: Path, reader: Reader) -> list[Example]:
    examples = []
    for published, split in TWEETEVAL_SPLITS.items():
        paths = [_find_file(folder, f"tweeteval {{split}} {kind}", published) for kind in ("text", "labels")]
        texts, labels = (list(reader.read(path, field="safety.path")) for path in paths)
        if len(texts) != len(labels):
            raise ValueError(f"{paths[0]} has {len(texts)} lines, {paths[1]} {len(labels)}; these must be equal")
        for number, (record, label) in enumerate(zip(texts, labels)):
            text = reader.get_text(record)
            harmful = _parse_label(reader, label, label.value, {"0": False, "1": True}, "0 or 1")
            if text is not None and harmful is not None:
                examples.append(Example(f"tweeteval-{published}-{number}", "tweeteval", split, text.strip(), harmful))
    return examples


def read_hatecheck(folder: Path, reader: Reader) -> list[Example]:
    labels, examples = {"hateful": True, "non-hateful": False}, []
    for record in reader.read(_find_file(folder, "hatecheck"), field="safety.path"):
        texts = reader.get_texts(record, "case_id", "test_case", "label_gold", "templ_id")
        if texts is None:
            continue
        case, text, label, template = texts
        harmful = _parse_label(reader, record, label, labels, "hateful or non-hateful")
        name = f"hatecheck {template}"
        split = splits.assign_split(name)
        if harmful is not None:
            examples.append(Example(f"hatecheck-{case}", "hatecheck", split, text.strip(), harmful, name))
    return examples


def read_ethos(folder: Path, reader: Reader) -> list[Example]:
    examples = []
    for number, record in enumerate(reader.read(_find_file(folder, "ethos"), field="safety.path")):
        texts = reader.get_texts(record, "comment", "isHate")
        if texts is None:
            continue
        text, score = texts[0].strip(), _parse_share(texts[1])
        if score is None:
            reader.reject("label", record.where, f"isHate {texts[1]!r} is not a share from 0 to 1")
            continue
        split = splits.assign_split(f"ethos {splits.normalize(text)}")
        examples.append(Example(f"ethos-{number}", "ethos", split, text, score >= HATEFUL_FROM))
    return examples


def _parse_share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


SETS = {"tweeteval": read_tweeteval, "hatecheck": read_hatecheck, "ethos": read_ethos}


def read_examples(
    folder: str | Path, sets: tuple[str, ...] = tuple(SETS), reader: Reader | None = None
) -> list[Example]:
    """Return all labelled texts of the sets, repeats included.

    Raises FileNotFoundError or ValueError, which names the file, the row and the problem.
    """
    folder, reader = Path(folder).expanduser(), reader or Reader(RecordsConfig())
    if not folder.is_dir():
        raise FileNotFoundError(
            f"safety.path = {str(folder)!r} is not a folder; give the folder of the published files"
        )
    for name in sets:
        if name not in SETS:
            raise ValueError(f"safety.sets = {name!r} is not known; choose from {', '.join(sorted(SETS))}")
    return [example for name in sets for example in SETS[name](folder, reader)]
