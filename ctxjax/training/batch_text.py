"""Format a training batch as text, token by token; special tokens and line breaks are visible. Makes strings only."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from ctxjax.data import responses
from ctxjax.data.prompts import find_common_prefix, unpad
from ctxjax.types import Batch, Prompts, Rollout

BAR, NEWLINE, TAB = "│", "↵", "⇥"
INDENT = "    "
STYLES = {"special": "35", "trained": "32", "dim": "2", "title": "1"}  # escape codes of terminals
UNTRAINED = 2  # columns shown after a response's end


@dataclasses.dataclass(frozen=True)
class Formatter:
    """Format tokens in lines of ``width`` columns, with escape codes only if ``colour``."""

    tokenizer: object
    width: int
    colour: bool

    def add_style(self, text: str, style: str | None) -> str:
        return f"\033[{STYLES[style]}m{text}\033[0m" if self.colour and style else text

    def format_title(self, text: str) -> str:
        return self.add_style(f"{text} {'─' * (self.width - len(text) - 1)}", "title")

    def format_label(self, name: str, facts: str) -> str:
        return f"{self.add_style(name, 'title')}, {facts}"

    def format_token(self, token: int) -> str:
        """Return the token in printable characters, or its id in angle brackets if it is not whole characters."""
        text = self.tokenizer.decode([token])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            return f"<{token}>"
        return responses.make_printable(text.replace("\n", NEWLINE).replace("\t", TAB))

    def format_token_and_id(self, token: int) -> str:
        return f"{self.format_token(token)} ({token})"

    def join_cells(self, cells: list[str]) -> str:
        return self.add_style(BAR, "dim").join(cells)

    def format_prompt(self, tokens: list[int]) -> list[str]:
        """Return lines of tokens separated by bars. A line break in the text also starts a new line."""
        texts = [self.format_token(token) for token in tokens]
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        cells = [self.add_style(text, "special" if token in special else None) for text, token in zip(texts, tokens)]
        breaks = [text.endswith(NEWLINE) for text in texts]
        lines = _wrap([len(text) for text in texts], breaks, self.width - len(INDENT))
        return [INDENT + self.join_cells([cells[index] for index in line]) for line in lines]

    def format_response(self, tokens: list[int], mask: list[bool]) -> list[str]:
        """Return blocks of three lines: the tokens, their ids, and 1 under those that are trained on."""
        table = [(self.format_token(token), str(token), str(int(on))) for token, on in zip(tokens, mask)]
        widths = [max(len(text) for text in column) for column in table]
        lines = []
        for columns in _wrap(widths, [False] * len(table), self.width - len(INDENT) - len("token  ")):
            for number, name in enumerate(("token", "id", "mask")):
                cells = [table[column][number].ljust(widths[column]) for column in columns]
                styles = ["trained" if mask[column] else "dim" for column in columns]
                styled = [self.add_style(cell, style) for cell, style in zip(cells, styles)]
                lines.append(f"{INDENT}{name:<6} {self.join_cells(styled)}")
        return lines


def _wrap(widths: list[int], breaks: list[bool], room: int) -> list[list[int]]:
    """Return the indices of the cells of each line.

    A line gets as many cells as fit into ``room`` columns, each followed by a bar; it ends after a cell with a break.
    """
    lines, used = [[]], 0
    for index, width in enumerate(widths):
        if lines[-1] and used + width > room:
            lines.append([])
            used = 0
        lines[-1].append(index)
        used += width + 1
        if breaks[index]:
            lines.append([])
            used = 0
    return [line for line in lines if line]


class Sampled(NamedTuple):
    """The responses of the first rows. ``source``: who has said them, and the arms that are trained on them.
    ``trained_BxT``: the tokens that are trained on, which may be fewer than those of the responses."""

    source: str
    rollout: Rollout
    trained_BxT: np.ndarray


def format_batch(
    formatter: Formatter,
    batch: Batch,
    stop_ids: tuple[int, ...],
    responses: Sequence[Sampled],
    other_responses: Sampled | None,
) -> str:
    """Return the batch's shapes, the shared context prefix, and the first rows: one for each row of ``responses``.

    All arrays are on the host, and prompts contain the shared prefix. ``other_responses``: the responses to
    ``batch.other``, or None if that is None.
    """
    bare, context = unpad(batch.bare), unpad(batch.context)
    prefix = find_common_prefix(context)
    shared = f"the first {len(prefix)} tokens of every context prompt" if prefix else "none, the context prompts differ"
    title, label, prompt = formatter.format_title, formatter.format_label, formatter.format_prompt
    lines = [title("First training batch"), *_format_overview(formatter, batch, stop_ids), ""]
    lines += [title(f"Shared context prefix: {shared}"), *prompt(prefix)]
    for row in range(len(responses[0].rollout.tokens_BxT)):
        hidden = len(prefix) if len(context[row]) > len(prefix) else 0
        lines += ["", title(f"Row {row + 1}")]
        lines += [label("bare view", f"read by the student: {_format_sizes(batch.bare, row)}"), *prompt(bare[row])]
        lines += [label("context view", f"read by the teacher: {_format_sizes(batch.context, row)}")]
        lines += [INDENT + formatter.add_style(f"[the shared prefix, {hidden} tokens]", "dim")] * (hidden > 0)
        lines += [*prompt(context[row][hidden:]), _format_difference(formatter, bare[row], context[row])]
        for sampled in responses:
            lines += _format_response(formatter, sampled, row, stop_ids)
        if other_responses is not None and row < len(other_responses.rollout.tokens_BxT):
            lines += [label("retention", f"another context, read by both: {_format_sizes(batch.other, row)}")]
            lines += [*prompt(unpad(batch.other)[row]), *_format_response(formatter, other_responses, row, stop_ids)]
    return "\n".join(lines)


def _format_overview(formatter: Formatter, batch: Batch, stop_ids: tuple[int, ...]) -> list[str]:
    lines = [f"{'view':<10}{'rows':>6}{'columns':>9}{'tokens':>16}{'padding':>10}"]
    for name, prompts in (("bare", batch.bare), ("context", batch.context), ("retention", batch.other)):
        if prompts is not None:
            (rows, columns), tokens = prompts.mask_BxP.shape, prompts.mask_BxP.sum(axis=1)
            span, share = f"{tokens.min()} to {tokens.max()}", f"{100 * (1 - prompts.mask_BxP.mean()):.1f} %"
            lines.append(f"{name:<10}{rows:>6}{columns:>9}{span:>16}{share:>10}")
    ends = ", ".join(formatter.format_token_and_id(token) for token in stop_ids)
    return [*lines, f"A response ends at {ends}. Below, {BAR} separates tokens, and {NEWLINE} is a line break."]


def _format_sizes(prompts: Prompts, row: int) -> str:
    real, columns = int(prompts.mask_BxP[row].sum()), prompts.mask_BxP.shape[1]
    return f"{real} tokens after {columns - real} of padding" if real < columns else f"{real} tokens, no padding"


def _format_difference(formatter: Formatter, bare: list[int], context: list[int]) -> str:
    index = len(find_common_prefix([bare, context]))
    if bare == context:
        return formatter.format_label("first difference", "none, the teacher sees what the student sees")
    first, second = (
        formatter.format_token_and_id(view[index]) if index < len(view) else "nothing" for view in (bare, context)
    )
    return formatter.format_label(
        "first difference", f"token {index + 1} is {first} in the bare, {second} in the context view"
    )


def _format_response(formatter: Formatter, sampled: Sampled, row: int, stop_ids: tuple[int, ...]) -> list[str]:
    tokens, mask = sampled.rollout.tokens_BxT[row], sampled.trained_BxT[row]
    length = int(sampled.rollout.mask_BxT[row].sum())
    end = "to the end token" if length and tokens[length - 1] in stop_ids else "cut at the limit"
    shown = slice(length + UNTRAINED)
    facts = f"sampled from {sampled.source}: {int(mask.sum())} of {len(mask)} columns are trained on, {end}"
    return [
        formatter.format_label("response", facts),
        *formatter.format_response(tokens[shown].tolist(), mask[shown].tolist()),
    ]
