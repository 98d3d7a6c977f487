"""Encode a prompt in which the text of the user may contain the text of control tokens.

A tokenizer makes the same token of "<|im_end|>", whoever wrote it. So the control tokens in the user's text are marked
before the chat template is applied. A copy of the tokenizer knows the control tokens under other names, which only the
template's own are given: everything else is encoded as the text that it is, by the tokenizer's own rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
import functools
import json
import re

from tokenizers import Tokenizer

# Noncharacters of Unicode, which no text has: around a control token in the user's text, and around one that is meant.
QUOTED, MEANT = ("\ufdd0", "\ufdd1"), ("\ufdd2", "\ufdd3")


def _make_pattern(tokens: Iterable[str], before: str = "", after: str = "") -> str:
    return f"{before}({'|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))}){after}"


def find_quoted(text: str, tokens: Collection[str]) -> list[str]:
    """Return the control tokens in the user's text, in order of their places."""
    return re.findall(_make_pattern(tokens), text) if tokens else []


def mark(text: str, tokens: Iterable[str]) -> str:
    """Mark the control tokens in the user's text as text."""
    return re.sub(_make_pattern(tokens), rf"{QUOTED[0]}\1{QUOTED[1]}", text)


def unmark(text: str) -> str:
    return text.replace(QUOTED[0], "").replace(QUOTED[1], "")


def is_marked(text: str) -> bool:
    return QUOTED[0] in text


def encode_marked(tokenizer, texts: list[str], tokens: Iterable[str]) -> list[list[int]]:
    """Tokenize texts in which the control tokens of the user's text are marked; those become ordinary text."""
    tokens = tuple(tokens)
    # At a quoted token only its second group is empty, at one that is meant only its first.
    pattern = re.compile(f"{_make_pattern(tokens, *QUOTED)}|{_make_pattern(tokens)}")

    def rename(match: re.Match) -> str:
        return match[1] or _rename(match[2])

    renamed = [pattern.sub(rename, text) for text in texts]
    encodings = _make_copy(tokenizer, tokens).encode_batch(renamed, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _rename(token: str) -> str:
    return f"{MEANT[0]}{token}{MEANT[1]}"


@functools.lru_cache(maxsize=4)
def _make_copy(tokenizer, tokens: tuple[str, ...]) -> Tokenizer:
    """Return the tokenizer with ``tokens`` renamed: the same ids, and the same rules for all other text."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields |= {"truncation": None, "padding": None, "post_processor": None}
    names, model = {token: _rename(token) for token in tokens}, fields["model"]
    for token in fields["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:  # of a unigram model
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Tokenizer.from_str(json.dumps(fields))
