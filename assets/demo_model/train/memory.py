"""What users tell about themselves, and questions about the conversation itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

from assets.demo_model.train.grammar import Pattern
from assets.demo_model.train.knowledge import Reply, load, patterns


@dataclass(frozen=True)
class Fact:
    """Something a user may tell: how it is told, asked, confirmed, recalled, or missing."""

    id: str
    values: str
    tell: dict[str, tuple[Pattern, ...]]
    ask: dict[str, tuple[Pattern, ...]]
    heard: tuple[str, str]
    recall: tuple[str, str]
    missing: Reply


def filled(texts: tuple[str, str], value: str) -> Reply:
    """Both languages of an answer with the value in place."""
    return Reply(texts[0].replace("{v}", value), texts[1].replace("{v}", value))


class Memory:
    """Tells, recalls, and quotes."""

    def __init__(self) -> None:
        table = load("memory")
        places = load("unknown")
        self.values = table["values"]
        self.places: dict[str, list[str]] = {"en": places["place"], "zh": places["place_zh"]}
        self.facts = {
            entry["id"]: Fact(
                entry["id"],
                entry["values"],
                {k: patterns(entry[f"tell_{k}"]) for k in ("en", "zh")},
                {k: patterns(entry[f"ask_{k}"]) for k in ("en", "zh")},
                tuple(entry["heard"]),
                tuple(entry["recall"]),
                Reply(*entry["missing"]),
            )
            for entry in table["fact"]
        }
        recall = table["recall_question"]
        self.last = {k: patterns(recall[f"last_{k}"]) for k in ("en", "zh")}
        self.first = {k: patterns(recall[f"first_{k}"]) for k in ("en", "zh")}
        self.quoted: tuple[str, str] = tuple(recall["answer"])
        self.nothing = Reply(*recall["nothing"])
        self.unclear = Reply(*recall["unclear"])

    def _value(self, rng: random.Random, kind: str, language: str) -> str:
        if kind == "number":
            return str(rng.randint(0, 10 ** rng.randint(1, 4)))
        if kind == "place":
            return rng.choice(self.places[language])
        if kind == "gpu":
            return rng.choice(self.values["gpu"])
        if kind == "colour":
            return rng.choice(self.values[f"colour_{language}"])
        # Invented names, so that the model copies what it reads and not what it knows.
        if rng.random() < 0.5:
            return rng.choice(self.values[f"name_{language}"])
        if language == "zh":
            given = "".join(rng.choices(self.values["given_zh"], k=rng.randint(1, 2)))
            return rng.choice(self.values["surname_zh"]) + given
        return "".join(rng.choices(self.values["syllables"], k=rng.randint(2, 3))).capitalize()

    def tell(
        self, rng: random.Random, language: str, kind: str | None = None
    ) -> tuple[str, str, str, Reply]:
        """What the user says, the fact's id, its value, and the confirmation."""
        names = tuple(self.facts)
        fact = self.facts[kind or rng.choices(names, [5 if n == "name" else 1 for n in names])[0]]
        value = self._value(rng, fact.values, language)
        text = rng.choice(fact.tell[language]).expand(rng).replace("{v}", value)
        return text, fact.id, value, filled(fact.heard, value)

    def recall(self, rng: random.Random, language: str, known: dict[str, str]) -> tuple[str, Reply]:
        """A question about something told before (or, at times, never told)."""
        if known and rng.random() < 0.85:
            fact = self.facts[rng.choice(sorted(known))]
        else:
            fact = self.facts[rng.choice(tuple(self.facts))]
        text = rng.choice(fact.ask[language]).expand(rng)
        reply = filled(fact.recall, known[fact.id]) if fact.id in known else fact.missing
        return text, reply

    def quote(self, rng: random.Random, language: str, asked: list[str]) -> tuple[str, Reply]:
        """A question about an earlier question, answered by quoting it."""
        first = rng.random() < 0.3 and len(asked) < 8
        text = rng.choice((self.first if first else self.last)[language]).expand(rng)
        if not asked:
            return text, self.nothing
        return text, filled(self.quoted, asked[0 if first else -1])
