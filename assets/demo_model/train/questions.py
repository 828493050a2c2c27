"""Questions that stand alone: topics, comparisons, talk, and what is beyond the model."""

from __future__ import annotations

import random
import re

from assets.demo_model.train.grammar import Pattern
from assets.demo_model.train.knowledge import (
    INTENTS,
    Ask,
    Reply,
    Topic,
    load,
    patterns,
    read_comparisons,
    read_facts,
    read_topics,
)
from assets.demo_model.train.phrasing import CJK, Phrasing

UNPREPARED_PAIRS = 0.3  # share of comparisons that are of any two topics
OWN_QUESTIONS = 0.5  # share of a topic's questions that are its own, not the general patterns


SENTENCE_END = re.compile(r"(?<=[.!?])\s|(?<=[。！？])")


def first_sentence(text: str) -> str:
    """What remains of an answer that is to be short."""
    return SENTENCE_END.split(text, maxsplit=1)[0].strip()


def side_by_side(first: Reply, second: Reply) -> Reply:
    """Two topics that nobody has compared yet: what each is, one after the other."""
    return Reply(
        f"{first_sentence(first.en)} {first_sentence(second.en)}",
        first_sentence(first.zh) + first_sentence(second.zh),
        topic=first.topic,
    )


class Questions:
    """Draws a question and its answer."""

    def __init__(self, phrasings: dict[str, Phrasing], strange_words: dict[str, list[str]]) -> None:
        self.phrasings = phrasings
        self.topics = read_topics()
        self.comparisons = read_comparisons(self.topics)
        self.compared = {frozenset((c.first, c.second)): c.reply for c in self.comparisons}
        facts = read_facts()
        self.talk_asks: list[Ask] = []
        self.talk_weights: list[int] = []
        for entry in load("smalltalk")["say"]:
            if "topic" in entry:
                reply = Reply(facts[entry["topic"]].en, facts[entry["topic"]].zh)
            else:
                reply = Reply(*entry["answer"])
            self.talk_asks.append(Ask(patterns(entry["en"]), patterns(entry["zh"]), reply))
            self.talk_weights.append(entry.get("weight", 1))
        beyond = load("unknown")
        self.beyond = {"en": patterns(beyond["en"]), "zh": patterns(beyond["zh"])}
        self.beyond_reply = Reply(*beyond["answer"])
        self.fillers = {
            language: {
                place: beyond[place + suffix] for place in ("place", "person", "thing", "food")
            }
            for language, suffix in (("en", ""), ("zh", "_zh"))
        }
        for language, words in strange_words.items():
            self.fillers[language]["word"] = words
        self.all_topics = list(self.topics.values())
        self.weights = [3 if topic.starred else 2 for topic in self.all_topics]

    def pick(self, rng: random.Random, language: str) -> Topic:
        """A topic that has a name in the language; starred ones more often."""
        return rng.choices(self.all_topics, self.weights)[0]

    def name(self, rng: random.Random, topic: Topic, language: str) -> str:
        """One of the topic's names."""
        return rng.choice(topic.names(language)).expand(rng)

    def topic(self, rng: random.Random, language: str) -> tuple[str, Reply]:
        """A question on a topic or on two."""
        if rng.random() < 0.08:
            return self._comparison(rng, language)
        topic = self.pick(rng, language)
        if topic.asks and rng.random() < OWN_QUESTIONS:
            ask = rng.choice(topic.asks)
            return self._in_language(rng, language, ask.patterns(language), topic), ask.reply
        intent = rng.choices(INTENTS, (4, 3, 3, 4, 2))[0]
        choices = self.phrasings[language].intents[intent]
        return self._in_language(rng, language, choices, topic), topic.replies[intent]

    def _in_language(
        self, rng: random.Random, language: str, choices: tuple[Pattern, ...], topic: Topic
    ) -> str:
        """A question that shows its language: Chinese needs a Chinese character."""
        while True:
            name = self.name(rng, topic, language)
            text = self.phrasings[language].question(rng, choices, x=name)
            if (language == "zh") == bool(CJK.search(text)):
                return text

    def _comparison(self, rng: random.Random, language: str) -> tuple[str, Reply]:
        if rng.random() < UNPREPARED_PAIRS:
            first, second = rng.sample(self.all_topics, 2)
            reply = self.compared.get(frozenset((first.id, second.id))) or side_by_side(
                first.replies["what"], second.replies["what"]
            )
        else:
            pair = rng.choice(self.comparisons)
            names = [pair.first, pair.second]
            rng.shuffle(names)
            first, second = (self.topics[name] for name in names)
            reply = pair.reply
        phrasing = self.phrasings[language]
        while True:
            x, y = self.name(rng, first, language), self.name(rng, second, language)
            text = phrasing.question(rng, phrasing.intents["compare"], x=x, y=y)
            if (language == "zh") == bool(CJK.search(text)):
                return text, reply

    def talk(self, rng: random.Random, language: str) -> tuple[str, Reply]:
        """Greetings, courtesies, questions about the model."""
        ask = rng.choices(self.talk_asks, self.talk_weights)[0]
        text = rng.choice(ask.patterns(language)).expand(rng)
        exact = rng.random() < 0.7
        return self.phrasings[language].typed(rng, text, exact=exact), ask.reply

    def unknown(self, rng: random.Random, language: str) -> tuple[str, Reply]:
        """A question that the model must not pretend to know."""
        text = rng.choice(self.beyond[language]).expand(rng)
        fillers = self.fillers[language]
        text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(fillers[m[1]]), text)
        return self.phrasings[language].typed(rng, text), self.beyond_reply
