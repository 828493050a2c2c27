"""What the demo model is to know: the files of ``data/``, as dataclasses."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.demo_model.train.grammar import Pattern, parse

DATA = Path(__file__).parent / "data"
TOPICS_PAGE = Path(__file__).parents[1] / "topics.md"
# ### id * - Name / name, then a line of facts for each language
HEADING = re.compile(r"^### (\S+)( \*)? - .*\n- en: (.+)\n- zh: (.+)$", re.MULTILINE)
INTENTS = ("what", "why", "when", "how", "cost")


@dataclass(frozen=True)
class Reply:
    """One answer in both languages, and what it was about (for follow-ups)."""

    en: str
    zh: str
    topic: str | None = None
    intent: str | None = None
    value: int | None = None  # the result of a calculation

    def text(self, language: str) -> str:
        """The answer in ``en`` or ``zh``."""
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class Ask:
    """Questions in both languages that have one answer."""

    en: tuple[Pattern, ...]
    zh: tuple[Pattern, ...]
    reply: Reply

    def patterns(self, language: str) -> tuple[Pattern, ...]:
        """The questions in ``en`` or ``zh``."""
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class Topic:
    """A subject: its names, an answer an intent, and questions of its own."""

    id: str
    starred: bool  # asked most
    names_en: tuple[Pattern, ...]
    names_zh: tuple[Pattern, ...]
    replies: dict[str, Reply]
    asks: tuple[Ask, ...]

    def names(self, language: str) -> tuple[Pattern, ...]:
        """What the topic is called in ``en`` or ``zh``."""
        return self.names_zh if language == "zh" else self.names_en


@dataclass(frozen=True)
class Comparison:
    """Two topics set side by side."""

    first: str
    second: str
    reply: Reply


def load(name: str) -> dict[str, Any]:
    """One TOML file of ``data/``."""
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


def patterns(texts: list[str]) -> tuple[Pattern, ...]:
    """Parses a list of patterns."""
    return tuple(parse(text) for text in texts)


def read_asks(entries: list[dict[str, Any]], replies: dict[str, Reply], topic: str) -> list[Ask]:
    """Questions with an answer of their own (``answer``) or that of an intent (``to``)."""
    asks = []
    for entry in entries:
        if "to" in entry:
            reply = replies[entry["to"]]
        else:
            english, chinese = entry["answer"]
            reply = Reply(english, chinese, topic=topic, intent=entry.get("as"))
        asks.append(Ask(patterns(entry["en"]), patterns(entry["zh"]), reply))
    return asks


def read_facts() -> dict[str, Reply]:
    """The facts of ``topics.md`` by topic id, each as the answer to "what is it?"."""
    text = TOPICS_PAGE.read_text(encoding="utf-8")
    return {
        name: Reply(english, chinese, topic=name, intent="what")
        for name, _, english, chinese in HEADING.findall(text)
    }


def read_topics() -> dict[str, Topic]:
    """All topics of ``data/topics_*.toml`` by their id; what they are comes from ``topics.md``.

    An intent without an answer of its own is answered by the facts.
    """
    facts = read_facts()
    stars = {name for name, star, _, _ in HEADING.findall(TOPICS_PAGE.read_text("utf-8")) if star}
    topics: dict[str, Topic] = {}
    for file in sorted(DATA.glob("topics_*.toml")):
        for entry in load(file.stem)["topic"]:
            name = entry["id"]
            if name in topics or name not in facts:
                raise ValueError(f"the topic {name} stands twice, or not in topics.md")
            answers = entry.get("answers", {})
            if not set(answers) < set(INTENTS):
                raise ValueError(f"the topic {name} has unknown intents among {sorted(answers)}")
            what = facts[name]
            replies = {i: Reply(what.en, what.zh, topic=name, intent=i) for i in INTENTS}
            for intent, (english, chinese) in answers.items():
                replies[intent] = Reply(english, chinese, topic=name, intent=intent)
            topics[name] = Topic(
                name,
                name in stars,
                patterns(entry["en"]),
                patterns(entry["zh"]),
                replies,
                tuple(read_asks(entry.get("ask", []), replies, name)),
            )
    return topics


def read_comparisons(topics: dict[str, Topic]) -> list[Comparison]:
    """The pairs of ``data/comparisons.toml``."""
    found = []
    for entry in load("comparisons")["pair"]:
        first, second = entry["topics"]
        if first not in topics or second not in topics:
            raise ValueError(f"a comparison names an unknown topic: {first}, {second}")
        english, chinese = entry["answer"]
        found.append(Comparison(first, second, Reply(english, chinese, topic=first)))
    return found
