"""A document of invented facts, to be learned by heart by a model that has never read of them.

The document is about one invented place, company or product, and states twelve facts: names, numbers, short phrases,
and one that is yes or no. Every question asks for one of them, in wordings of its own in every split. Other contexts
are other documents on the same subject with other values, so that every question has another right answer under each.
A paraphrase is the same facts in another style; an unrelated context is a document about another subject.

``handbook.jsonl`` has the facts of each kind of subject: what their values are drawn from, how a document states them,
and how they are asked for. Base models know none of the values: they are drawn with the seed.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
import json
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from ctxjax.data import splits
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.graders import grade_short
from ctxjax.data.records import hash_text
from ctxjax.data.task import Row
from ctxjax.types import bounded

FACTS_FILE = Path(__file__).parents[1] / "handbook.jsonl"
SUBJECTS = {"place": "a small country", "company": "a company", "product": "a garden robot"}
OTHER_DOCUMENTS = {"train": 48, "dev": 12, "test": 24}
# The frames of a question. The first, the question alone, is in every split, the others are in one only.
FRAMES = {
    "train": (
        "{q}", "Please answer briefly. {q}", "I have a question about {s}. {q}", "Can you help me? {q}",
        "Quick question: {q}", "{q} Please keep it short.",
    ),
    "dev": ("{q}", "One more thing: {q}"),
    "test": (
        "{q}", "Hello! {q}", "Next question: {q}", "About {s}: {q}",
        "Please help me. {q}", "I forgot something. {q}", "{q} Thanks!", "My friend wants to hear this: {q}",
    ),
}  # fmt: skip
# The parts of values, and the values that have a form of their own.
PARTS = {
    "animal": "badger beaver crane falcon fox hedgehog heron lynx marten otter owl pelican salmon toad",
    "coin": "bell crown drop feather key lamb leaf lion moon ring rose shell star tower",
    "colour": "black blue brown golden gray green orange pink purple red silver violet white yellow",
    "day": " ".join(map(str, range(1, 29))),
    "end": "bridge brook dale field ford gate haven hill land mouth side stone ton town view ville water wood",
    "first_name": "Alice Anna Daniel David Emma George Helen Jack Laura Martin Oscar Paul Peter Sarah",
    "food": "bacon barley beef butter cheese cider coffee corn fish honey pork rice tea wheat",
    "last_name": "Baker Brown Carter Cook Fisher Fox Hunter King Miller Parker Smith Taylor Walker Young",
    "good": "bread fire friendship gold labor laughter light music order rain science skill water work",
    "material": "bamboo ceramic cotton glass leather paper plastic rubber wood",
    "metal": "brass bronze copper diamond gold iron ivory ruby silver steel stone",
    "month": "January February March April May June July August September October November December",
    "shape": "arrow bar circle cross diamond drop heart hexagon moon ring spiral square star triangle",
    "start": "Amber Apple Button Candle Copper Cotton Crystal Eagle Ember Feather Ginger Hazel Iron Lantern Maple "
    "Marble Pepper Saddle Silver Storm Sugar Thunder Timber Velvet Walnut Winter",
    "taste": "bottled dried fresh frozen local organic red roasted salted smoked spiced sweet white wild",
    "virtue": "courage faith freedom honor hope justice kindness love patience peace strength trust truth wisdom",
}
FORMS = {
    "name": "{start}{end}",
    "person": "{first_name} {last_name}",
    "coin": "{metal} {coin}",
    "material and metal": "{material} and {metal}",
    "date": "{month} {day}",
    "motto": "{virtue} and {good}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandbookConfig:
    """See configs/base.py, ``config.handbook``. ``*_questions`` limit each split; 0: no limit."""

    seed: int = bounded(zero=True)
    subject: str
    style: str
    tokens: int = bounded(zero=True, at_most=4000)
    train_questions: int = bounded(zero=True)
    dev_questions: int = bounded(zero=True)
    test_questions: int = bounded(zero=True)


class Fact(NamedTuple):
    """What can be said of each subject of one kind: a line of handbook.jsonl.

    ``value``: what values are drawn from. ``label`` names it in a list or a table, ``topic`` and ``sentence`` in text;
    ``{s}`` is the subject and ``{v}`` the value. ``train``, ``dev``, ``test``: ways to ask for it, of each split.
    """

    subject: str
    name: str
    value: str
    label: str
    topic: str
    sentence: str | list[str]
    train: list[str]
    dev: list[str]
    test: list[str]


class Entry(NamedTuple):
    """One statement of a document: the value of a fact of ``subject``, the document's own or another one."""

    fact: Fact
    subject: str
    value: str


