"""Training batches: encoded, shuffled and prefetched with grain.

Row i of step s is a pure function of (seed, s). So the position in the data is one integer, and a run can start at any
step at no cost. Each epoch is a new permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import grain
import numpy as np

from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row, Task, longest_turns
from ctxjax.types import Batch


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """The rows of a split that fit the length limits, tokenized in both views.

    ``bare``, ``context``: token ids of every row's prompt, without and with the context. ``lengths``: the prompt length
    of each view, in tokens. ``prefixes``: the shared prefix of each view's prompts, or []
    (prompts.choose_shared_prefix). ``dropped``: how many rows were too long.
    """

    rows: list[Row]
    bare: list[list[int]]
    context: list[list[int]]
    lengths: dict[str, int]
    prefixes: dict[str, list[int]]
    dropped: int


def encode_rows(tokenizer, rows: list[Row], config: PromptConfig, longest: list[Row] | None = None) -> EncodedRows:
    """Render and tokenize both views of every row. Too long rows are an error or are dropped, as configured.

    ``longest``: the longest turn of every row's episode (task.longest_turns), by default the row itself. A row is as
    long as that, and both start with the shared prefix.
    """

    def encode_views(rows: list[Row]) -> dict[str, list[list[int]]]:
        bare = prompts_lib.encode(tokenizer, [row._replace(context=None) for row in rows], config)
        return {"bare": bare, "context": prompts_lib.encode(tokenizer, rows, config)}

    views = encode_views(rows)
    further = {view: [] for view in views} if longest in (None, rows) else encode_views(longest)
    kept, lengths = prompts_lib.keep_fitting_rows(rows, {v: further[v] or views[v] for v in views}, config)
    chosen = {view: [tokens[index] for index in kept] for view, tokens in views.items()}
    prefixes = {view: prompts_lib.choose_shared_prefix(tokens + further[view]) for view, tokens in chosen.items()}
    return EncodedRows(
        [rows[index] for index in kept],
        **chosen,
        lengths=lengths,
        prefixes=prefixes,
        dropped=len(rows) - len(kept),
    )


@dataclasses.dataclass(frozen=True)
class RetentionRows:
    """Questions under other contexts, (c', x'): a new pair is drawn from the task's pool for every row of every step.

    ``length``: the length of all prompts, prompt.max_context_tokens or else that of the longest question under the
    longest context, in tokens. ``prefix``: the shared prefix of all prompts, or [] (prompts.choose_shared_prefix). A
    pair that is longer or does not start with ``prefix`` is rare; it is drawn again.
    """

    tokenizer: object
    task: Task
    rows: list[Row]
    contexts: list[str]
    prompt: PromptConfig
    length: int
    prefix: list[int]

    @classmethod
    def build(cls, tokenizer, task: Task, encoded: EncodedRows, config: PromptConfig) -> RetentionRows:
        """Collect the contexts that fit. Raises ValueError if the task has no training contexts, or if none fits."""
        contexts = task.other_contexts("train")
        if not contexts:
            raise ValueError(
                "loss.mu > 0 needs other contexts to retain, and this task has none; give a file of them "
                "(qa_jsonl.other_contexts_file), or leave out the arms with retention (run_arms)"
            )
        longest = encoded.rows[int(np.argmax([len(tokens) for tokens in encoded.bare]))]
        trials = longest_turns(task, [longest._replace(context=c) for c in contexts])
        trials = prompts_lib.encode(tokenizer, trials, config)
        length = config.max_context_tokens or max(len(tokens) for tokens in trials)
        fitting = [context for context, tokens in zip(contexts, trials) if len(tokens) <= length]
        if not fitting:
            raise ValueError(
                f"none of the {len(contexts)} other contexts fits into prompt.max_context_tokens = {length} together "
                "with the longest question; raise the limit"
            )
        prefix = prompts_lib.choose_shared_prefix(trials)
        if prefix:  # encoding all questions is slow, so do it only if there is a prefix to confirm
            rows = [row._replace(context=fitting[0]) for row in encoded.rows]
            prefix = prompts_lib.choose_shared_prefix(trials + prompts_lib.encode(tokenizer, rows, config))
        return cls(tokenizer, task, encoded.rows, fitting, config, length, prefix)

    def draw(self, seed: int, index: int) -> list[int]:
        """Return the tokens of retention row ``index`` of the run."""
        return self._draw(seed, index)[1]

    def draw_row(self, seed: int, index: int) -> Row:
        """Return retention row ``index`` of the run itself: the first turn of an episode under another context."""
        return self._draw(seed, index)[0]

    def _draw(self, seed: int, index: int) -> tuple[Row, list[int]]:
        rng = np.random.default_rng([seed, index])
        while True:
            row, context = self.rows[rng.integers(len(self.rows))], self.contexts[rng.integers(len(self.contexts))]
            row = self.task.swap_context(row, context)
            (longest,) = longest_turns(self.task, [row])
            tokens = prompts_lib.encode(self.tokenizer, [longest], self.prompt)[0]
            own = len(tokens) - len(self.prefix)
            if 0 < own <= self.length - len(self.prefix) and tokens[: len(self.prefix)] == self.prefix:
                return row, tokens


def shuffle_questions(count: int, seed: int) -> grain.MapDataset:
    """Return the question index, below ``count``, of every row of the run. A step starts at ``batch_size * step``."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def training_batches(
    encoded: EncodedRows,
    retention: RetentionRows | None,
    *,
    seed: int,
    batch_size: int,
    retention_rows: int,
    pad_id: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Return an endless iterator of host batches (numpy), starting at ``first_step``; a thread prefetches."""

    def take_row(row_number: int, question: int):
        other = None
        if retention is not None and row_number % batch_size < retention_rows:
            other = retention.draw(seed, row_number)
        return encoded.bare[question], encoded.context[question], other, row_number

    def pad(tokens, view: str):
        return prompts_lib.left_pad(tokens, encoded.lengths[view], pad_id, encoded.prefixes[view])

    def collate(rows) -> Batch:
        bare, context, other, row_numbers = zip(*rows)
        others = [tokens for tokens in other if tokens is not None]
        return Batch(
            bare=pad(bare, "bare"),
            context=pad(context, "context"),
            other=prompts_lib.left_pad(others, retention.length, pad_id, retention.prefix) if others else None,
            row_number_B=np.asarray([number % 2**31 for number in row_numbers], np.int32),
        )

    batches = shuffle_questions(len(encoded.rows), seed).map_with_index(take_row).batch(batch_size, batch_fn=collate)
    batches = batches.slice(slice(first_step, None))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
