"""A split's questions in all views, tokenized."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib, shapes as shapes_lib
from ctxjax.data.pipeline import encode_rows
from ctxjax.data.task import GameTask, Row, Task, longest_turns, make_evaluation_views
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import ModelFolder

# Two splits are padded to the same shapes if that costs the smaller at most 25 %: one compiled program serves both,
# and compiling takes longer than reading a few more columns or rows.
SLACK = 1.25
SHORT = 64  # columns that are read faster than another program is compiled, whatever share of them is padding


class Split(NamedTuple):
    """A split's questions in all views; ``name``: train, dev or test.

    By view: its ``rows``; its prompts' ``tokens``; ``prefixes``, the tokens that all of its prompts start with;
    ``columns``, the columns P that hold the rest of its prompts; ``opened``, whether its prompts end inside <think>.
    ``batch``: rows in a batch. ``dropped``: over-long rows that were left out. ``longest``: the tokens of every
    episode's longest turn; ``tokens`` itself if episodes have one turn.
    """

    task: Task
    rows: dict[str, list[Row]]
    tokens: dict[str, list[list[int]]]
    prefixes: dict[str, list[int]]
    columns: dict[str, int]
    opened: dict[str, list[bool]]
    batch: int
    dropped: int
    longest: dict[str, list[list[int]]]
    name: str = ""

    @classmethod
    def of(cls, config: Experiment, task: Task, name: str, folder: ModelFolder, mesh: Mesh) -> Split:
        """Tokenize the questions of the split called ``name``."""
        rows = task.rows(name)
        encoded = encode_rows(folder.tokenizer, rows, config.prompt, longest_turns(task, rows))
        rows = make_evaluation_views(task, encoded.rows, name)

        def encode(own: list[Row]) -> list[list[int]]:
            return prompts_lib.encode(folder.tokenizer, own, config.prompt)

        tokens = {v: encode(own) for v, own in rows.items()}
        longest = tokens
        if isinstance(task, GameTask):
            longest = {v: encode(longest_turns(task, own)) for v, own in rows.items()}
        opened = {
            v: [prompts_lib.opens_reasoning(folder.tokenizer, row, config.prompt) for row in own]
            for v, own in rows.items()
        }
        further = {} if longest is tokens else longest
        prefixes = {v: prompts_lib.choose_shared_prefix(lists + further.get(v, [])) for v, lists in tokens.items()}
        columns = {view: shape.columns for view, shape in shapes_lib.find_shapes(longest, prefixes).items()}
        # Views with a context block and no shared prefix: one compiled program decodes all that have one length.
        blocks = [view for view in tokens if view != "bare" and not prefixes[view]]
        columns |= level({view: columns[view] for view in blocks})
        batch = decoding.batch_size(len(encoded.rows), config.eval.batch_size, mesh)
        return cls(task, rows, tokens, prefixes, columns, opened, batch, encoded.dropped, longest, name)


def level(columns: dict[str, int]) -> dict[str, int]:
    """Raise the columns of views to the largest if they are near it, and short ones to the largest short one."""
    most = max(columns.values(), default=0)
    short = max((size for size in columns.values() if size <= SHORT), default=0)
    return {view: max(short, _raise_if_near(size, most)) for view, size in columns.items()}


def share_shapes(splits: list[Split]) -> list[Split]:
    """Raise the columns of each view and the rows of a batch to the largest split's if they are near it (``SLACK``)."""
    most_rows = max(split.batch for split in splits)
    most = {view: max(split.columns[view] for split in splits if view in split.columns) for view in splits[0].columns}
    return [
        split._replace(
            batch=_raise_if_near(split.batch, most_rows),
            columns={view: _raise_if_near(size, most.get(view, size)) for view, size in split.columns.items()},
        )
        for split in splits
    ]


def _raise_if_near(size: int, largest: int) -> int:
    return largest if largest <= SLACK * size else size


def have_same_questions(rows: list[Row], others: list[Row]) -> bool:
    """Whether the rows of two views ask the same; other contexts may have questions of their own."""
    return [row.question for row in rows] == [row.question for row in others]
