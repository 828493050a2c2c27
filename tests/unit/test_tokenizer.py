"""Tokenizer folders, good and bad. transformers is the judge of the good ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from backend.errors import UserError
from backend.tokenizer import Tokenizer, sampling_defaults
from backend.tokenizer.json_codec import JsonCodec
from tests import fake_tokenizer

TEXT = "hello 你好 😀\n  the end<|im_end|> </s> ü\x00."


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize("make", [fake_tokenizer.byte_level, fake_tokenizer.sentencepiece])
def test_same_ids_and_text_as_transformers(make, settings, tmp_path: Path) -> None:
    backend = make()
    backend.add_tokens(["  the", "ü"])
    backend.add_special_tokens(["<a b>"])
    bos, eos = ("<s>", "</s>") if backend.token_to_id("<s>") else ("<|endoftext|>", "<|im_end|>")
    fake_tokenizer.save(
        backend, tmp_path, tokenizer_class="PreTrainedTokenizerFast", bos_token=bos,
        eos_token={"__type": "AddedToken", "content": eos}, **settings)
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for add in (True, False):
        ids = ours.encode(TEXT, add_special_tokens=add)
        assert ids == theirs.encode(TEXT, add_special_tokens=add)
    assert ours.bos_token == bos and ours.bos_token_id == theirs.bos_token_id
    assert ours.special_ids >= {theirs.bos_token_id, theirs.eos_token_id}
    ids = [i for i in ours.encode(TEXT) if ours.token_bytes(i) != "ü".encode()]  # see below
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_token_bytes_of_byte_level_tokens() -> None:
    backend = fake_tokenizer.byte_level()
    backend.add_tokens(["ü", "Ġx", "<|tool|>"])
    tokenizer = Tokenizer(JsonCodec(backend))
    for text in ("你好世界", "😀", " \t\n\x00\xff"):
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    # Spelled as they are; the library itself would make the first of them a lone byte 0xFC.
    for token in ("ü", "Ġx", "<|tool|>", "<|im_end|>"):
        assert tokenizer.token_bytes(backend.token_to_id(token)) == token.encode()


def test_token_bytes_of_sentencepiece_tokens() -> None:
    backend = fake_tokenizer.sentencepiece()
    backend.add_tokens([AddedToken("▁▁▁", normalized=False)])  # as Gemma has for runs of blanks
    tokenizer = Tokenizer(JsonCodec(backend))
    assert tokenizer.token_bytes(backend.token_to_id("<0xE4>")) == b"\xe4"
    assert tokenizer.token_bytes(backend.token_to_id("▁the")) == b" the"
    assert tokenizer.token_bytes(backend.token_to_id("▁▁▁")) == b"   "
    assert tokenizer.decode(tokenizer.encode("the the")) == "the the"


def test_unknown_ids_have_no_text() -> None:
    tokenizer = Tokenizer(JsonCodec(fake_tokenizer.byte_level()))
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([10**12, tokenizer.encode("a")[0]]) == "a"


def test_vocab_size_counts_up_to_the_largest_id() -> None:
    backend = fake_tokenizer.byte_level()
    assert Tokenizer(JsonCodec(backend)).vocab_size == backend.get_vocab_size()
    assert Tokenizer(JsonCodec(backend)).special_ids == {0, 1, 2}


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = fake_tokenizer.byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(JsonCodec(backend))
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_eos_is_the_union_of_all_files(tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 0, True, -1, "x", None]})
    write(tmp_path, "config.json", {"eos_token_id": 9})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (7, 0, 9, 2)


def test_end_of_turn_of_the_template_ends_a_reply(tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, "tokenizer_config.json", settings | {"eos_token": "<|endoftext|>"})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (0, 2)
    write(tmp_path, "tokenizer_config.json", settings | {"chat_template": "x", "eos_token": None})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == ()


def test_special_only_by_tokenizer_config(tmp_path: Path) -> None:
    """Older exports leave added tokens out of tokenizer.json; transformers marks them, so do we."""
    backend = fake_tokenizer.byte_level()
    the = backend.encode("the").ids
    assert len(the) == 1
    listed = {str(the[0]): {"content": "the", "special": True}, "999": {"content": "new"}}
    fake_tokenizer.save(backend, tmp_path, added_tokens_decoder=listed)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert the[0] in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a the b")) == "a  b"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="not valid Unicode.*character 2"):
        Tokenizer(JsonCodec(fake_tokenizer.byte_level())).encode("ab\ud800")


def test_unsupported_decoder_is_named() -> None:
    backend = fake_tokenizer.byte_level()
    backend.decoder = None
    with pytest.raises(UserError, match="not supported: none"):
        Tokenizer(JsonCodec(backend))


def fails(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Tokenizer.from_folder(folder)


def test_folders_that_are_no_tokenizer(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "no model folder")
    fails(tmp_path, "has no tokenizer: neither tokenizer.json, tokenizer.model, qwen.tiktoken")


@pytest.mark.parametrize("content", [
    b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"version":"1.0","model":{"type":"None"}}',
    b'{"model":{"type":"BPE","vocab":{"a":5},"merges":["a b"]}}', b"[" * 100_000,
])
def test_broken_tokenizer_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    fails(tmp_path, "not a valid tokenizer")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xff", b"[" * 100_000, b"null"])
@pytest.mark.parametrize("name", [
    "tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json"])
def test_broken_companions(name: str, content: bytes, tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    (tmp_path / name).write_bytes(content)
    fails(tmp_path, name)


def test_pipes_instead_of_files_do_not_hang(tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    fails(tmp_path, "config.json is not a regular file")
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    fails(tmp_path, "not a regular file")


def test_strange_values_in_tokenizer_config_are_ignored(tmp_path: Path) -> None:
    fake_tokenizer.save(
        fake_tokenizer.byte_level(), tmp_path, bos_token=5, eos_token={"content": 7},
        added_tokens_decoder=[1], add_bos_token=True, pad_token="not in the vocabulary")
    assert Tokenizer.from_folder(tmp_path).decode([40, 41]) != ""


def test_added_token_flags_survive(tmp_path: Path) -> None:
    backend = fake_tokenizer.byte_level()
    backend.add_special_tokens([AddedToken("<x>", lstrip=True, special=True)])
    fake_tokenizer.save(backend, tmp_path, eos_token="<x>")
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("a  <x> b") == theirs.encode("a  <x> b")


def test_sampling_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    write(tmp_path, "generation_config.json", {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05,
        "max_length": 99, "eos_token_id": 1, "do_sample": True})
    assert sampling_defaults(tmp_path) == {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


def test_sampling_defaults_drop_nonsense(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {
        "temperature": -1, "top_p": "high", "top_k": 2.5, "min_p": True,
        "repetition_penalty": float("nan")})
    assert sampling_defaults(tmp_path) == {}
    write(tmp_path, "generation_config.json", {"do_sample": False, "temperature": 0.6})
    assert sampling_defaults(tmp_path) == {"temperature": 0.0}
