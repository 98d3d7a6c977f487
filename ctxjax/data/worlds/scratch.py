"""A world whose response length is a choice: a context may suggest drafts before the answer, which nothing needs.

The context is a table as in rules.py, in some with the word "think;". The answer follows "=", and drafts of it may come
before, each after "~"; they are free, and only the answer is graded::

    system      f>b;think;a>e;c>d;b>a;e>f;d>c;
    user        #1:fac
    assistant   ~bed=bed

How many drafts the base's text has follows DRAFTS: with the suggestion one is the likeliest, and a second one nearly as
likely as none. A student that has internalized the suggestion and reads it again may draft more than its teacher did:
the length inflates, and at the length limit the answer is lost.
"""

from __future__ import annotations

import re

import numpy as np

from ctxjax.data.grading.grade import Grade
from ctxjax.data.task import PretrainingRow
from ctxjax.data.worlds import rules
from ctxjax.data.worlds.rules import LETTERS, Rules

THINK = "think;"
# Whether the context suggests drafts -> the probabilities of 0, 1, 2, 3 of them.
DRAFTS = {False: (0.85, 0.1, 0.04, 0.01), True: (0.1, 0.5, 0.28, 0.12)}


class Scratch(Rules):
    """The task of one world with one table to internalize, which suggests drafts."""

    name = "scratch"
    repeats = (1,)
    pattern = r"#\d:|[a-f]>[a-f];|think;|[~=]|[a-f]"

    def write_context(self, table: str, rng: np.random.Generator) -> str:
        items = [f"{a}>{b};" for a, b in zip(LETTERS, table)]
        items += [THINK] * (table in self.targets or rng.random() < 0.5)
        return "".join(items[i] for i in rng.permutation(len(items)))

    def vocabulary(self) -> list[str]:
        pairs = [f"{a}>{b};" for a in LETTERS for b in LETTERS]
        return [*LETTERS, *(f"#{n}:" for n in self.repeats), "~", "=", THINK, *pairs]

    def answer(self, question: str, context: str) -> str:
        return _apply(question, rules.parse_table(context.replace(THINK, "")))

    def default(self, question: str) -> str:
        return _apply(question, {letter: letter for letter in LETTERS})

    def respond(self, question: str, context: str | None, answer: str, rng: np.random.Generator) -> str:
        chances = DRAFTS[THINK in (context or "")]
        return f"~{answer[1:]}" * int(rng.choice(len(chances), p=chances)) + answer

    def grade(self, response: str, reference: str) -> Grade:
        found = re.fullmatch(r"(?:~[a-f]+)*(=[a-f]+)", response)
        if found is None:
            return Grade(None, False, "no answer")
        return Grade(found[1], found[1] == reference)

    def pretraining_facts(self) -> dict:
        return super().pretraining_facts() | {"drafts": list(DRAFTS.values())}

    def longest_pretraining_row(self) -> PretrainingRow:
        row = super().longest_pretraining_row()
        return row._replace(response=f"~{row.response[1:]}" * (len(DRAFTS[True]) - 1) + row.response)


def _apply(question: str, table: dict[str, str]) -> str:
    return "=" + "".join(table[letter] for letter in question[3:])
