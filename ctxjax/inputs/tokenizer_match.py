"""Compare two tokenizers by content: a KL needs two distributions over the same token ids."""

from __future__ import annotations

from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row

# Tokenizers with equal vocabularies may still split text differently: case, digits, spaces, scripts, contractions.
PROBE = (
    "The 3 cats' naïve plan:  don't pay $1,234.50!\n\n\tdef f(x): return x**2  # 東京 Привет 🙂 Answer:\n\n1.  12345"
)
SHOWN = 5  # most differences in the message


def check_same_tokenizer(student, teacher) -> None:
    """Raise ValueError, with both folders and the first differences, if the tokenizers are not the same.

    Compared are the vocabulary, the special tokens, the split of a probe text, and the special tokens that the chat
    template writes.
    """
    for what, facts in COMPARED:
        ours, theirs = facts(student), facts(teacher)
        different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if different:
            lines = [
                f"{what} {key!r}: {ours.get(key)!r} in the student's, {theirs.get(key)!r} in the teacher's"
                for key in different[:SHOWN]
            ]
            lines += [f"and {len(different) - SHOWN} more"] * (len(different) > SHOWN)
            raise ValueError(
                f"the tokenizer in teacher.path = {teacher.name_or_path} is not the student's in "
                f"{student.name_or_path or 'a base from scratch'}; choose a teacher of the student's family:\n  "
                + "\n  ".join(lines)
            )


def make_probe(tokenizer) -> str:
    """Return a text whose tokens differ if tokenizers split text differently, also after a special token."""
    return f"{PROBE}{tokenizer.eos_token or ''}{PROBE}"


def _get_vocabulary(tokenizer) -> dict[str, int]:
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def _get_special_tokens(tokenizer) -> dict[int, str]:
    return {index: token.content for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}


def _split_probe(tokenizer) -> dict[int, str]:
    return dict(enumerate(tokenizer.tokenize(make_probe(tokenizer))))


def _get_template_tokens(tokenizer) -> dict[int, str]:
    written = prompts_lib.encode(tokenizer, [Row("", "?", None, "")], PromptConfig())[0]
    return {index: token for index, token in _get_special_tokens(tokenizer).items() if index in written}


# In this order: a difference in one causes differences in the later ones, so the first one found is the cause.
COMPARED = (
    ("id of the token", _get_vocabulary),
    ("special token with the id", _get_special_tokens),
    ("a text of many scripts, its piece", _split_probe),
    ("special token that the chat template writes, with the id", _get_template_tokens),
)
