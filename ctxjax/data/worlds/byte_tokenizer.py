"""A byte-level BPE tokenizer trained on the text of a world: it can encode any text, and a common word is one token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ctxjax.data.worlds import word_tokenizer


def train(texts: Iterable[str], size: int):
    """Train a transformers tokenizer of at most ``size`` tokens: the chat's special tokens, 256 bytes, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(word_tokenizer.SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return word_tokenizer.add_chat_template(tokenizer)
