"""Digests by which a run names what it read: questions, contexts, and the tokens of prompts. 64 bits, hexadecimal."""

from __future__ import annotations

from collections.abc import Sequence
import hashlib

import numpy as np

from ctxjax.data import prompts as prompts_lib
from ctxjax.data.records import hash_text
from ctxjax.data.splits import normalize
from ctxjax.types import Prompts


def digest_question(question: str) -> str:
    """Return the digest of a question; those that differ in case, width or white space only have the same."""
    return hash_text(normalize(question))[:16]


def digest_context(context: str) -> str:
    return hash_text(context)[:16]


def digest_tokens(ids: Sequence[int]) -> str:
    """Return the digest of a prompt's token ids."""
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16]


def digest_rows(prompts: Prompts) -> list[str]:
    """Return the digest of each row's tokens, without padding and with the shared prefix. The arrays are numpy's."""
    return [digest_tokens(ids) for ids in prompts_lib.unpad(prompts)]
