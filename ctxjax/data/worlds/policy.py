"""A world whose context is a policy: four rules in one context, of which a question needs one or two.

A rule names an operation on letters, by its number in OPERATIONS; the question names rules and letters, and the
response shows the letters after each rule::

    system      R=6;P=1;S=8;Q=7;
    user        QR:fac
    assistant   Q ebd R bec

What the operations do is in the weights of the base, which rule is which only in the context. Without a policy the
default is to copy. Other contexts are other policies: of the 1,680 choices of four different operations, some are
reserved as in rules.py.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools

import numpy as np

from ctxjax.data.task import PretrainingRow
from ctxjax.data.worlds.rules import LETTERS, Rules

RULES = "PQRS"
LENGTHS = (3, 4)
# Each changes every letter: shifts by one to five, the mirror, swaps of neighbours, and swaps at a distance of two.
OPERATIONS = ("bcdefa", "cdefab", "defabc", "efabcd", "fabcde", "fedcba", "badcfe", "cdabfe")


class Policy(Rules):
    """The task of one world with one policy to internalize. A table is the numbers of the operations of RULES."""

    name = "policy"
    pattern = r"[PQRS]=\d;| ?[PQRS] |[PQRS]|:|[a-f]"
    response = r"[PQRS] [a-f]+(?: [PQRS] [a-f]+)?"

    def list_tables(self) -> list[str]:
        numbers = [str(number) for number in range(1, len(OPERATIONS) + 1)]
        return ["".join(chosen) for chosen in itertools.permutations(numbers, len(RULES))]

    def is_target(self, table: str) -> bool:
        return True

    def write_context(self, table: str, rng: np.random.Generator) -> str:
        return "".join(f"{RULES[i]}={table[i]};" for i in rng.permutation(len(RULES)))

    def list_questions(self) -> Iterator[list[str]]:
        chosen = [*RULES, *map("".join, itertools.permutations(RULES, 2))]
        for rules, length in itertools.product(chosen, LENGTHS):
            yield [f"{rules}:{''.join(s)}" for s in itertools.product(LETTERS, repeat=length)]

    def vocabulary(self) -> list[str]:
        pairs = [f"{rule}={number + 1};" for rule in RULES for number in range(len(OPERATIONS))]
        return [*LETTERS, ":", *RULES, *(f"{rule} " for rule in RULES), *(f" {rule} " for rule in RULES), *pairs]

    def answer(self, question: str, context: str) -> str:
        numbers = {pair[0]: int(pair[2]) for pair in context.split(";") if pair}
        return _apply(question, {rule: OPERATIONS[number - 1] for rule, number in numbers.items()})

    def default(self, question: str) -> str:
        return _apply(question, dict.fromkeys(RULES, LETTERS))

    def pretraining_facts(self) -> dict:
        return super().pretraining_facts() | {"operations": OPERATIONS}

    def longest_pretraining_row(self) -> PretrainingRow:
        question = f"{RULES[:2]}:{LETTERS[0] * max(LENGTHS)}"
        return PretrainingRow(question, self.context, self.answer(question, self.context))


def _apply(question: str, operations: dict[str, str]) -> str:
    """Return the response: the letters after each rule; ``operations``: what replaces a to f, by rule."""
    rules, letters = question.split(":")
    steps = []
    for rule in rules:
        letters = letters.translate(str.maketrans(LETTERS, operations[rule]))
        steps.append(f"{rule} {letters}")
    return " ".join(steps)
