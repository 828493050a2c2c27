"""The demo model's corpus: deterministic, complete, right, and apart from the held-out text."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from assets.calibration.build import key
from assets.demo_model.train.arithmetic import Arithmetic, chinese_words, english_words
from assets.demo_model.train.conversation import Conversation
from assets.demo_model.train.corpus import Corpus
from assets.demo_model.train.grammar import parse
from assets.demo_model.train.knowledge import read_facts, read_topics
from assets.demo_model.train.packing import ROW, encode_conversations, pack
from assets.demo_model.train.shards import CALIBRATION, training_texts
from assets.demo_model.train.tokenizer import CHAT_TEMPLATE, train_tokenizer

TALK = {"greeting", "identity", "capability", "limits", "thanks", "goodbye"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def conversations(corpus: Corpus) -> list[Conversation]:
    rng = random.Random(5)
    return [corpus.conversation(rng) for _ in range(12_000)]


def paragraphs(text: str) -> set[str]:
    blocks = re.split(r"\n\s*\n|\n---\n", text)
    return {key(p) or p for p in blocks if p.strip(" \n-")}


def test_same_seed_same_corpus() -> None:
    def texts(seed: int) -> list[str]:
        corpus, rng = Corpus(), random.Random(seed)
        return [corpus.conversation(rng).text() for _ in range(300)]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_every_topic_of_the_page_has_conversations_in_both_languages(
    corpus: Corpus, conversations: list[Conversation]
) -> None:
    topics = read_topics()
    assert set(topics) | TALK == set(read_facts())
    said = {m.content for c in conversations for m in c.messages if m.role == "assistant"}
    for name, topic in topics.items():
        answers = list(topic.replies.values()) + [ask.reply for ask in topic.asks]
        assert said & {a.en for a in answers}, f"{name} is never answered in English"
        assert said & {a.zh for a in answers}, f"{name} is never answered in Chinese"
    facts = read_facts()
    for name in TALK:
        assert {facts[name].en, facts[name].zh} <= said


def test_a_topic_is_asked_in_many_ways(corpus: Corpus) -> None:
    rng = random.Random(11)
    asked: dict[str, set[str]] = {"en": set(), "zh": set()}
    for language, questions in asked.items():
        for _ in range(4_000):
            questions.add(corpus.questions.topic(rng, language)[0])
        assert len(questions) > 3_800


def test_answers_are_in_the_language_of_the_question(corpus: Corpus) -> None:
    rng = random.Random(12)
    for language in ("en", "zh"):
        for _ in range(500):
            question, reply = corpus.questions.topic(rng, language)
            assert bool(CHINESE.search(question)) == (language == "zh")
            assert CHINESE.search(reply.zh)


def test_arithmetic_is_right() -> None:
    arithmetic, rng = Arithmetic(), random.Random(7)
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "×": lambda a, b: a * b,
        "÷": lambda a, b: a / b,
    }
    checked = 0
    while checked < 2_000:
        question, reply = arithmetic.question(rng, rng.choice(("en", "zh")))
        equation = re.fullmatch(r"(-?\d+) ([-+×÷]) (-?\d+) = (-?\d+)\.", reply.en)
        if not equation:
            continue
        a, sign, b, value = equation.groups()
        assert operations[sign](int(a), int(b)) == int(value) == reply.value
        assert reply.zh == reply.en[:-1] + "。"
        words = {a, english_words(int(a)), chinese_words(int(a))}
        assert any(w in question for w in words) or sign in "×÷", (question, reply.en)
        checked += 1


@pytest.mark.parametrize(
    ("number", "english", "chinese"),
    [(0, "zero", "零"), (10, "ten", "十"), (15, "fifteen", "十五"), (20, "twenty", "二十")]
    + [(42, "forty-two", "四十二"), (100, "one hundred", "一百")]
    + [(105, "one hundred and five", "一百零五"), (110, "one hundred and ten", "一百一十")],
)
def test_number_words(number: int, english: str, chinese: str) -> None:
    assert english_words(number) == english
    assert chinese_words(number) == chinese


def test_patterns() -> None:
    pattern = parse("[a|b|] {x}[[1|2]|3]")
    assert pattern.count() == 9
    assert {pattern.expand(random.Random(i)) for i in range(300)} == {
        f"{first} {{x}}{last}" for first in ("a", "b", "") for last in "123"
    }
    for wrong in ("[a|b", "a]b"):
        with pytest.raises(ValueError, match="unbalanced"):
            parse(wrong)


def test_no_place_is_left_unfilled(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        assert not re.search(r"\{\w+\}|\[\w", conversation.text())


def test_conversations_render_by_the_template_and_fit_the_context(
    conversations: list[Conversation],
) -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    tokenizer = train_tokenizer([c.text() for c in conversations[:3_000]], vocab_size=2_000)
    longest = sorted(conversations, key=lambda c: -len(c.text()))[:200]
    for conversation in conversations[:200]:
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        assert template.render(messages=messages) == conversation.text()
        roles = [m["role"] for m in messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    sizes = [len(ids) for ids, _ in encode_conversations(tokenizer, longest)]
    assert max(sizes) <= ROW
    assert max(sizes) > ROW // 2, "long conversations must use the far end of the context"


def test_only_the_assistant_is_learnt(conversations: list[Conversation]) -> None:
    tokenizer = train_tokenizer([c.text() for c in conversations[:2_000]], vocab_size=1_500)
    some = conversations[:100]
    for conversation, (ids, learnt) in zip(some, encode_conversations(tokenizer, some)):
        spoken = tokenizer.decode(ids[learnt].tolist(), skip_special_tokens=False)
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        assert spoken == "".join(answer + "<|im_end|>" for answer in answers)


def test_packing_keeps_pieces_whole() -> None:
    rng = random.Random(1)
    pieces = []
    for number in range(1, 400):
        size = rng.randint(1, 900)
        pieces.append((np.full(size, number, np.int16), np.ones(size, np.bool_)))
    tokens, learnt = pack(pieces, pad=0)
    assert tokens.shape == learnt.shape and tokens.shape[1] == ROW
    assert (learnt == (tokens > 0)).all()
    assert learnt.sum() == sum(len(p[0]) for p in pieces)
    for number, (ids, _) in enumerate(pieces, start=1):
        rows, places = np.nonzero(tokens == number)
        assert len(set(rows)) == 1 and (np.diff(places) == 1).all() and len(places) == len(ids)
    with pytest.raises(ValueError, match="does not fit"):
        pack([(np.zeros(ROW + 1, np.int16), np.zeros(ROW + 1, np.bool_))], pad=0)


@pytest.mark.parametrize("name", ["heldout_en.txt", "heldout_zh.txt"])
def test_heldout_text_is_never_trained_on(name: str, conversations: list[Conversation]) -> None:
    heldout = paragraphs((CALIBRATION / name).read_text(encoding="utf-8"))
    assert len(heldout) > 50
    assert not heldout & {p for text in training_texts() for p in paragraphs(text)}
    said = {key(m.content) or m.content for c in conversations for m in c.messages}
    assert not heldout & said


def test_calibration_text_is_large_and_plain_enough() -> None:
    english = CALIBRATION / "en.txt"
    files = [f for f in CALIBRATION.glob("*.txt") if not f.name.startswith("heldout")]
    assert english.stat().st_size >= 1_000_000
    assert sum(f.stat().st_size for f in files) <= 3_000_000
    text = english.read_text(encoding="utf-8")
    assert text.isascii() and "\t" not in text
    assert Path(CALIBRATION / "heldout_en.txt").stat().st_size >= 100_000
