"""A tokenizer for worlds whose vocabulary is a list of words, in Hugging Face format."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BEGIN, END = "<|pad|>", "<|unknown|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (PAD, UNKNOWN, BEGIN, END, *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build(words: list[str], pattern: str, line_end: str = "") -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are ``words``; the regular expression ``pattern`` finds them in a text.

    Decoding joins tokens without spaces, so words contain their own spaces. ``line_end``: if not "", a line break is
    read after it whether the text has one or not, so that the last line of a text has the same tokens as the others.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    if line_end:
        tokenizer.normalizer = normalizers.Replace(Regex(rf"{line_end}\n?"), f"{line_end}\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return add_chat_template(tokenizer)


def add_chat_template(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer with the tokens of SPECIAL as a transformers tokenizer with CHAT_TEMPLATE."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
