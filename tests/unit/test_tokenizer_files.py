"""tokenizer.model and qwen.tiktoken with what stands beside them, as the families have it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.tokenizer import Tokenizer
from backend.tokenizer.sentencepiece_codec import SentencePieceCodec
from backend.tokenizer.tiktoken_codec import SPECIAL, TiktokenCodec
from tests import fake_tokenizer

INTERNLM = {"user_defined_symbols": ["<eoh>", "<eoa>"]}
INTERNLM2 = {"user_defined_symbols": [f"[UNUSED_TOKEN_{n}]" for n in range(141, 147)]}
BAICHUAN = {"control_symbols": ["<reserved_106>", "<reserved_107>"]}


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def folder_with(
    folder: Path, model: dict[str, object], settings: dict[str, object] | None = None,
    config: dict[str, object] | None = None,
) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer.model trained by `model`'s options."""
    (folder / "tokenizer.model").write_bytes(fake_tokenizer.sentencepiece_model(**{
        key: ",".join(value) if isinstance(value, list) else value
        for key, value in model.items()}))
    if settings is not None:
        write(folder, "tokenizer_config.json", settings)
    write(folder, "config.json", config or {})
    return Tokenizer.from_folder(folder)


def pieces(tokenizer: Tokenizer, text: str, begin: bool = False) -> list[str]:
    """The tokens of `text`, each as the text that it stands for."""
    ids = tokenizer.encode(text, add_special_tokens=begin)
    return [tokenizer.token_bytes(i).decode() for i in ids]


def test_tokenizer_model_alone(tmp_path: Path) -> None:
    tokenizer = folder_with(tmp_path, {})
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.special_ids == {0, 1, 2}
    assert pieces(tokenizer, "the</s><s>the", begin=True) == ["<s>", " the", "</s>", "<s>", " the"]
    assert tokenizer.decode(tokenizer.encode("the cat </s>")) == "the cat "
    assert tokenizer.decode([0, 10**6, -1]) == ""


def test_beginning_and_end_as_configured(tmp_path: Path) -> None:
    assert pieces(folder_with(tmp_path, {}, {"add_bos_token": False}), "the", True) == [" the"]
    both = folder_with(tmp_path, {}, {"add_eos_token": True, "bos_token": None})
    assert pieces(both, "the", True) == ["<s>", " the", "</s>"]
    assert both.bos_token is None and both.bos_token_id is None


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, " the</s> the</s>  the"),
    ({"legacy": True}, " the</s> the</s>  the"),
    ({"legacy": False}, " the</s>the</s> the"),
    ({"legacy": False, "add_prefix_space": False}, "the</s>the</s> the"),
])
def test_where_blanks_are_put(
    settings: dict[str, object], expected: str, tmp_path: Path
) -> None:
    """transformers' rule for LlamaTokenizer (LlamaTokenizer.tokenize of version 4)."""
    tokenizer = folder_with(tmp_path, {}, settings)
    assert "".join(pieces(tokenizer, "the</s>the</s> the")) == expected