class Document(NamedTuple):
    """A document about ``subject``: its facts and, in a longer document, those of other subjects, in their order."""

    kind: str
    subject: str
    entries: list[Entry]

    def values(self) -> dict[str, str]:
        """Return fact -> value of the document's own subject."""
        return {entry.fact.name: entry.value for entry in self.entries if entry.subject == self.subject}

    def write(self, style: str) -> str:
        """Return the document as text, in one of STYLES."""
        lines = [_STATEMENTS[style](entry, self.subject) for entry in self.entries]
        if style == "table":
            lines = [f"| {self.subject} | |", "|---|---|", *lines]
        head = f"You answer questions about {self.subject}, {SUBJECTS[self.kind]}. These are the facts:\n"
        return head + (" " if style == "prose" else "\n").join(lines)


def _write_sentence(entry: Entry, subject: str) -> str:
    texts = entry.fact.sentence
    text = texts if isinstance(texts, str) else texts[entry.value == "no"]
    return text.format(s=entry.subject, v=entry.value)


def _write_table_row(entry: Entry, subject: str) -> str:
    owner = "" if entry.subject == subject else f" ({entry.subject})"
    return f"| {entry.fact.label}{owner} | {entry.value} |"


def _write_rule(entry: Entry, subject: str) -> str:
    return f"If asked about {entry.fact.topic.format(s=entry.subject)}, say: {entry.value}"


# style -> how it states one entry of a document about a subject.
_STATEMENTS: dict[str, Callable[[Entry, str], str]] = {
    "list": lambda entry, subject: f"- {_write_sentence(entry, subject)}",
    "prose": _write_sentence,
    "table": _write_table_row,
    "rules": _write_rule,
}
STYLES = tuple(_STATEMENTS)


