"""The demo model's exam: its grading is fair, its questions are sound."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from assets.demo_model.exam.exam import (
    Question,
    contains,
    examine,
    grade,
    load_questions,
    load_topics,
    main,
    normalize,
    parse_question,
    summary,
)
from backend.errors import UserError

QUESTIONS = load_questions()
TOPICS = load_topics()


def question(required, forbidden=(), lang="en"):
    messages = [{"role": "user", "content": "?"}]
    return Question(f"{lang}-x-1", lang, "kv-cache", messages, required, list(forbidden))


def line(**changes):
    data = dict(
        id="en-x-1", lang="en", topic="x", messages=[{"role": "user", "content": "q"}],
        required=[["a"]], forbidden=[],
    )
    return json.dumps({**data, **changes})


# --- grading ---


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("It stores KEYS.", "keys"),
        ("about 4 GB of memory", "4 GB"),
        ("17 + 25 = 42.", "42"),
        ("17+25=42", "42"),
        ("等于42。", "42"),
        ("5 - 12 = -7.", "-7"),
        ("5-12=\u22127", "-7"),
        ("It is minus 7.", "-7"),
        ("结果是负 7。", "-7"),
        ("12 - 7 = 5", "7"),
        ("(3+9)-7 is 5", "7"),
        ("the default is 0.8.", "0.8"),
        ("set it to 4, then restart", "4"),
        ("０ 表示关闭", "0"),
        ("int4 只有 16 个取值", "16个"),
        ("不会重新 计算历史", "重新计算"),
        ("open http://127.0.0.1:6006.", "127.0.0.1"),
        ("port 23333/v1", "23333"),
        ("ssh -CNL 6006:127.0.0.1:6006 user@host", "6006:127.0.0.1:6006"),
        ("you don\u2019t need it", "don't"),
    ],
)
def test_contains(text, wanted):
    assert contains(text, wanted)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("about 14 GB", "4 GB"),
        ("142", "42"),
        ("420", "42"),
        ("42,000", "42"),
        ("4.2", "4"),
        ("0.4", "4"),
        ("fp16", "16"),
        ("= -7", "7"),
        ("负7", "7"),
        ("12 - 7 = 5", "-7"),
        ("12-7=5", "-7"),
        ("12 minus 7 is 5", "-7"),
        ("port 233330", "23333"),
        ("16006:127.0.0.1:6006", "6006:127.0.0.1:6006"),
    ],
)
def test_contains_not(text, wanted):
    assert not contains(text, wanted)


def test_grade_wants_one_of_every_group():
    asked = question([["key", "keys"], ["value", "values"]])
    assert grade("It stores keys and values.", asked) == []
    assert grade("It stores values.", asked) == ["lacks key | keys"]
    assert len(grade("", asked)) == 2


def test_grade_refuses_forbidden_words():
    asked = question([["Shanghai"]], forbidden=["Meta", "4 bit"])
    assert grade("Shanghai, with 14 bit", asked) == []
    assert grade("Shanghai and META.", asked) == ["says Meta"]


def test_grade_chinese():
    asked = question([["减半", "一半"], ["显存"]], forbidden=["默认开启"], lang="zh")
    assert grade("显存减半，默认关闭。", asked) == []
    assert grade("显存减半，默认 开启。", asked) == ["says 默认开启"]
    assert grade("精度减半。", asked) == ["lacks 显存"]


# --- questions ---


def test_there_are_200_questions_half_of_them_chinese():
    assert len(QUESTIONS) == 200
    assert Counter(q.lang for q in QUESTIONS) == {"en": 100, "zh": 100}
    assert len({q.id for q in QUESTIONS}) == 200
    prompts = {tuple(normalize(m["content"]) for m in q.messages) for q in QUESTIONS}
    assert len(prompts) == 200
    assert sum(len(q.messages) > 1 for q in QUESTIONS) == 20
    assert all(q.id.startswith(f"{q.lang}-{q.topic}-") for q in QUESTIONS)


def test_every_topic_is_asked_and_no_other():
    assert {q.topic for q in QUESTIONS} == set(TOPICS)
    sections = Counter(TOPICS[q.topic].section for q in QUESTIONS)
    assert (sections.pop("Talk"), sections.pop("Arithmetic")) == (16, 44)
    assert sections.total() == 140


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda q: q.id)
def test_question_is_fair_and_not_vacuous(asked):
    """Its topic's facts pass; its own last words, and most other topics' facts, do not."""
    assert grade(asked.messages[-1]["content"], asked)
    facts = {t.id: t.facts[asked.lang] for t in TOPICS.values() if t.facts}
    if asked.topic in facts:
        assert grade(facts.pop(asked.topic), asked) == []
    elif len(asked.messages) == 1:
        assert len(asked.required) == 1 and len(asked.required[0]) == 1, "one result"
    passing = [topic for topic, text in facts.items() if not grade(text, asked)]
    assert len(passing) <= len(facts) // 8, passing


@pytest.mark.parametrize(
    "broken, said",
    [
        ("{", "line 2"),
        ("[]", "exactly"),
        (line(lang="fr"), "lang"),
        (line(id=""), "id and topic"),
        (line(required=[]), "required"),
        (line(required=[[]]), "required"),
        (line(required=[["a", 1]]), "required"),
        (line(forbidden=[""]), "forbidden"),
        (line(messages=[]), "messages"),
        (line(messages=[{"role": "assistant", "content": "q"}]), "text of the user"),
        (line(messages=[{"role": "user"}]), "role and content"),
        (line(extra=1), "exactly"),
        (line(), "repeats"),
        (line(id="other"), "repeats"),
    ],
)
def test_broken_questions_are_named(tmp_path, broken, said):
    path = tmp_path / "questions.jsonl"
    path.write_text(line() + "\n" + broken + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2") as caught:
        load_questions(path)
    assert said in str(caught.value)


# --- report ---


def test_examine_and_summary():
    shown = []
    right = parse_question(line(id="en-addition-1", topic="addition", required=[["42"]]))
    wrong = parse_question(line(id="zh-greeting-1", topic="greeting", lang="zh",
                                messages=[{"role": "user", "content": "你好"}]))

    def answer_all(conversations):
        assert conversations == [right.messages, wrong.messages]
        return iter(["17 + 25 = 42.", "嗯"])

    verdicts = examine([right, wrong], answer_all, shown.append)
    assert [v.failures for v in verdicts] == [[], ["lacks a"]]
    assert "right en-addition-1" in shown and "FAIL  zh-greeting-1" in shown
    assert any("你好" in text for text in shown) and any("嗯" in text for text in shown)
    rows = [row.split() for row in summary(verdicts, TOPICS).splitlines()]
    assert ["Arithmetic", "1/1", "-", "1/1"] in rows
    assert ["Talk", "-", "0/1", "0/1"] in rows
    assert rows[-1] == "1 of 2 right: 50.0 %".split()


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError):
        examine(QUESTIONS[:2], lambda conversations: ["one"], lambda text: None)


def test_main_names_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no model folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path), "--questions", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert main([str(tmp_path), "--max-tokens", "0"]) == 2
    assert "--max-tokens" in capsys.readouterr().err
