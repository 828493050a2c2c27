"""However tokens are split over calls, the text is that of `decode`, cut at the first stop."""

from __future__ import annotations

import unicodedata

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings, strategies as st

from backend.detokenizer import Detokenizer
from backend.tokenizer import Tokenizer
from backend.tokenizer.json_codec import JsonCodec
from backend.tokenizer.sentencepiece_codec import SentencePieceCodec
from backend.tokenizer.tiktoken_codec import PATTERN, TiktokenCodec
from tests import fake_tokenizer

MAKERS = {
    "byte_level": fake_tokenizer.byte_level,
    "sentencepiece": fake_tokenizer.sentencepiece,
    "metaspace": fake_tokenizer.metaspace,
}
BACKENDS = {name: make() for name, make in MAKERS.items()}
MODELS = {
    "llama2": {}, "squeezing": {"remove_extra_whitespaces": True},
    "bare": {"add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
}
CODECS = {
    **{name: JsonCodec(make()) for name, make in MAKERS.items()},
    **{name: SentencePieceCodec(fake_tokenizer.sentencepiece_model(**options))
       for name, options in MODELS.items()},
    "tiktoken": TiktokenCodec(fake_tokenizer.tiktoken_ranks()),
}
TOKENIZERS = {name: Tokenizer(codec) for name, codec in CODECS.items()}
every_tokenizer = pytest.mark.parametrize("name", list(TOKENIZERS))

PIECES = ["你好", "世界", "👩‍👩‍👧", "🇨🇳", "😀", " ", "  ", "\n", "the", "cat", "STOP",
          "é", "\x00", "▁", "ab"]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
cuts = st.lists(st.integers(1, 4), max_size=60)


def split(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in consecutive groups of `sizes`, then one by one."""
    groups, at = [], 0
    for size in sizes + [1] * len(ids):
        groups.append(ids[at:at + size])
        at += size
    return groups


def stream(
    tokenizer: Tokenizer, groups: list[list[int]], stop: list[str]
) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, stop=stop)
    deltas = [detokenizer.add(group) for group in groups]
    deltas.append(detokenizer.finish())
    return deltas, detokenizer.stopped


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The specification: text before the first stop string; the shortest of those that tie."""
    found = [(text.find(s), len(s), s) for s in stop if s and s in text]
    if not found:
        return text, None
    at, _, met = min(found)
    return text[:at], met


@every_tokenizer
@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_any_tokens_in_any_split_give_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    deltas, stopped = stream(tokenizer, split(ids, data.draw(cuts)), [])
    assert "".join(deltas) == tokenizer.decode(ids)
    assert stopped is None


@every_tokenizer
@settings(derandomize=True, deadline=None)
@given(text=texts, sizes=cuts)
def test_valid_text_never_shows_a_broken_character(name: str, text: str, sizes: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    deltas, _ = stream(tokenizer, split(ids, sizes), [])
    whole = tokenizer.decode(ids)
    assert "".join(deltas) == whole
    if "\ufffd" not in text:
        assert "\ufffd" not in whole


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "llama2"])
@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=texts, sizes=cuts, data=st.data())
def test_stop_strings_cut_the_text_and_never_leak(
    name: str, text: str, sizes: list[int], data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    part = st.integers(0, len(whole)).flatmap(
        lambda a: st.integers(a, min(a + 6, len(whole))).map(lambda b: whole[a:b]))
    stop = data.draw(st.lists(st.one_of(part, st.text("ab cat", max_size=4)), max_size=4))
    expected, met = cut(whole, stop)
    deltas, stopped = stream(tokenizer, split(ids, sizes), stop)
    assert ("".join(deltas), stopped) == (expected, met)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    sizes=cuts,
)
def test_overlapping_stop_strings(text: str, stop: list[str], sizes: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_to_id(char) for char in text]
    deltas, stopped = stream(tokenizer, split(ids, sizes), stop)  # type: ignore[arg-type]
    assert ("".join(deltas), stopped) == cut(text, stop)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_decode_is_that_of_the_library(name: str, data: st.DataObject) -> None:
    """Of valid text always; the library spoils whole runs of byte tokens if one is invalid."""
    backend, tokenizer = BACKENDS[name], TOKENIZERS[name]
    if name == "byte_level":
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    else:
        ids = backend.encode(data.draw(texts)).ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", list(MODELS))
@settings(derandomize=True, deadline=None)
@given(text=texts)
def test_ids_and_text_are_those_of_sentencepiece(name: str, text: str) -> None:
    model = fake_tokenizer.sentencepiece_model(**MODELS[name])
    judge, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model), TOKENIZERS[name]
    ids = judge.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == judge.decode(ids)


@settings(derandomize=True, deadline=None)
@given(text=texts)
def test_ids_and_text_are_those_of_tiktoken(text: str) -> None:
    ranks = fake_tokenizer.tiktoken_ranks()
    judge = tiktoken.Encoding("judge", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids = TOKENIZERS["tiktoken"].encode(text)
    assert ids == judge.encode_ordinary(unicodedata.normalize("NFC", text))
    assert TOKENIZERS["tiktoken"].decode(ids) == judge.decode(ids)


@every_tokenizer
@settings(derandomize=True, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES[6:]), min_size=1, max_size=6))
def test_parts_make_one_text(name: str, parts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    if name in ("squeezing", "nfkc"):  # these forget blanks at ends
        parts = [part.strip(" \n▁") for part in parts]
    text = tokenizer.decode(tokenizer.encode_parts(["a", *parts]))
    assert text == tokenizer.decode(tokenizer.encode("a" + "".join(parts), False))


@settings(derandomize=True, deadline=None)
@given(raw=st.binary(max_size=30), sizes=cuts)
def test_random_bytes_by_byte_tokens(raw: bytes, sizes: list[int]) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in raw]
    deltas, _ = stream(tokenizer, split(ids, sizes), [])  # type: ignore[arg-type]
    assert "".join(deltas) == raw.removeprefix(b" ").decode("utf-8", errors="replace")


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, stop=["STOP"])
    letters = {char: tokenizer.token_to_id(char) for char in "aSTOP"}
    shown = [detokenizer.add([letters[char]]) for char in "aSTaSTOPa"]  # type: ignore[list-item]
    assert shown == ["a", "", "", "STa", "", "", "", "", ""]
    assert detokenizer.stopped == "STOP"
    assert detokenizer.finish() == ""


def test_half_a_character_waits_and_shows_only_at_the_end() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add([i]) for i in ids] == ["", "", "", "😀"]  # type: ignore[list-item]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.add(ids[:3]) == ""  # type: ignore[arg-type]
    assert detokenizer.finish() == "\ufffd"
