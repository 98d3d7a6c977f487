"""Whether two folders' tokenizers are the same by content: a KL compares two distributions over the same ids."""

from __future__ import annotations

from ctxjax.data import prompts as prompts_lib
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row

# Equal vocabularies may still cut text differently: cases, digits, spaces, scripts, contractions.
PROBE = "The 3 cats' naïve plan:  don't pay $1,234.50!\n\n\tdef f(x): return x**2  # 東京 Привет 🙂"
SHOWN = 5  # differences in the message


def require_same(student, teacher) -> None:
    """Raises ValueError with the first differences and both folders where the tokenizers differ in their
    vocabulary, their special tokens, how they cut a text, or the special tokens that their chat templates write."""
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
                f"{student.name_or_path}; choose a teacher of the student's family:\n  " + "\n  ".join(lines)
            )


def _vocabulary(tokenizer) -> dict[str, int]:
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def _special_tokens(tokenizer) -> dict[int, str]:
    return {index: token.content for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}


def _pieces(tokenizer) -> dict[int, str]:
    return dict(enumerate(tokenizer.tokenize(PROBE)))


def _template_tokens(tokenizer) -> dict[int, str]:
    written = prompts_lib.encode(tokenizer, [Row("", "?", None, "")], PromptConfig())[0]
    return {index: token for index, token in _special_tokens(tokenizer).items() if index in written}


# Each is what the later ones build on, so the first that differs is the cause.
COMPARED = (
    ("id of the token", _vocabulary),
    ("special token with the id", _special_tokens),
    ("a text of many scripts, its piece", _pieces),
    ("special token that the chat template writes, with the id", _template_tokens),
)