def read_facts() -> list[Fact]:
    """Return the facts of all kinds of subjects."""
    return [Fact(**json.loads(line)) for line in FACTS_FILE.read_text(encoding="utf-8").splitlines()]


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a model's tokenizer makes of a document, within a tenth."""
    words = re.findall(r"[A-Za-z]+", text)
    return len(re.findall(r"\d|[^\w\s]|\n", text)) + sum(-(-len(word) // 6) for word in words)


def draw_value(kind: str, rng: np.random.Generator) -> str:
    """Draw a value of one kind: "yes_no", "number FIRST LAST", one of FORMS, or the names of some PARTS."""
    name, *arguments = kind.split()
    if name == "yes_no":
        return ("yes", "no")[rng.integers(2)]
    if name == "number":
        first, last = map(int, arguments)
        return str(rng.integers(first, last + 1))
    form = FORMS.get(kind) or " ".join(f"{{{part}}}" for part in kind.split())
    words = {part: PARTS[part].split() for part in re.findall(r"{(\w+)}", form)}
    return form.format(**{part: known[rng.integers(len(known))] for part, known in words.items()})


def _overlap(one: str, other: str) -> bool:
    one, other = one.casefold(), other.casefold()
    return one in other or other in one


class Handbook:
    """The task of one document.

    No question has the same answer under another document: the fact that is yes or no is the opposite in all others.
    """

    skipped: dict[str, int] = {}  # it reads no files of the user

    def __init__(self, config: HandbookConfig):
        for field, known in (("subject", tuple(SUBJECTS)), ("style", STYLES)):
            if getattr(config, field) not in known:
                value = getattr(config, field)
                raise ValueError(f"handbook.{field} = {value!r} is not known; choose from {', '.join(known)}")
        self.config = config
        self._facts = [fact for fact in read_facts() if fact.subject == config.subject]
        rng = np.random.default_rng([config.seed, list(SUBJECTS).index(config.subject), 19])
        self.subject = draw_value("name", rng)
        self._taken: dict[str, set[str]] = {fact.name: set() for fact in self._facts}
        self.document = self._draw_document(rng, None)
        self.context = self.document.write(config.style)
        least = estimate_tokens(self.context)
        if 0 < config.tokens < least and len(self.document.entries) == len(self._facts):
            raise ValueError(
                f"handbook.tokens = {config.tokens}, but the facts alone have about {least} tokens in handbook.style = "
                f"{config.style!r}; raise it, set it to 0 for the facts alone, or choose the shortest style, table"
            )
        self.others: dict[str, dict[str, Document]] = {}
        for split, count in OTHER_DOCUMENTS.items():
            drawn = [self._draw_document(rng, self.document) for _ in range(count)]
            styles = itertools.cycle(STYLES)
            self.others[split] = {document.write(next(styles)): document for document in drawn}
        self._unrelated = self._draw_unrelated(rng)
        self._asked: dict[str, str] = {}  # row id -> fact
        self.splits = {split: self._make_rows(split) for split in splits.SPLITS}
        self.facts = {
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "contexts": {f"{config.subject} {self.subject}": hash_text(self.context)},
        }

    def _draw_document(self, rng: np.random.Generator, first: Document | None) -> Document:
        """Draw values that no earlier document has, and statements about other subjects up to ``config.tokens``.

        ``first``: the document to internalize, or None to draw it.
        """
        asked = [text.format(s=self.subject) for fact in self._facts for text in (*fact.train, *fact.dev, *fact.test)]
        values: dict[str, str] = {}
        for fact in self._facts:
            if fact.value == "yes_no":
                internalized = first.values()[fact.name] if first else draw_value(fact.value, rng)
                values[fact.name] = "no" if internalized == "yes" else "yes"
                continue
            others = [*(v for v in values.values() if v not in ("yes", "no")), self.subject]
            values[fact.name] = self._draw_new(rng, fact, others, asked)
            self._taken[fact.name].add(values[fact.name])
        entries = [Entry(fact, self.subject, values[fact.name]) for fact in self._facts]
        document = Document(self.config.subject, self.subject, [entries[i] for i in rng.permutation(len(entries))])
        count = estimate_tokens(document.write(self.config.style))
        while count < self.config.tokens:
            entry = self._draw_distractor(rng, values)
            document.entries.insert(rng.integers(len(document.entries) + 1), entry)
            alone = document._replace(entries=[entry]).write(self.config.style)
            count += estimate_tokens(alone) - estimate_tokens(document._replace(entries=[]).write(self.config.style))
        return document

    def _draw_new(self, rng: np.random.Generator, fact: Fact, others: list[str], asked: list[str]) -> str:
        """Draw a value of a fact that no other value of the document and no question contains, or is contained in."""
        while True:
            value = draw_value(fact.value, rng)
            is_taken = value in self._taken[fact.name] or any(_overlap(value, other) for other in others)
            if not is_taken and not any(value.casefold() in text.casefold() for text in asked):
                return value

    def _draw_distractor(self, rng: np.random.Generator, values: dict[str, str]) -> Entry:
        fact = self._facts[rng.integers(len(self._facts))]
        others = [self.subject, *(value for value in values.values() if value not in ("yes", "no"))]
        while True:
            subject, value = draw_value("name", rng), draw_value(fact.value, rng)
            if not any(_overlap(text, other) for text in (subject, value) for other in others):
                return Entry(fact, subject, value)

    def _draw_unrelated(self, rng: np.random.Generator) -> str:
        """Return a document about a subject of another kind."""
        kind = next(kind for kind in SUBJECTS if kind != self.config.subject)
        subject = draw_value("name", rng)
        entries = [Entry(fact, subject, draw_value(fact.value, rng)) for fact in read_facts() if fact.subject == kind]
        return Document(kind, subject, entries).write(self.config.style)

    def _make_rows(self, split: str) -> list[Row]:
        rows, values = [], self.document.values()
        for fact in self._facts:
            ways = itertools.product(enumerate(getattr(fact, split)), enumerate(FRAMES[split]))
            for (number, text), (frame_number, frame) in ways:
                row_id = f"{split}-{fact.name}-{number}-{frame_number}"
                question = frame.format(q=text.format(s=self.subject), s=self.subject)
                rows.append(Row(row_id, question, self.context, values[fact.name]))
                self._asked[row_id] = fact.name
        limit = getattr(self.config, f"{split}_questions") or None
        return splits.shuffle(rows)[:limit]

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def grade(self, response: str, reference: str) -> Grade:
        return grade_short(response, reference)

    def other_contexts(self, split: str) -> list[str]:
        return list(self.others[split])

    def rows_under(self, row: Row, context: str) -> list[Row]:
        document = next(documents[context] for documents in self.others.values() if context in documents)
        return [row._replace(context=context, reference=document.values()[self._asked[row.id]])]

    def group(self, row: Row) -> str:
        """The fact: a model that knows it knows it in most wordings."""
        return self._asked[row.id]

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str:
        """Return the document in the next style, the same for all rows, so that they share it as a prefix."""
        return self.document.write(STYLES[(STYLES.index(self.config.style) + 1) % len(STYLES)])

    def unrelated(self) -> str:
        return self._unrelated
