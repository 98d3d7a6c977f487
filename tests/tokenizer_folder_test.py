"""A folder's tokenizer.json decides how text becomes tokens, whatever class tokenizer_config.json names."""

import json

import llama2_tokenizer
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ctxjax.inputs import model_folder

SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


def write_sentencepiece(folder, kind: str, **settings) -> Tokenizer:
    """Write a folder like Llama 2's, ``kind`` as in llama2_tokenizer. Return the tokenizer itself."""
    pieces = ["▁", "a", "b", ".", "▁a", "ab", "▁ab"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    made = llama2_tokenizer.build(tokens, merges, SPECIAL, kind)
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    fields = named | {"chat_template": TEMPLATE} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return made


def read_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TEXT = "<s>ab ab</s>ab. é\n\n b"


@pytest.mark.parametrize(("kind", "legacy"), [("prepend", False), ("metaspace", True)])
def test_a_tokenizer_named_llama_is_read_as_its_file_says(tmp_path, kind, legacy):
    file = write_sentencepiece(tmp_path, kind, legacy=legacy)
    expected = file.encode(TEXT, add_special_tokens=False).ids
    assert read_ids(AutoTokenizer.from_pretrained(tmp_path), TEXT) != expected, "the example should differ"
    loaded = model_folder.load_tokenizer(tmp_path)
    assert read_ids(loaded, TEXT) == expected
    assert (loaded.bos_token, loaded.eos_token, loaded.chat_template) == ("<s>", "</s>", TEMPLATE)


def test_smollm2_is_read_as_its_file_says_under_the_class_that_it_was_published_with(tmp_path, smollm2_folder):
    (tmp_path / "tokenizer.json").write_bytes((smollm2_folder / "tokenizer.json").read_bytes())
    fields = json.loads((smollm2_folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    assert read_ids(model_folder.load_tokenizer(tmp_path), "Answer:\n\n1.") == [21350, 42, 1116, 33, 30]


def describe(token: str, **flags) -> dict:
    return {"content": token, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


def test_how_added_tokens_are_found_is_the_files_too(tmp_path):
    added = {"1": describe("<s>", rstrip=True, special=True), "2": describe("</s>", normalized=True, special=True)}
    file = write_sentencepiece(tmp_path, "metaspace", added_tokens_decoder=added)
    text = "<s> ab</s> ab"
    assert read_ids(model_folder.load_tokenizer(tmp_path), text) == file.encode(text, add_special_tokens=False).ids


def test_an_id_that_the_two_files_give_to_different_tokens_is_an_error(tmp_path):
    write_sentencepiece(tmp_path, "metaspace", added_tokens_decoder={"5": describe("<x>", special=True)})
    with pytest.raises(ValueError, match=r"tokenizer_config.json gives the id 5 to '<x>', tokenizer.json to '<0x02>'"):
        model_folder.load_tokenizer(tmp_path)


def test_a_tokenizer_that_transformers_reads_in_another_way_is_refused(tmp_path, monkeypatch):
    write_sentencepiece(tmp_path, "prepend", legacy=False)
    monkeypatch.setattr(model_folder, "PreTrainedTokenizerFast", AutoTokenizer)
    with pytest.raises(ValueError, match="does not read .*tokenizer.json as the file says"):
        model_folder.load_tokenizer(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_sentencepiece(tmp_path, "prepend")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read: .*; copy tokenizer.json again"):
        model_folder.load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_of_an_older_format_gets_the_command_that_converts_it(tmp_path, file):
    (tmp_path / file).write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=rf"has {file}, but no tokenizer.json; make it there with: python -c .*save_"
    ):
        model_folder.load_tokenizer(tmp_path)
