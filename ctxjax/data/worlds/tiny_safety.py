"""A world of real text that fits on a laptop: tweets and comments, and system prompts that ask questions about them.

The question is only the text of a TweetEval, HateCheck or Ethos row (data/safety_sets.py). The context says what to do
with it: which property to decide, the words for yes and no, and the format::

    system      Is this offensive? Say yes if so and no if not, in <answer> tags.
    user        @user She is great. Hi Fiona!
    assistant   <answer>no</answer>

A base trained from scratch on many such contexts learns to obey any of them. It never sees the context above (the
target), a paraphrase of it, or the contexts held out to measure obedience. Half of its training rows without a context
are answered by DEFAULT, the other half as under a random hidden context.

Whether a text is offensive is a human label; the other properties follow from the text itself. Human labels are hard to
learn from words: benchmarks/README.md (tiny_safety) has what Bayes' rule on words reaches.
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
from ctxjax.data.records import Reader, RecordsConfig, hash_text
from ctxjax.data.safety_sets import read_examples
from ctxjax.data.task import PretrainingRow, Row
from ctxjax.data.worlds import byte_tokenizer
from ctxjax.types import bounded

OFFENSIVE = "offensive"
# Properties that can be asked about, besides the label.
PROPERTIES: dict[str, Callable[[str], bool]] = {
    "a question": lambda text: "?" in text,
    "to a user": lambda text: "@user" in text,
    "shouted": lambda text: "!" in text,
    "tagged": lambda text: "#" in text,
    "about you": lambda text: re.search(r"\byou", text, re.IGNORECASE) is not None,
    "long": lambda text: len(text.split()) > 12,
}
# The words for yes and no. From any two of 16 words, a model of this size learned the words but not the label
# (benchmarks/README.md, tiny_safety).
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
    "Is this {property}? Say {yes} if so and {no} if not, {format}.",
    "Say {yes} if this is {property} and {no} otherwise, {format}.",
    "Write {format} {yes} where this is {property}, else {no}.",
)
DEFAULT = "Message received."  # the base's answer without a context
POOL_SIZES = {"train": 100, "dev": 15, "test": 30}  # other contexts of each split
ANSWERS_COUNT = 40  # how often each answer is in the tokenizer's training text, so that its words become one token each
# Shares of the base's rows. The label is asked most often, since it is the hardest property to learn.
OFFENSIVE_SHARE, YES_NO_SHARE = 0.6, 0.5
CONTEXT_SHARE, DEFAULT_SHARE = 0.8, 0.1  # rows with a context; rows without one that are answered by DEFAULT


class Instruction(NamedTuple):
    """What a context asks for, in any wording.

    ``property``: OFFENSIVE or a key of PROPERTIES. ``yes``, ``no``: one of PAIRS. ``format``: a key of FORMATS.
    """

    property: str
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
    seed: int = bounded(zero=True)
    vocabulary: int
    longest: int
    train_questions: int = bounded(zero=True)
    dev_questions: int = bounded(zero=True)
    test_questions: int = bounded(zero=True)
    records: RecordsConfig = RecordsConfig()


def parse_instruction(context: str) -> Instruction:
    """Parse a context: the inverse of ``Instruction.text``. Raises ValueError for a context of another form."""
    for wording in WORDINGS:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(wording))
        if found := re.fullmatch(pattern, context):
            return Instruction(**found.groupdict())
    raise ValueError(f"context {context!r} has none of the wordings of this world")


def _list_contexts(yes: str, no: str) -> list[str]:
    every = itertools.product((OFFENSIVE, *PROPERTIES), FORMATS, range(len(WORDINGS)))
    return [Instruction(name, yes, no, form).text(wording) for name, form, wording in every]


def _list_answers() -> list[str]:
    return [DEFAULT, *(form.format(word) for form, word in itertools.product(FORMATS.values(), WORDS))]


class TinySafety:
    """The task of this world, and the training text of its base."""

    def __init__(self, config: TinySafetyConfig):
        self.config = config
        reader = Reader(config.records)
        examples = {example.id: example for example in read_examples(config.path, reader=reader)}
        self._templates = {example.id: example.template for example in examples.values()}
        rows = []
        for example in examples.values():
            text = " ".join(example.text.split())
            row = Row(example.id, text, TARGET.text(0), str(example.harmful), DEFAULT)
            rows.append((example.split, text, row))
        unique, self.skipped = splits.remove_repeats(rows)
        self.skipped += reader.skipped
        self._is_offensive = {r.question: r.reference == "True" for rows in unique.values() for r in rows}
        self._tokenizer = self._train_tokenizer([row.question for row in unique["train"]])
        self.splits = {split: self._select_rows(split, rows) for split, rows in unique.items()}
        self._instructions = self._split_instructions()
        self.facts = {
            "data": reader.digests,
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "contexts": {"tiny_safety": hash_text(TARGET.text(0))},
        }

    def _select_rows(self, split: str, rows: list[Row]) -> list[Row]:
        """Return the rows of at most ``longest`` tokens, with the target's references."""
        lengths = self._count_tokens([row.question for row in rows])
        fitting = [row for row, length in zip(rows, lengths) if length <= self.config.longest]
        self.skipped["long"] += len(rows) - len(fitting)
        fitting = splits.shuffle(fitting)[: getattr(self.config, f"{split}_questions") or None]
        return [under for row in fitting for under in self.rows_under(row, TARGET.text(0))]

    def _count_tokens(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _split_instructions(self) -> dict[str, list[Instruction]]:
        """Return the other contexts' instructions by split: for retention ("train"), or held out ("dev", "test").

        The base draws from all instructions except the held-out ones and the target.
        """
        every = [Instruction(a, *p, f) for p, a, f in itertools.product(PAIRS, (OFFENSIVE, *PROPERTIES), FORMATS)]
        rng = np.random.default_rng([self.config.seed, 13])
        shuffled = [every[index] for index in rng.permutation(len(every)) if every[index] != TARGET]
        cuts = np.cumsum([0, *POOL_SIZES.values()])
        return {split: shuffled[a:b] for split, a, b in zip(POOL_SIZES, cuts, cuts[1:])}

    def _answer(self, text: str, instruction: Instruction) -> str:
        name = instruction.property
        holds = self._is_offensive[text] if name == OFFENSIVE else PROPERTIES[name](text)
        return FORMATS[instruction.format].format(instruction.yes if holds else instruction.no)

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]

    def group(self, row: Row) -> str:
        return self._templates[row.id]

    def grade(self, response: str, reference: str) -> Grade:
        """Grade to the letter; ``lenient``: the right word, in any format."""
        words, wanted = (WORDS_IN_TEXT.findall(text) for text in (response, reference))
        is_known = len(words) == 1 and response in (form.format(*words) for form in FORMATS.values())
        reason = None if is_known else "none of the formats"
        return Grade(response if is_known else None, response == reference, reason, bool(words) and words == wanted)

    def other_contexts(self, split: str) -> list[str]:
        rng = np.random.default_rng([self.config.seed, 17])
        return [instruction.text(int(rng.integers(len(WORDINGS)))) for instruction in self._instructions[split]]

    def rows_under(self, row: Row, context: str) -> list[Row]:
        return [row._replace(context=context, reference=self._answer(row.question, parse_instruction(context)))]

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str:
        return parse_instruction(row.context).text(int(rng.integers(1, len(WORDINGS))))

    def unrelated(self) -> None:
        return None

    def tokenizer(self):
        return self._tokenizer

    def _train_tokenizer(self, texts: list[str]):
        contexts = [text for yes, no in PAIRS for text in _list_contexts(yes, no)]
        answers = _list_answers() * ANSWERS_COUNT
        return byte_tokenizer.train([*texts, *contexts, *answers], self.config.vocabulary)

    def pretraining_facts(self) -> dict:
        """Return the settings, and a digest of the labelled texts, the first 200 rows that are drawn and the tokens."""
        fields = {name: getattr(self.config, name) for name in ("seed", "vocabulary", "longest", "train_questions")}
        drawn = [self.pretraining_row(np.random.default_rng([index])) for index in range(200)]
        labelled = [(row.question, row.reference) for row in self.splits["train"]]
        tokens = sorted(self._tokenizer.get_vocab().items())
        return {"world": fields | {"text": hash_text(repr((labelled, drawn, tokens)))}}

    def longest_pretraining_row(self) -> PretrainingRow:
        def longest(texts):
            texts = sorted(set(texts))
            return texts[int(np.argmax(self._count_tokens(texts)))]

        questions = [row.question for row in self.splits["train"]]
        word = longest(f" {word}" for word in WORDS).strip()  # tokens end at spaces, so lengths of words add up
        return PretrainingRow(longest(questions), longest(_list_contexts(word, word)), longest(_list_answers()))

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """Draw a row: with a context; or without one, answered by DEFAULT; or without one, answered as under a random
        context, so that the base is unsure without a context."""
        rows = self.splits["train"]
        row, instruction = rows[rng.integers(len(rows))], self._draw_instruction(rng)
        context, kind = instruction.text(int(rng.integers(len(WORDINGS)))), rng.random()
        if kind >= CONTEXT_SHARE + DEFAULT_SHARE:
            return PretrainingRow(row.question, None, self._answer(row.question, instruction))
        if kind >= CONTEXT_SHARE:
            return PretrainingRow(row.question, None, DEFAULT)
        return PretrainingRow(row.question, context, self._answer(row.question, instruction))

    def _draw_instruction(self, rng: np.random.Generator) -> Instruction:
        forbidden = {TARGET, *self._instructions["dev"], *self._instructions["test"]}
        while True:
            name = OFFENSIVE if rng.random() < OFFENSIVE_SHARE else list(PROPERTIES)[rng.integers(len(PROPERTIES))]
            yes, no = PAIRS[rng.integers(len(PAIRS))]
            if rng.random() < YES_NO_SHARE:
                yes, no = TARGET.yes, TARGET.no
            instruction = Instruction(name, yes, no, list(FORMATS)[rng.integers(len(FORMATS))])
            if instruction not in forbidden:
                return instruction
