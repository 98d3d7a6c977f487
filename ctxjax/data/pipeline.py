"""Order and prefetch of training batches, by grain.

Row i of step s is a pure function of (seed, s): the position in the data is one integer, and starting at
any step costs nothing. Each epoch is a fresh permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import grain
import numpy as np

from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row, Task
from ctxjax.types import Batch


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """The rows of a split that fit, their token lists in both views, the length of each view's prompts, and what all
    prompts of a view start with where that is worth being read once for all (prompts.shared_prefix)."""

    rows: list[Row]
    bare: list[list[int]]
    context: list[list[int]]
    lengths: dict[str, int]
    prefixes: dict[str, list[int]]
    dropped: int


def encode_rows(tokenizer, rows: list[Row], config: PromptConfig) -> EncodedRows:
    """Renders and tokenizes both views of every row; over-long rows are an error or are dropped, as configured."""
    views = {
        "bare": prompts_lib.encode(tokenizer, [row._replace(context=None) for row in rows], config),
        "context": prompts_lib.encode(tokenizer, rows, config),
    }
    kept, lengths = prompts_lib.keep_fitting(rows, views, config)
    chosen = {view: [tokens[place] for place in kept] for view, tokens in views.items()}
    prefixes = {view: prompts_lib.shared_prefix(tokens) for view, tokens in chosen.items()}
    return EncodedRows(
        [rows[place] for place in kept],
        **chosen,
        lengths=lengths,
        prefixes=prefixes,
        dropped=len(rows) - len(kept),
    )


@dataclasses.dataclass(frozen=True)
class RetentionRows:
    """Questions under other contexts, (c', x'), drawn anew for every row of every step from the task's pool.

    ``length`` is the prompts' common length: prompt.max_context_tokens, or what the longest question needs under the
    longest context. ``prefix`` is what all prompts start with, as far as it is worth sharing: the template's head, or
    more where the contexts themselves begin alike. The rare pair that is longer, or starts otherwise, is drawn again.
    """

    tokenizer: object
    task: Task
    rows: list[Row]
    contexts: list[str]
    prompt: PromptConfig
    length: int
    prefix: list[int]

    @classmethod
    def of(cls, tokenizer, task: Task, encoded: EncodedRows, config: PromptConfig) -> RetentionRows:
        """Raises ValueError where the task has no other contexts to train on, or none that fits."""
        contexts = task.other_contexts("train")
        if not contexts:
            raise ValueError(
                "loss.mu > 0 needs other contexts to retain, and this task has none; give a file of them "
                "(qa_jsonl.other_contexts_file), or leave out the arms with retention (run_arms)"
            )
        longest = encoded.rows[int(np.argmax([len(tokens) for tokens in encoded.bare]))]
        trials = prompts_lib.encode(tokenizer, [longest._replace(context=c) for c in contexts], config)
        length = config.max_context_tokens or max(len(tokens) for tokens in trials)
        fitting = [context for context, tokens in zip(contexts, trials) if len(tokens) <= length]
        if not fitting:
            raise ValueError(
                f"none of the {len(contexts)} other contexts fits into prompt.max_context_tokens = {length} beside the "
                "longest question; raise the limit"
            )
        prefix = prompts_lib.shared_prefix(trials)
        if prefix:  # only then is it worth looking at all questions
            rows = [row._replace(context=fitting[0]) for row in encoded.rows]
            prefix = prompts_lib.shared_prefix(trials + prompts_lib.encode(tokenizer, rows, config))
        return cls(tokenizer, task, encoded.rows, fitting, config, length, prefix)

    def draw(self, seed: int, index: int) -> list[int]:
        """The tokens of retention row ``index`` of the run."""
        rng = np.random.default_rng([seed, index])
        while True:
            row, context = self.rows[rng.integers(len(self.rows))], self.contexts[rng.integers(len(self.contexts))]
            tokens = prompts_lib.encode(self.tokenizer, [self.task.swap_context(row, context)], self.prompt)[0]
            own = len(tokens) - len(self.prefix)
            if 0 < own <= self.length - len(self.prefix) and tokens[: len(self.prefix)] == self.prefix:
                return tokens


def order(count: int, seed: int) -> grain.MapDataset:
    """Which of ``count`` questions every row of the run asks, row ``batch_size * step`` the first of a step."""
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
    """Endless host batches (numpy) from step ``first_step`` on, prefetched by a thread."""

    def element(index: int, place: int):
        other = None
        if retention is not None and index % batch_size < retention_rows:
            other = retention.draw(seed, index)
        return encoded.bare[place], encoded.context[place], other, index

    def padded(tokens, view: str):
        return prompts_lib.left_pad(tokens, encoded.lengths[view], pad_id, encoded.prefixes[view])

    def collate(elements) -> Batch:
        bare, context, other, index = zip(*elements)
        others = [tokens for tokens in other if tokens is not None]
        return Batch(
            bare=padded(bare, "bare"),
            context=padded(context, "context"),
            other=prompts_lib.left_pad(others, retention.length, pad_id, retention.prefix) if others else None,
            row_number_B=np.asarray([i % 2**31 for i in index], np.int32),
        )

    batches = order(len(encoded.rows), seed).map_with_index(element).batch(batch_size, batch_fn=collate)
    batches = batches.slice(slice(first_step, None))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
