"""Training batches: encoded, shuffled and prefetched with grain.

Row i of step s is a pure function of (seed, s). So the position in the data is one integer, and a run can start at any
step at no cost. Each epoch is a new permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
from typing import NamedTuple

import grain
import numpy as np

from ctxjax.data import prompts as prompts_lib, shapes as shapes_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.shapes import ViewShape
from ctxjax.data.task import Row, Task, longest_turns
from ctxjax.types import Batch

# Pairs of question and other context that are drawn for one retention row before it is an error.
DRAWS = 1000
MOST_QUESTIONS = 2**20  # numbers that choose a question under a context


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """The rows of a split that fit the length limits, tokenized in both views.

    ``bare``, ``context``: token ids of every row's prompt, without and with the context. ``prefixes``: the shared
    prefix of each view's prompts, or [] (prompts.choose_shared_prefix). ``dropped``: how many rows were too long.
    ``longest``: by view, the token ids of every episode's longest turn; the prompts themselves if it has one turn.
    """

    rows: list[Row]
    bare: list[list[int]]
    context: list[list[int]]
    prefixes: dict[str, list[int]]
    dropped: int
    longest: dict[str, list[list[int]]]

    @functools.cached_property
    def shapes(self) -> dict[str, ViewShape]:
        """The shape of each view's prompts in a batch."""
        return shapes_lib.find_shapes(self.longest, self.prefixes)

    @property
    def saved_tokens(self) -> int:
        """How much shorter a prompt is without the context, in tokens: the median of the rows."""
        return int(np.median([len(own) - len(bare) for own, bare in zip(self.context, self.bare)]))

    def describe_outliers(self) -> str:
        """Return a warning if a few long rows pad all others (shapes.describe_outliers)."""
        return shapes_lib.describe_outliers(self.longest, self.prefixes)


