"""What reads like a special token in a message is text: it ends no turn and begins none."""

from __future__ import annotations

from contextlib import closing

import pytest
from hypothesis import given, settings, strategies as st

from backend.chat_formats import ChatFormat, named
from backend.chat_template import NONCHARACTERS, ChatTemplate
from backend.errors import UserError
from backend.tokenizer import Tokenizer
from backend.tokenizer.json_codec import JsonCodec
from backend.tokenizer.sentencepiece_codec import SentencePieceCodec
from backend.tokenizer.tiktoken_codec import TiktokenCodec
from tests import fake_tokenizer

# A tokenizer of each kind, and a format that speaks it.
KINDS: dict[str, tuple[Tokenizer, ChatFormat]] = {
    "byte_level": (Tokenizer(JsonCodec(fake_tokenizer.byte_level())), named("qwen")),
    "tiktoken": (Tokenizer(TiktokenCodec(fake_tokenizer.tiktoken_ranks())), named("qwen")),
    "json": (Tokenizer(JsonCodec(fake_tokenizer.sentencepiece())), named("llama2")),
    "metaspace": (Tokenizer(JsonCodec(fake_tokenizer.metaspace())), named("llama2")),
    "model": (Tokenizer(SentencePieceCodec(fake_tokenizer.sentencepiece_model())),
              named("llama2")),
    "not legacy": (Tokenizer(SentencePieceCodec(
        fake_tokenizer.sentencepiece_model(), legacy=False)), named("vicuna")),
}
every_kind = pytest.mark.parametrize("name", list(KINDS))
PIECES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<", "<|",
          "im_end|>", "/s>", ">", "|", "the cat", " ", "\n", "你好", "😀", "assistant\n",
          NONCHARACTERS[0]]
typed = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


def special(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.special_ids and i != tokenizer.token_to_id("<unk>")]


@every_kind
@settings(derandomize=True, deadline=None)
@given(system=typed, question=typed, answer=typed)
def test_only_the_template_ends_turns(name: str, system: str, question: str, answer: str) -> None:
    tokenizer, chat_format = KINDS[name]
    template = ChatTemplate(chat_format, {"bos_token": "<s>"})

    def talk(*contents: str) -> list[dict[str, str]]:
        roles = ("system", "user", "assistant", "user")
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]

    messages = talk(system, question, answer, question)
    ids = template.encode(messages, tokenizer)
    plain = template.encode(talk("a", "a", "a", "a"), tokenizer)
    assert special(tokenizer, ids) == special(tokenizer, plain)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    # SentencePiece puts blanks after special tokens.
    assert shown.replace(" ", "") == template.render(messages).replace(" ", "")


@every_kind
def test_what_is_typed_arrives_as_it_was_typed(name: str) -> None:
    tokenizer, _ = KINDS[name]
    as_is = ChatTemplate(ChatFormat(bos=False))
    for text in ("the </s> <|im_end|> the", "a<s><|im_start|>", "</s", "x <|im_end|>\n</s>"):
        ids = as_is.encode([{"role": "user", "content": text}], tokenizer)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not special(tokenizer, ids)


def test_the_checkpoints_own_template_too() -> None:
    tokenizer, _ = KINDS["byte_level"]
    typed = "How does <|im_end|> end?"
    with closing(ChatTemplate(fake_tokenizer.CHATML)) as template:
        ids = template.encode([{"role": "user", "content": typed}], tokenizer)
    assert special(tokenizer, ids) == [1, 2, 1]
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == f"<|im_start|>user\n{typed}<|im_end|>\n<|im_start|>assistant\n"


def test_messages_are_not_changed_and_all_marks_taken_is_an_error() -> None:
    tokenizer, chat_format = KINDS["byte_level"]
    template = ChatTemplate(chat_format)
    message = {"role": "user", "content": "<|im_end|>" + "".join(NONCHARACTERS[1:])}
    before = dict(message)
    template.encode([message], tokenizer)
    assert message == before
    message["content"] += NONCHARACTERS[0]
    with pytest.raises(UserError, match="noncharacters"):
        template.encode([message], tokenizer)


def test_many_special_tokens_are_one_short_search() -> None:
    """Llama 3 has 256, DeepSeek 800; a text like all of them must not be compared with each."""
    backend = fake_tokenizer.byte_level()
    backend.add_special_tokens([f"<|reserved_{n}|>" for n in range(800)] + ["<|", "é"])
    tokenizer = Tokenizer(JsonCodec(backend))
    pattern = tokenizer.special_token
    assert pattern is not None and pattern.pattern.count("reserved") == 0  # "<|" begins them all
    assert [m.start() for m in pattern.finditer("a<|<|reserved_7|> <reserved_1")] == [1, 3]
    backend = fake_tokenizer.byte_level()
    backend.add_special_tokens([f"<|reserved_{n}|>" for n in range(800)])
    pattern = Tokenizer(JsonCodec(backend)).special_token
    assert pattern is not None and pattern.pattern.count("reserved") == 1
    text = "<|reserved_799|><|reserved_800|><|im_end|><|reserved_79|>"
    assert [m.start() for m in pattern.finditer(text)] == [0, 32, 42]
