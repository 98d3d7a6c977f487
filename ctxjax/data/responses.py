"""From tokens to text: responses as people and graders read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ctxjax.data import prompts
from ctxjax.data.grading.graders import READ_TAGS


def decode(tokenizer, token_lists: Iterable[Sequence[int]], stop_ids: Iterable[int]) -> list[str]:
    """Decode responses without their end tokens and without control tokens (prompts.find_control_tokens).

    Other special tokens are part of the text: some tokenizers declare <answer> special, and a grader looks for it.
    """
    tags = {index for token, index in tokenizer.get_added_vocab().items() if token in READ_TAGS}
    hidden = {*stop_ids, *prompts.find_control_tokens(tokenizer).values()} - tags
    kept = [[int(token) for token in tokens if int(token) not in hidden] for tokens in token_lists]
    return tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def make_printable(text: str) -> str:
    """Return the text for a terminal. Escape sequences in it are shown, not sent; line breaks stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}" for letter in text)
