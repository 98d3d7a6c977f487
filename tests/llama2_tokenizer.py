"""A tokenizer of the kind of Llama 2's: byte pairs, with "▁" for each space and before the text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers


def build(tokens: list[str], merges: list[tuple[str, str]], special: tuple[str, ...], kind: str) -> Tokenizer:
    """Return a tokenizer whose ids are places in ``tokens``, among them "<unk>", all bytes and ``special``.

    ``kind``: "prepend" puts "▁" after every special token too, "metaspace" before the first word only.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return made
