"""From tokens to text: responses as people and graders read them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from ctxjax.data import prompts
from ctxjax.data.grading.graders import READ_TAGS
from ctxjax.data.grading.reasoning import CLOSE_REASONING, OPEN_REASONING, rename_reasoning


def decode(tokenizer, token_lists: Iterable[Sequence[int]], stop_ids: Iterable[int]) -> list[str]:
    """Decode responses without their end tokens and without control tokens (prompts.find_control_tokens).

    Other special tokens are part of the text: some tokenizers declare <answer> special, and a grader looks for it. The
    tags of the reasoning are <think> and </think> in every family.
    """
    tags = {index for token, index in tokenizer.get_added_vocab().items() if token in READ_TAGS}
    hidden = {*stop_ids, *prompts.find_control_tokens(tokenizer).values()} - tags
    kept = [[int(token) for token in tokens if int(token) not in hidden] for tokens in token_lists]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [rename_reasoning(text) for text in texts]


def find_answer(tokenizer, tokens: Sequence[int], stop_ids: Iterable[int], opened: bool) -> int:
    """Return the place of the first token after the reasoning and the white space that follows it.

    It is 0 if there is no reasoning, and len(tokens) if the reasoning does not end or no answer follows it. ``opened``:
    the prompt ends inside <think>.
    """

    def read(part: Sequence[int]) -> str:
        return decode(tokenizer, [part], stop_ids)[0]

    text = read(tokens)
    closed = text.count(CLOSE_REASONING)
    if not closed:
        return len(tokens) if opened or OPEN_REASONING in text else 0
    sizes = range(len(tokens) + 1)
    place = bisect.bisect_left(sizes, closed, key=lambda size: read(tokens[:size]).count(CLOSE_REASONING))
    while place < len(tokens) and not read(tokens[place : place + 1]).strip() and tokens[place] not in stop_ids:
        place += 1
    said = read(tokens[place:])
    return place if said.strip() and OPEN_REASONING not in said else len(tokens)


def make_printable(text: str) -> str:
    """Return the text for a terminal. Escape sequences in it are shown, not sent; line breaks stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}" for letter in text)