def test_internlm_knows_its_end_of_answer(tmp_path: Path) -> None:
    declared = {"architectures": ["InternLMForCausalLM"], "auto_map": {"AutoModel": "x.y"}}
    tokenizer = folder_with(tmp_path, INTERNLM, {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
                            declared)
    end = tokenizer.token_to_id("<eoa>")
    assert tokenizer.eos_token_ids == (2, end)
    ids = tokenizer.encode("the<eoh>\nthe<eoa>")
    assert end in ids and tokenizer.decode(ids).count("eo") == 0


@pytest.mark.parametrize("listed", [True, False], ids=["as published", "the first files"])
def test_internlm2_tokens_take_the_place_of_pieces(listed: bool, tmp_path: Path) -> None:
    """Its first checkpoints did not list them, and did not stop (LMDeploy's issue 1047)."""
    pieces_only = folder_with(tmp_path, INTERNLM2)
    start, end = map(pieces_only.token_to_id, ("[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"))
    added = {str(start): {"content": "<|im_start|>", "special": True},
             str(end): {"content": "<|im_end|>", "special": True}}
    settings = {"added_tokens_decoder": added} if listed else None
    declared = {"model_type": "internlm2", "eos_token_id": 2}
    tokenizer = folder_with(tmp_path, INTERNLM2, settings, declared)
    assert tokenizer.encode("<|im_start|>the<|im_end|>", False)[::2] == [start, end]
    assert set(tokenizer.eos_token_ids) >= {2, end}
    assert {start, end} <= tokenizer.special_ids
    assert tokenizer.token_bytes(end) == b"<|im_end|>"
    assert tokenizer.vocab_size == pieces_only.vocab_size


def test_baichuan2_turns_are_single_tokens(tmp_path: Path) -> None:
    declared = {"architectures": ["BaichuanForCausalLM"]}
    tokenizer = folder_with(tmp_path, BAICHUAN, {"add_bos_token": False}, declared)
    assert pieces(tokenizer, "<reserved_106>the<reserved_107>", True) == [
        "<reserved_106>", " the", "<reserved_107>"]


def test_tokens_beyond_the_model(tmp_path: Path) -> None:
    """added_tokens.json of older checkpoints, and added_tokens_decoder, which wins."""
    write(tmp_path, "added_tokens.json", {"<pad>": 400, "<|x|>": 999, "word": 403})
    listed = {"401": {"content": "<|x|>", "special": True}, "402": {"content": "<tool>"},
              "-1": {"content": "no"}, "x": {"content": "no"}, "404": {"special": True}, "405": 1}
    tokenizer = folder_with(tmp_path, {}, {"added_tokens_decoder": listed})
    assert tokenizer.vocab_size == 404
    ids = tokenizer.encode("the<|x|>the<tool><pad>word")
    assert [i for i in ids if i >= 400] == [401, 402, 400, 403]
    assert tokenizer.decode(ids) == "the the<tool>word"


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit('run')")
    assert Tokenizer.from_folder(tmp_path).token_to_id("<|im_end|>") == 2


@pytest.mark.parametrize("content", [b"", b"xx", b"version https://git-lfs", b"\x1a\x02\x18\x00"])
def test_broken_tokenizer_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model is not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


def qwen(folder: Path, content: bytes) -> Tokenizer:
    (folder / "qwen.tiktoken").write_bytes(content)
    write(folder, "config.json", {"architectures": ["QWenLMHeadModel"]})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    write(folder, "generation_config.json", {"chat_format": "chatml", "eos_token_id": 330})
    return Tokenizer.from_folder(folder)


def test_qwen_tiktoken(tmp_path: Path) -> None:
    """Special tokens follow the ranks: <|endoftext|>, <|im_start|>, <|im_end|>, 205 extras."""
    ranks = fake_tokenizer.tiktoken_ranks()
    tokenizer = qwen(tmp_path, fake_tokenizer.tiktoken_file(ranks))
    assert len(SPECIAL) == 208 and tokenizer.vocab_size == len(ranks) + 208
    assert [tokenizer.token_to_id(token) for token in SPECIAL[:4]] == [330, 331, 332, 333]
    assert tokenizer.encode("<|im_start|>a<|extra_204|>") == [331, ord("a"), 330 + 207]
    assert tokenizer.decode([331, *tokenizer.encode("the 你好 😀"), 332]) == "the 你好 😀"
    assert tokenizer.eos_token_ids == (330, 332) and tokenizer.bos_token is None
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC, as Qwen does


@pytest.mark.parametrize(("content", "match"), [
    (b"", "not complete"), (b"YQ== 0\n", "not complete"), (b"YQ==\n", "line 1"),
    (b"YQ== 0\n! 1\n", "line 2"), (b"YQ== x\n", "line 1"),
])
def test_broken_tiktoken(content: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        qwen(tmp_path, content)
    gap = {base64.b64encode(bytes([n])): n + (n == 255) for n in range(256)}
    lines = b"".join(b"%s %d\n" % pair for pair in gap.items())
    with pytest.raises(UserError, match="not complete"):
        qwen(tmp_path, lines)


def test_a_text_that_tiktoken_gives_up_on_is_one_sentence() -> None:
    tokenizer = Tokenizer(TiktokenCodec(fake_tokenizer.tiktoken_ranks()))
    with pytest.raises(UserError, match="cannot be encoded"):
        tokenizer.encode(" " * 2_000_000)


def test_added_tokens_that_overlap_are_read_longest_first() -> None:
    codec = SentencePieceCodec(
        fake_tokenizer.sentencepiece_model(), added={"<a>": 400, "<a><b>": 401})
    assert codec.encode("<a><b><a>", False) == [401, 400]
