"""The smallest world in which contexts matter: substitution tables over six letters.

The context is a table, the question asks to apply it n times, and the response shows every step::

    system      f>b;a>e;c>d;b>a;e>f;d>c;
    user        #2:fac
    assistant   s1 bed s2 afc

Without a table the default is to copy. The table to internalize is a 6-cycle, so applying it once, applying it twice,
applying its inverse and copying all give different answers. Each pair is one token.

Of the 720 tables, TARGETS 6-cycles are reserved as tables to internalize. Two disjoint pools are reserved to measure
obedience on dev and test. The base and the retention rows see only the rest. Questions are split into train, dev and
test in the same way.

policy.py and scratch.py are worlds of the same make: they replace what a context, a question and a response are.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools
import re

import numpy as np

from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import hash_text
from ctxjax.data.task import PretrainingRow, Row
from ctxjax.data.worlds import word_tokenizer
from ctxjax.types import bounded

LETTERS = "abcdef"
REPEATS = (1, 2, 3)
LENGTHS = (3, 4, 5)
TARGETS = 8
HELD_OUT_TABLES = {"dev": 60, "test": 60}
# Held-out share of the questions of each stratum; a stratum has one repeat count and one length.
HELD_OUT_QUESTIONS = {"dev": 0.15, "test": 0.35}

TOKEN_PATTERN = r"#\d:|[a-f]>[a-f];| ?s\d |[a-f]"


@dataclasses.dataclass(frozen=True)
class RulesConfig:
    """See configs/base.py, ``config.rules``, ``config.policy`` and ``config.scratch``.

    ``seed`` determines tables, questions and splits. ``context_index`` chooses the table to internalize.
    ``empty_share``: of the base's training rows without a table, the share with an empty context block.
    """

    seed: int = bounded(zero=True)
    context_index: int = bounded(zero=True)
    train_questions: int
    dev_questions: int
    test_questions: int
    empty_share: float = bounded(zero=True, at_most=1.0)


def vocabulary() -> list[str]:
    """Return all tokens of the world except those of the chat template."""
    pairs = [f"{a}>{b};" for a in LETTERS for b in LETTERS]
    return [*LETTERS, *(f"#{n}:" for n in REPEATS), "s1 ", *(f" s{n} " for n in REPEATS[1:]), *pairs]


def format_table(table: str, order: np.ndarray | list[int]) -> str:
    """Format a table as a context. ``table[i]`` replaces ``LETTERS[i]``; the pairs are written in ``order``."""
    return "".join(f"{LETTERS[i]}>{table[i]};" for i in order)


def parse_table(context: str) -> dict[str, str]:
    """Parse a context into {letter: its replacement}: the inverse of ``format_table``."""
    return {pair[0]: pair[2] for pair in context.split(";") if pair}


def answer(question: str, table: dict[str, str]) -> str:
    """Return the correct response: the letters after each application of the table."""
    repeats, letters = int(question[1]), question[3:]
    steps = []
    for n in range(1, repeats + 1):
        letters = "".join(table[letter] for letter in letters)
        steps.append(f"s{n} {letters}")
    return " ".join(steps)


def is_six_cycle(table: str) -> bool:
    """Whether the table, followed from any letter, visits all six letters."""
    seen, letter = set(), LETTERS[0]
    while letter not in seen:
        seen.add(letter)
        letter = table[LETTERS.index(letter)]
    return len(seen) == len(LETTERS)


class Rules:
    """The task of one world with one table to internalize.

    ``tables``: by split, the tables of other contexts. In a subclass they are whatever ``write_context`` writes.
    """

    name = "rules"  # its section of the configuration
    skipped: dict[str, int] = {}  # it reads no files
    repeats = REPEATS
    pattern = TOKEN_PATTERN
    response = r"s1 [a-f]+(?: s2 [a-f]+)?(?: s3 [a-f]+)?"  # what a readable response looks like

    def __init__(self, config: RulesConfig):
        self.config = config
        rng = np.random.default_rng([config.seed, 7])
        tables = self.list_tables()
        tables = [tables[i] for i in rng.permutation(len(tables))]
        self.targets = [t for t in tables if self.is_target(t)][:TARGETS]
        rest = [t for t in tables if t not in self.targets]
        self.tables, start = {}, 0
        for split, size in HELD_OUT_TABLES.items():
            self.tables[split] = rest[start : start + size]
            start += size
        self.tables["train"] = rest[start:]
        self.strata = self._split_questions(rng)
        index = config.context_index
        if not 0 <= index < TARGETS:
            raise ValueError(f"{self.name}.context_index = {index}; this world has tables 0 to {TARGETS - 1}")
        self.context = self.write_context(self.targets[index], rng)
        self.facts = {"contexts": {f"table {index}": hash_text(self.context)}}

    def list_tables(self) -> list[str]:
        return ["".join(p) for p in itertools.permutations(LETTERS)]

    def is_target(self, table: str) -> bool:
        """Whether the table may be one to internalize."""
        return is_six_cycle(table)

    def write_context(self, table: str, rng: np.random.Generator) -> str:
        return format_table(table, rng.permutation(len(LETTERS)))

    def list_questions(self) -> Iterator[list[str]]:
        """Yield the questions of each stratum."""
        for repeats, length in itertools.product(self.repeats, LENGTHS):
            yield [f"#{repeats}:{''.join(s)}" for s in itertools.product(LETTERS, repeat=length)]

    def vocabulary(self) -> list[str]:
        return vocabulary()

    def answer(self, question: str, context: str) -> str:
        """Return what is right under a context."""
        return answer(question, parse_table(context))

    def default(self, question: str) -> str:
        """Return what the base answers without a context: copies."""
        return answer(question, {letter: letter for letter in LETTERS})

    def respond(self, question: str, context: str | None, answer: str, rng: np.random.Generator) -> str:
        """Return a response of the base's text that gives ``answer``."""
        return answer

    def _split_questions(self, rng: np.random.Generator) -> dict[str, list[list[str]]]:
        """Return split -> list of strata -> questions in random order."""
        strata = {"train": [], "dev": [], "test": []}
        for questions in self.list_questions():
            questions = [questions[i] for i in rng.permutation(len(questions))]
            for split, share in HELD_OUT_QUESTIONS.items():
                cut = int(share * len(questions))
                strata[split].append(questions[:cut])
                questions = questions[cut:]
            strata["train"].append(questions)
        return strata

    def choose_questions(self, split: str) -> list[str]:
        """Return the configured number of questions, one from each stratum in rotation until a stratum is empty."""
        count = getattr(self.config, f"{split}_questions")
        rotation = itertools.chain.from_iterable(itertools.zip_longest(*self.strata[split]))
        chosen = list(itertools.islice((q for q in rotation if q is not None), count))
        if len(chosen) < count:
            raise ValueError(
                f"{self.name}.{split}_questions = {count}, but the world's {split} split has {len(chosen)}"
            )
        return chosen

    def rows(self, split: str) -> list[Row]:
        asked = self.choose_questions(split)
        return [Row(q, q, self.context, self.answer(q, self.context), self.default(q)) for q in asked]

    def grade(self, response: str, reference: str) -> Grade:
        steps = re.fullmatch(self.response, response)
        return Grade(response if steps else None, response == reference, None if steps else "no steps")

    def other_contexts(self, split: str) -> list[str]:
        rng = np.random.default_rng([self.config.seed, 11])
        return [self.write_context(t, rng) for t in self.tables[split]]

    def rows_under(self, row: Row, context: str) -> list[Row]:
        return [row._replace(context=context, reference=self.answer(row.question, context))]

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str:
        pairs = row.context.split(";")[:-1]
        return "".join(f"{pairs[i]};" for i in rng.permutation(len(pairs)))

    def unrelated(self) -> None:
        return None

    def tokenizer(self):
        return word_tokenizer.build(self.vocabulary(), self.pattern)

    def pretraining_facts(self) -> dict:
        seed, empty_share = self.config.seed, self.config.empty_share
        return {"world_seed": seed, "empty_share": empty_share, "vocabulary": self.vocabulary()}

    def longest_pretraining_row(self) -> PretrainingRow:
        question = f"#{max(self.repeats)}:{LETTERS[0] * max(LENGTHS)}"
        return PretrainingRow(question, self.context, self.answer(question, self.context))

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """Draw a row: 70 % with a random table of the train pool; 15 % without a table, copied; 15 % without a table,
        answered by a random table, so that the base is unsure without a table.
        """
        strata = self.strata["train"]
        stratum = strata[rng.integers(len(strata))]
        question = stratum[rng.integers(len(stratum))]
        table = self.tables["train"][rng.integers(len(self.tables["train"]))]
        context = self.write_context(table, rng)
        kind, right = rng.random(), self.answer(question, context)
        if kind < 0.7:
            return PretrainingRow(question, context, self.respond(question, context, right, rng))
        nothing = "" if rng.random() < self.config.empty_share else None
        right = right if kind >= 0.85 else self.default(question)
        return PretrainingRow(question, nothing, self.respond(question, nothing, right, rng))
