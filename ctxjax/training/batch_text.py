"""A training batch as text for the eye: every token apart, special ones and line breaks visible. Strings only."""

from __future__ import annotations

import dataclasses

from ctxjax.data.prompts import find_common_prefix, unpad
from ctxjax.types import Batch, Prompts, Rollout

BAR, NEWLINE, TAB = "│", "↵", "⇥"
INDENT = "    "
STYLES = {"special": "35", "trained": "32", "dim": "2", "title": "1"}  # escape codes of terminals
UNTRAINED = 2  # columns shown of those behind a response's end


@dataclasses.dataclass(frozen=True)
class Pen:
    """How tokens are written: in lines of ``width`` columns, and with escape codes only where ``colour``."""

    tokenizer: object
    width: int
    colour: bool

    def styled(self, text: str, style: str | None) -> str:
        return f"\033[{STYLES[style]}m{text}\033[0m" if self.colour and style else text

    def title(self, text: str) -> str:
        return self.styled(f"{text} {'─' * (self.width - len(text) - 1)}", "title")

    def label(self, name: str, facts: str) -> str:
        return f"{self.styled(name, 'title')}, {facts}"

    def text(self, token: int) -> str:
        """The token in letters that print; its id in angle brackets where it is not whole characters."""
        text = self.tokenizer.decode([token])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            return f"<{token}>"
        text = text.replace("\n", NEWLINE).replace("\t", TAB)
        # Data may hold commands to the terminal; none gets through.
        return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)

    def named(self, token: int) -> str:
        return f"{self.text(token)} ({token})"

    def row(self, cells: list[str]) -> str:
        return self.styled(BAR, "dim").join(cells)

    def prompt(self, tokens: list[int]) -> list[str]:
        """Lines with the tokens between bars; a line break in the text is one on the screen."""
        texts = [self.text(token) for token in tokens]
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        cells = [self.styled(text, "special" if token in special else None) for text, token in zip(texts, tokens)]
        breaks = [text.endswith(NEWLINE) for text in texts]
        lines = _wrapped([len(text) for text in texts], breaks, self.width - len(INDENT))
        return [INDENT + self.row([cells[place] for place in line]) for line in lines]

    def response(self, tokens: list[int], mask: list[bool]) -> list[str]:
        """Blocks of three lines: the tokens, their ids, and 1 for those that are trained on."""
        table = [(self.text(token), str(token), str(int(on))) for token, on in zip(tokens, mask)]
        widths = [max(len(text) for text in column) for column in table]
        lines = []
        for places in _wrapped(widths, [False] * len(table), self.width - len(INDENT) - len("token  ")):
            for number, name in enumerate(("token", "id", "mask")):
                cells = [table[p][number].ljust(widths[p]) for p in places]
                styles = ["trained" if mask[p] else "dim" for p in places]
                lines.append(f"{INDENT}{name:<6} {self.row([self.styled(c, s) for c, s in zip(cells, styles)])}")
        return lines


def _wrapped(widths: list[int], breaks: list[bool], room: int) -> list[list[int]]:
    """The cells' places by line: as many to a line as fit with a bar behind each, and none behind a break."""
    lines, used = [[]], 0
    for place, width in enumerate(widths):
        if lines[-1] and used + width > room:
            lines.append([])
            used = 0
        lines[-1].append(place)
        used += width + 1
        if breaks[place]:
            lines.append([])
            used = 0
    return [line for line in lines if line]


def _sizes(prompts: Prompts, row: int) -> str:
    real, columns = int(prompts.mask_BxP[row].sum()), prompts.mask_BxP.shape[1]
    return f"{real} tokens, behind {columns - real} of padding" if real < columns else f"{real} tokens, no padding"


def first_batch(
    pen: Pen, batch: Batch, stop_ids: tuple[int, ...], responses: Rollout, other_responses: Rollout | None
) -> str:
    """The batch's shapes, the context's tokens that all rows share, and as many of its rows as have ``responses``.

    All arrays are on the host, and prompts are spelled out. ``other_responses`` are those to ``batch.other``, and None
    where it is None.
    """
    bare, context = unpad(batch.bare), unpad(batch.context)
    prefix = find_common_prefix(context)
    shared = f"the first {len(prefix)} tokens of every context prompt" if prefix else "none, the context prompts differ"
    lines = [pen.title("First training batch"), *_overview(pen, batch, stop_ids), ""]
    lines += [pen.title(f"Shared context prefix: {shared}"), *pen.prompt(prefix)]
    for row in range(len(responses.tokens_BxT)):
        told = len(prefix) if len(context[row]) > len(prefix) else 0
        lines += ["", pen.title(f"Row {row + 1}")]
        lines += [pen.label("bare view", f"read by the student: {_sizes(batch.bare, row)}"), *pen.prompt(bare[row])]
        lines += [pen.label("context view", f"read by the teacher: {_sizes(batch.context, row)}")]
        lines += [INDENT + pen.styled(f"[the shared prefix, {told} tokens]", "dim")] * (told > 0)
        lines += [*pen.prompt(context[row][told:]), _parting(pen, bare[row], context[row])]
        lines += _response(pen, responses, row, stop_ids)
        if other_responses is not None and row < len(other_responses.tokens_BxT):
            lines += [pen.label("retention", f"another context, read by both: {_sizes(batch.other, row)}")]
            lines += [*pen.prompt(unpad(batch.other)[row]), *_response(pen, other_responses, row, stop_ids)]
    return "\n".join(lines)


def _overview(pen: Pen, batch: Batch, stop_ids: tuple[int, ...]) -> list[str]:
    lines = [f"{'view':<10}{'rows':>6}{'columns':>9}{'tokens':>16}{'padding':>10}"]
    for name, prompts in (("bare", batch.bare), ("context", batch.context), ("retention", batch.other)):
        if prompts is not None:
            (rows, columns), tokens = prompts.mask_BxP.shape, prompts.mask_BxP.sum(axis=1)
            span, share = f"{tokens.min()} to {tokens.max()}", f"{100 * (1 - prompts.mask_BxP.mean()):.1f} %"
            lines.append(f"{name:<10}{rows:>6}{columns:>9}{span:>16}{share:>10}")
    ends = ", ".join(pen.named(token) for token in stop_ids)
    return [*lines, f"A response ends at {ends}. Below, {BAR} stands between tokens, {NEWLINE} for a line break."]


def _parting(pen: Pen, bare: list[int], context: list[int]) -> str:
    place = len(find_common_prefix([bare, context]))
    if bare == context:
        return pen.label("first difference", "none, the teacher sees what the student sees")
    first, second = (pen.named(view[place]) if place < len(view) else "nothing" for view in (bare, context))
    return pen.label("first difference", f"token {place + 1} is {first} in the bare, {second} in the context view")


def _response(pen: Pen, responses: Rollout, row: int, stop_ids: tuple[int, ...]) -> list[str]:
    tokens, mask = responses.tokens_BxT[row], responses.mask_BxT[row]
    trained = int(mask.sum())
    end = "to the end token" if tokens[trained - 1] in stop_ids else "cut at the limit"
    shown = slice(trained + UNTRAINED)
    return [
        pen.label("response", f"sampled from the student: {trained} of {len(mask)} columns are trained on, {end}"),
        *pen.response(tokens[shown].tolist(), mask[shown].tolist()),
    ]
