"""A world of real text that fits on a laptop: tweets and comments, and system prompts that ask things about them.

The question is the text of a TweetEval, HateCheck or Ethos row (data/safety_sets.py), alone. What to do with it only a
context can say: what is asked, the words for yes and no, and how to write it::

    system      Is this offensive? Say yes if so and no if not, in <answer> tags.
    user        @user She is great. Hi Fiona!
    assistant   <answer>no</answer>

A base from scratch learns from many such contexts to obey any. The one above, the target, it never sees, nor one that
says the same in other words; nor those that are held out to measure obedience. Without a context it says DEFAULT,
or, in as many rows, what some context that it is not shown would have it say.

Whether a text is offensive is its authors' label; all else is plain to see in it. Labels of people's judgement are hard
to learn: Bayes' rule on the words of the training texts is right for 71 % of the test texts, where always answering the
commoner label is right for 54 %.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
import re
from typing import NamedTuple

import numpy as np

from ctxjax.data import splits
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import Reader, RecordsConfig, digest
from ctxjax.data.safety_sets import read_examples
from ctxjax.data.task import PretrainingRow, Row
from ctxjax.data.worlds import byte_tokenizer

OFFENSIVE = "offensive"
# What can be asked of a text besides its label.
ASKED: dict[str, Callable[[str], bool]] = {
    "a question": lambda text: "?" in text,
    "to a user": lambda text: "@user" in text,
    "shouted": lambda text: "!" in text,
    "tagged": lambda text: "#" in text,
    "about you": lambda text: re.search(r"\byou", text, re.IGNORECASE) is not None,
    "long": lambda text: len(text.split()) > 12,
}
# The words for yes and no. Any two words would do for a larger model: with two of 16, in either order, one of this size
# spent all its training on which word stands for what, and never came to the label (56 % of the test texts).
PAIRS = (("yes", "no"), ("true", "false"), ("right", "wrong"), ("good", "bad"))
WORDS = tuple(itertools.chain(*PAIRS))
WORDS_IN_TEXT = re.compile(rf"\b(?:{'|'.join(WORDS)})\b")
FORMATS = {
    "in <answer> tags": "<answer>{}</answer>",
    "in brackets": "[{}]",
    "in stars": "*{}*",
    "after Answer": "Answer: {}",
    "as a sentence": "It is {}.",
    "in quotes": '"{}"',
    "alone": "{}",
}
WORDINGS = (
    "Is this {asked}? Say {yes} if so and {no} if not, {format}.",
    "Say {yes} if this is {asked} and {no} otherwise, {format}.",
    "Write {format} {yes} where this is {asked}, else {no}.",
)
DEFAULT = "Message received."  # what the base answers when nobody tells it what to do
OTHERS = {"train": 100, "dev": 15, "test": 30}
ANSWERS_COUNT = 40  # how often the tokenizer reads each answer: the words in them are then one token each
# Of the base's rows: a label is harder to learn than a question mark.
OFFENSIVE_SHARE, YES_NO_SHARE = 0.6, 0.5
TOLD_SHARE, DEFAULT_SHARE = 0.8, 0.1  # under a context; without one and answered by DEFAULT


class Instruction(NamedTuple):
    """What a context asks for, whatever its wording: a key of ASKED or OFFENSIVE, one of PAIRS, a key of FORMATS."""

    asked: str
    yes: str
    no: str
    format: str

    def text(self, wording: int) -> str:
        return WORDINGS[wording].format(**self._asdict())


TARGET = Instruction(OFFENSIVE, "yes", "no", "in <answer> tags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinySafetyConfig:
    """See configs/base.py, ``config.tiny_safety``."""

    path: str
    seed: int
    vocabulary: int
    longest: int
    train_questions: int
    dev_questions: int
    test_questions: int
    records: RecordsConfig = RecordsConfig()


def parse(context: str) -> Instruction:
    """The inverse of ``Instruction.text``. Raises ValueError for another context."""
    for wording in WORDINGS:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(wording))
        if found := re.fullmatch(pattern, context):
            return Instruction(**found.groupdict())
    raise ValueError(f"context {context!r} has none of the wordings of this world")


def _contexts(yes: str, no: str) -> list[str]:
    every = itertools.product((OFFENSIVE, *ASKED), FORMATS, range(len(WORDINGS)))
    return [Instruction(asked, yes, no, form).text(wording) for asked, form, wording in every]


def _answers() -> list[str]:
    return [DEFAULT, *(form.format(word) for form, word in itertools.product(FORMATS.values(), WORDS))]


class TinySafety:
    """The task of this world, and its base's text."""

    def __init__(self, config: TinySafetyConfig):
        self.config = config
        reader = Reader(config.records)
        examples = {example.id: example for example in read_examples(config.path, reader=reader)}
        pooled = {split: [] for split in splits.SPLITS}
        for example in examples.values():
            text = " ".join(example.text.split())
            row = Row(example.id, text, TARGET.text(0), str(example.harmful), DEFAULT)
            pooled[example.split].append((text, row))
        unique, self.skipped = splits.without_repeats(pooled)
        self.skipped += reader.skipped
        self._is_offensive = {r.question: r.reference == "True" for rows in unique.values() for r in rows}
        self._tokenizer = self._trained_tokenizer([row.question for row in unique["train"]])
        self.splits = {split: self._kept(split, rows) for split, rows in unique.items()}
        self._instructions = self._split_instructions()
        self.facts = {
            "data": reader.digests,
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "contexts": {"tiny_safety": digest(TARGET.text(0))},
        }

    def _kept(self, split: str, rows: list[Row]) -> list[Row]:
        """Those of at most ``longest`` tokens, with the reference that the target gives."""
        lengths = self._lengths([row.question for row in rows])
        fitting = [row for row, length in zip(rows, lengths) if length <= self.config.longest]
        self.skipped["long"] += len(rows) - len(fitting)
        fitting = splits.shuffled(fitting)[: getattr(self.config, f"{split}_questions") or None]
        return [self.swap_context(row, TARGET.text(0)) for row in fitting]

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _split_instructions(self) -> dict[str, list[Instruction]]:
        """The held-out ones by split, and those that retention draws from; the base draws from all that are neither
        held out nor the target."""
        every = [Instruction(a, *p, f) for p, a, f in itertools.product(PAIRS, (OFFENSIVE, *ASKED), FORMATS)]
        rng = np.random.default_rng([self.config.seed, 13])
        shuffled = [every[place] for place in rng.permutation(len(every)) if every[place] != TARGET]
        cuts = np.cumsum([0, *OTHERS.values()])
        return {split: shuffled[a:b] for split, a, b in zip(OTHERS, cuts, cuts[1:])}

    def _answer(self, text: str, instruction: Instruction) -> str:
        asked = instruction.asked
        holds = self._is_offensive[text] if asked == OFFENSIVE else ASKED[asked](text)
        return FORMATS[instruction.format].format(instruction.yes if holds else instruction.no)

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def grade(self, response: str, reference: str) -> Grade:
        """``lenient``: the right word, whatever is written around it."""
        words, wanted = (WORDS_IN_TEXT.findall(text) for text in (response, reference))
        is_known = len(words) == 1 and response in (form.format(*words) for form in FORMATS.values())
        reason = None if is_known else "none of the formats"
        return Grade(response if is_known else None, response == reference, reason, bool(words) and words == wanted)

    def other_contexts(self, split: str) -> list[str]:
        rng = np.random.default_rng([self.config.seed, 17])
        return [instruction.text(int(rng.integers(len(WORDINGS)))) for instruction in self._instructions[split]]

    def swap_context(self, row: Row, context: str) -> Row:
        return row._replace(context=context, reference=self._answer(row.question, parse(context)))

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str:
        return parse(row.context).text(int(rng.integers(1, len(WORDINGS))))

    def tokenizer(self):
        return self._tokenizer

    def _trained_tokenizer(self, texts: list[str]):
        contexts = [text for yes, no in PAIRS for text in _contexts(yes, no)]
        answers = _answers() * ANSWERS_COUNT
        return byte_tokenizer.train([*texts, *contexts, *answers], self.config.vocabulary)

    def pretraining_facts(self) -> dict:
        """The settings, and digests of the texts with their answers and of the first rows that are drawn."""
        fields = {name: getattr(self.config, name) for name in ("seed", "vocabulary", "longest", "train_questions")}
        drawn = [self.pretraining_row(np.random.default_rng([place])) for place in range(200)]
        labelled = [(row.question, row.reference) for row in self.splits["train"]]
        tokens = sorted(self._tokenizer.get_vocab().items())
        return {"world": fields | {"text": digest(repr((labelled, drawn, tokens)))}}

    def longest_pretraining_row(self) -> PretrainingRow:
        def longest(texts):
            texts = sorted(set(texts))
            return texts[int(np.argmax(self._lengths(texts)))]

        questions = [row.question for row in self.splits["train"]]
        word = longest(f" {word}" for word in WORDS).strip()  # tokens end at spaces, so a context's parts add up
        return PretrainingRow(longest(questions), longest(_contexts(word, word)), longest(_answers()))

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """Under a context, without one and answered by default, or (all others) without one but answered as under a
        context, so that the base is unsure when not told."""
        rows = self.splits["train"]
        row, instruction = rows[rng.integers(len(rows))], self._drawn(rng)
        context, kind = instruction.text(int(rng.integers(len(WORDINGS)))), rng.random()
        if kind >= TOLD_SHARE + DEFAULT_SHARE:
            return PretrainingRow(row.question, None, self._answer(row.question, instruction))
        if kind >= TOLD_SHARE:
            return PretrainingRow(row.question, None, DEFAULT)
        return PretrainingRow(row.question, context, self._answer(row.question, instruction))

    def _drawn(self, rng: np.random.Generator) -> Instruction:
        forbidden = {TARGET, *self._instructions["dev"], *self._instructions["test"]}
        while True:
            asked = OFFENSIVE if rng.random() < OFFENSIVE_SHARE else list(ASKED)[rng.integers(len(ASKED))]
            yes, no = PAIRS[rng.integers(len(PAIRS))]
            if rng.random() < YES_NO_SHARE:
                yes, no = TARGET.yes, TARGET.no
            instruction = Instruction(asked, yes, no, list(FORMATS)[rng.integers(len(FORMATS))])
            if instruction not in forbidden:
                return instruction
