"""A way to reply, to be learned by heart: a system prompt demands it of every reply, and a check judges each reply.

``styles.jsonl`` has the demands, each with another wording and its check (data/grading/response_checks.py). The
questions are everyday ones, and have no right answer. Other contexts are other demands with their own checks, as for
all tasks over files. No topic that is asked about in one split is asked about in another.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
from pathlib import Path

import numpy as np

from ctxjax.data import splits
from ctxjax.data.contexts import ContextConfig, Contexts, OtherContextsConfig
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.response_checks import Check, grade_check, parse_check
from ctxjax.data.records import Reader, RecordsConfig, hash_text
from ctxjax.data.task import Row
from ctxjax.data.tasks.file_task import FileTask, Question
from ctxjax.types import bounded

STYLES_FILE = Path(__file__).parents[1] / "styles.jsonl"
UNRELATED = "This chat takes place on a rainy afternoon in October. The user writes from a telephone."
# Frames of questions, and what they ask about.
TOPICS = {
    ("How do I {}?", "What do I need to {}?", "Why do people {}?", "Give me a tip to {}."): (
        "bake bread", "boil an egg", "brush a dog", "build a fire", "clean a window", "climb a hill", "cook rice",
        "cross a river", "draw a horse", "dry herbs", "feed a cat", "fix a chair", "fly a kite", "grow tomatoes",
        "iron a shirt", "keep bees", "knit a scarf", "learn a song", "light a candle", "make jam", "mend a sock",
        "mow a lawn", "pack a suitcase", "paint a door", "pick apples", "plan a party", "plant a tree", "play chess",
        "polish shoes", "read a map", "repair a bicycle", "ride a horse", "row a boat", "save money", "set a table",
        "sharpen a knife", "sleep well", "solve a puzzle", "start a garden", "store potatoes", "sweep a floor",
        "swim faster", "tell a story", "tie a knot", "train a puppy", "wash a car", "wrap a gift", "write a letter",
    ),
    ("What is {}?", "What is {} good for?", "Where can I find {}?", "Tell me something about {}."): (
        "a balcony", "a barn", "a basket", "a bell", "a blanket", "a bridge", "a broom", "a bucket", "a calendar",
        "a cabin", "a canoe", "a carpet", "a castle", "a chimney", "a clock", "a compass", "a curtain", "a drum",
        "a fence", "a flute", "a fountain", "a glove", "a hammer", "a harbour", "a kettle", "a ladder", "a lantern",
        "a library", "a lighthouse", "a magnet", "a market", "a mirror", "a museum", "a needle", "a notebook",
        "a pillow", "a pond", "a ruler", "a saddle", "a sail", "a scale", "a shovel", "a stove", "a telescope",
        "a tent", "a ticket", "a tunnel", "an umbrella",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyleConfig(OtherContextsConfig):
    """See configs/base.py, ``config.style``. ``*_questions`` limit each split; 0: no limit."""

    demand: str
    train_questions: int = bounded(zero=True)
    dev_questions: int = bounded(zero=True)
    test_questions: int = bounded(zero=True)
    records: RecordsConfig = RecordsConfig()


@dataclasses.dataclass(frozen=True)
class Demand:
    """A way to reply: a line of styles.jsonl. ``context`` asks for it, and so does ``paraphrase``."""

    context: str
    paraphrase: str
    check: Check


def read_demands() -> dict[str, Demand]:
    """Return the demands by name."""
    demands = {}
    for line in STYLES_FILE.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        name, paraphrase = entry.pop("name"), entry.pop("paraphrase")
        demands[name] = Demand(entry["context"], paraphrase, parse_check(entry, f"{STYLES_FILE.name}, {name}"))
    return demands


def list_questions() -> list[tuple[str, str]]:
    """Return everyday questions, (topic, text) each."""
    return [(topic, frame.format(topic)) for frames, topics in TOPICS.items() for topic in topics for frame in frames]


class Style(FileTask):
    """The task of one demand. Every row has the demand's check in place of a reference."""

    def __init__(self, config: StyleConfig):
        demands = read_demands()
        if config.demand not in demands:
            raise ValueError(f"style.demand = {config.demand!r} is not known; choose from {', '.join(demands)}")
        self.demand = demands[config.demand]
        self._topics = {text: topic for topic, text in list_questions()}
        source = ContextConfig(
            context=self.demand.context,
            context_file="",
            context_files=(),
            context_seed=0,
            other_contexts_file=config.other_contexts_file,
        )
        super().__init__(config, "style", Contexts(source, "style"))
        self.pool.require_checks("style.other_contexts_file")

    def read_questions(self, reader: Reader) -> Iterator[tuple[str, str, Question]]:
        for topic, text in list_questions():
            yield splits.assign_split(topic), hash_text(text)[:16], Question(text, text, "")

    def make_row(self, row_id: str, question: Question) -> Row:
        return super().make_row(row_id, question)._replace(check=self.demand.check)

    def grade(self, response: str, reference: str) -> Grade:
        return grade_check(self.demand.check, response)

    def group(self, row: Row) -> str:
        return self._topics[row.question]

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str:
        return self.demand.paraphrase

    def unrelated(self) -> str:
        return UNRELATED