def encode_rows(tokenizer, rows: list[Row], config: PromptConfig, longest: list[Row] | None = None) -> EncodedRows:
    """Render and tokenize both views of every row. Too long rows are an error or are dropped, as configured.

    ``longest``: the longest turn of every row's episode (task.longest_turns), by default the row itself. A row is as
    long as that, and both start with the shared prefix.
    """

    def encode_views(rows: list[Row]) -> dict[str, list[list[int]]]:
        bare = prompts_lib.encode(tokenizer, [row._replace(context=None) for row in rows], config)
        return {"bare": bare, "context": prompts_lib.encode(tokenizer, rows, config)}

    def choose(views: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {view: [tokens[index] for index in kept] for view, tokens in views.items()}

    first = encode_views(rows)
    whole = first if longest in (None, rows) else encode_views(longest)
    kept = prompts_lib.keep_fitting_rows(rows, whole, config)
    chosen = choose(first)
    ends = chosen if whole is first else choose(whole)
    alike = chosen if whole is first else {view: chosen[view] + ends[view] for view in chosen}
    prefixes = {view: prompts_lib.choose_shared_prefix(tokens) for view, tokens in alike.items()}
    dropped = len(rows) - len(kept)
    return EncodedRows([rows[index] for index in kept], **chosen, prefixes=prefixes, dropped=dropped, longest=ends)


class OtherRow(NamedTuple):
    """A retention row: the places of a training row and of another context, and a number that chooses among the
    questions that may be asked under this context (modulo their count)."""

    row: int
    context: int
    question: int


@dataclasses.dataclass(frozen=True)
class RetentionRows:
    """Questions under other contexts, (c', x'): a new pair is drawn from the task's pool for every row of every step.

    ``longest``: the prompts of the longest question under every context that fits, or of the context's own questions if
    it has some. No prompt is longer than the longest of them. ``prefix``: the shared prefix of all prompts, or []
    (prompts.choose_shared_prefix). A pair that is longer or does not start with ``prefix`` is rare; another one is
    drawn. ``left_out``: contexts that are too long for prompt.max_context_tokens.
    """

    tokenizer: object
    task: Task
    rows: list[Row]
    contexts: list[str]
    prompt: PromptConfig
    longest: list[list[int]]
    prefix: list[int]
    left_out: int

    @classmethod
    def build(cls, tokenizer, task: Task, encoded: EncodedRows, config: PromptConfig) -> RetentionRows:
        """Collect the contexts that fit, of a task that has some (contexts.check_retention). Raises ValueError if none
        fits."""
        contexts = task.other_contexts("train")
        longest = encoded.rows[int(np.argmax([len(tokens) for tokens in encoded.bare]))]
        asked = [row for context in contexts for row in task.rows_under(longest, context)]
        asked = longest_turns(task, asked)
        prompts = zip(asked, prompts_lib.encode(tokenizer, asked, config))
        limit = config.max_context_tokens or np.inf
        trials = [(row.context, tokens) for row, tokens in prompts if len(tokens) <= limit]
        fitting = list(dict.fromkeys(context for context, _ in trials))
        if not fitting:
            raise ValueError(
                f"none of the {len(contexts)} other contexts fits into prompt.max_context_tokens = {limit} together "
                "with the longest question; raise the limit"
            )
        trials = [tokens for _, tokens in trials]
        prefix = prompts_lib.choose_shared_prefix(trials)
        if prefix:  # encoding all questions is slow, so do it only if there is a prefix to confirm
            rows = list(dict.fromkeys(under for row in encoded.rows for under in task.rows_under(row, fitting[0])))
            prefix = prompts_lib.choose_shared_prefix(trials + prompts_lib.encode(tokenizer, rows, config))
        return cls(tokenizer, task, encoded.rows, fitting, config, trials, prefix, len(contexts) - len(fitting))

    @functools.cached_property
    def shape(self) -> ViewShape:
        """The shape of the prompts in a batch."""
        return shapes_lib.find_shapes({"other": self.longest}, {"other": self.prefix})["other"]

    def describe_outliers(self) -> str:
        """Return a warning if a few long contexts pad all rows (shapes.describe_outliers)."""
        return shapes_lib.describe_outliers({"other": self.longest}, {"other": self.prefix})

    def find_row(self, drawn: OtherRow) -> Row:
        """Return what was drawn: a question under another context."""
        asked = self.task.rows_under(self.rows[drawn.row], self.contexts[drawn.context])
        return asked[drawn.question % len(asked)]

    def draw(self, seed: int, index: int) -> tuple[list[int], OtherRow]:
        """Return the tokens of retention row ``index`` of the run, and what was drawn.

        Raises ValueError if DRAWS pairs do not fit.
        """
        rng, shared = np.random.default_rng([seed, index]), len(self.prefix)
        for _ in range(DRAWS):
            drawn = draw_other(rng, len(self.rows), len(self.contexts))
            rows = [self.find_row(drawn)]
            longest = longest_turns(self.task, rows)
            read = prompts_lib.encode(self.tokenizer, rows if longest is rows else rows + longest, self.prompt)
            if all(shared < len(ids) <= self.shape.longest and ids[:shared] == self.prefix for ids in read):
                return read[0], drawn
        raise ValueError(
            f"retention row {index}: {DRAWS} pairs of {len(self.rows)} questions and {len(self.contexts)} other "
            f"contexts were drawn, and no prompt has at most {self.shape.longest} tokens, those of the longest "
            f"question under the longest context, and starts with the {shared} tokens that all share; leave out long "
            "questions (prompt.max_bare_tokens with prompt.overlong=drop) or unusual contexts (other_contexts_file)"
        )


def draw_other(rng: np.random.Generator, rows: int, contexts: int) -> OtherRow:
    """Draw a retention row among ``rows`` training rows and ``contexts`` other contexts."""
    return OtherRow(int(rng.integers(rows)), int(rng.integers(contexts)), int(rng.integers(MOST_QUESTIONS)))


def shuffle_questions(count: int, seed: int) -> grain.MapDataset:
    """Return the question index, below ``count``, of every row of the run. A step starts at ``batch_size * step``."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


class Drawn(NamedTuple):
    """What is drawn for a step: its batch on the host (numpy), and what was drawn for each row of
    ``batch.other``."""

    batch: Batch
    others: list[OtherRow]


def training_batches(*inputs, **options) -> Iterator[Batch]:
    """Return the batches of ``draw_steps``, which has the same arguments."""
    return (drawn.batch for drawn in draw_steps(*inputs, **options))


def draw_steps(
    encoded: EncodedRows,
    retention: RetentionRows | None,
    *,
    seed: int,
    batch_size: int,
    retention_rows: int,
    pad_id: int,
    first_step: int = 0,
) -> Iterator[Drawn]:
    """Return an endless iterator over the steps, starting at ``first_step``; a thread prefetches."""

    def take_row(row_number: int, question: int):
        other = None
        if retention is not None and row_number % batch_size < retention_rows:
            other = retention.draw(seed, row_number)
        return encoded.bare[question], encoded.context[question], other, row_number

    def pad(tokens, view: str):
        return prompts_lib.left_pad(tokens, encoded.shapes[view].columns, pad_id, encoded.prefixes[view])

    def collate(rows) -> Drawn:
        bare, context, other, row_numbers = zip(*rows)
        drawn = [row for row in other if row is not None]
        others = [tokens for tokens, _ in drawn]
        batch = Batch(
            bare=pad(bare, "bare"),
            context=pad(context, "context"),
            other=prompts_lib.left_pad(others, retention.shape.columns, pad_id, retention.prefix) if others else None,
            row_number_B=np.asarray([number % 2**31 for number in row_numbers], np.int32),
        )
        return Drawn(batch, [other for _, other in drawn])

    batches = shuffle_questions(len(encoded.rows), seed).map_with_index(take_row).batch(batch_size, batch_fn=collate)
    batches = batches.slice(slice(first_step, None))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
