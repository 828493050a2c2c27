"""From a plain question to one as people type it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from assets.demo_model.train.grammar import Pattern
from assets.demo_model.train.knowledge import load, patterns

CJK = re.compile(r"[\u4e00-\u9fff]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Noise:
    """How often each disturbance strikes a question."""

    frame: float = 0.3
    synonym: float = 0.3
    drop: float = 0.08
    typo: float = 0.07
    stray: float = 0.1
    lost: float = 0.05
    plain: float = 0.2  # no disturbance at all


class Phrasing:
    """The patterns, frames and slips of one language (``en`` or ``zh``)."""

    def __init__(self, language: str, stray_words: list[str]) -> None:
        self.language = language
        table = load(f"patterns_{language}")
        self.intents = {k: patterns(v) for k, v in table.items() if isinstance(v, list)}
        self.follow = {k: patterns(v) for k, v in table["follow"].items()}
        self.front: list[str] = table["frame"]["front"]
        self.back: list[str] = table["frame"]["back"]
        noise = load("noise")[language]
        self.synonyms: dict[str, list[str]] = {}
        for group in noise["synonyms"]:
            for word in group:
                self.synonyms.setdefault(word, []).extend(w for w in group if w != word)
        longest_first = sorted(self.synonyms, key=len, reverse=True)
        border = r"\b" if language == "en" else ""
        alternatives = "|".join(re.escape(w) for w in longest_first)
        self.synonym_pattern = re.compile(f"{border}(?:{alternatives}){border}")
        drops = "|".join(re.escape(w) for w in noise["droppable"])
        self.drop_pattern = re.compile(f"{border}(?:{drops}){border} ?")
        self.stray_words = stray_words
        self.noise = Noise()

    def question(self, rng: random.Random, choices: tuple[Pattern, ...], **names: str) -> str:
        """One of the patterns, filled with names, as somebody might type it."""
        text = rng.choice(choices).expand(rng)
        for place, name in names.items():
            text = text.replace("{" + place + "}", name)
        return self.typed(rng, text)

    def framed(self, rng: random.Random, text: str) -> str:
        """A sum with courtesies around it; its words and figures stay."""
        if rng.random() < 0.2:
            text = rng.choice(self.front) + text
        return self._finish(rng, text)

    def typed(
        self, rng: random.Random, text: str, exact: bool = False, keep_case: bool = False
    ) -> str:
        """Frames, slips, case and punctuation. ``exact`` keeps every word as it is.

        ``keep_case`` is for statements with a name in them: no question mark either.
        """
        noise = self.noise
        if not exact and rng.random() >= noise.plain:
            if rng.random() < noise.synonym:
                text = self._exchange(rng, text)
            if rng.random() < noise.drop:
                text = self._drop(rng, text)
            if rng.random() < noise.stray:
                text = self._stray(rng, text)
            if rng.random() < noise.lost:
                text = self._lose(rng, text)
            if rng.random() < noise.frame:
                text = self._frame(rng, text)
            if rng.random() < noise.typo:
                text = slip(rng, text) if self.language == "en" else text
        if self.language == "zh":
            text = spaced(rng, text)
        if keep_case:
            return text + rng.choice(("。", "", "！") if self.language == "zh" else (".", "", "!"))
        return self._finish(rng, text)

    def _exchange(self, rng: random.Random, text: str) -> str:
        return self.synonym_pattern.sub(
            lambda m: rng.choice(self.synonyms[m[0]]) if rng.random() < 0.6 else m[0], text
        )

    def _drop(self, rng: random.Random, text: str) -> str:
        shorter = self.drop_pattern.sub(lambda m: "" if rng.random() < 0.6 else m[0], text)
        return shorter if len(shorter.strip()) > 3 else text

    def _lose(self, rng: random.Random, text: str) -> str:
        """Leaves out any words: what is left must do."""
        if self.language == "zh":
            return "".join(c for c in text if not CJK.match(c) or rng.random() > 0.1) or text
        words = [w for w in text.split(" ") if rng.random() > 0.2]
        return " ".join(words) or text

    def _stray(self, rng: random.Random, text: str) -> str:
        """Puts in a word or two that mean nothing here."""
        if self.language == "zh":
            word = rng.choice(self.stray_words)
            return word + text if rng.random() < 0.5 else text + word
        words = text.split(" ")
        for _ in range(rng.randint(1, 2)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(self.stray_words))
        return " ".join(words)

    def _frame(self, rng: random.Random, text: str) -> str:
        side = rng.random()
        if side < 0.65:
            text = rng.choice(self.front) + text
        if side > 0.55:
            text = text + rng.choice(self.back)
        return text

    def _finish(self, rng: random.Random, text: str) -> str:
        """Case of the first letter, and the mark at the end."""
        case = rng.random()
        if case < 0.45:
            text = text[:1].upper() + text[1:]
        elif case < 0.7:
            text = text.lower()
        elif case < 0.72:
            text = text.upper()
        if text[-1:] in "?!.。？！":
            return text
        marks = ("?", "?", "?", "?", "", "", "", ".", "??", " ?", "!")
        chinese = ("？", "？", "？", "？", "", "", "", "。", "?", "?", "？？")
        return text + rng.choice(chinese if self.language == "zh" else marks)


def slip(rng: random.Random, text: str) -> str:
    """A typing error in a word of four letters or more; figures stay."""
    places = [m.span() for m in re.finditer(r"[A-Za-z]{4,}", text)]
    if not places:
        return text
    first, last = rng.choice(places)
    at = rng.randrange(first + 1, last - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind == 2:
        return text[:at] + text[at] + text[at:]
    return text[:at] + rng.choice(LETTERS) + text[at + 1 :]


def spaced(rng: random.Random, text: str) -> str:
    """Chinese and Latin side by side: with a space, without, as people do."""
    style = rng.random()
    if style < 0.4:
        return re.sub(r"(?<=[\u4e00-\u9fff]) | (?=[\u4e00-\u9fff])", "", text)
    if style < 0.7:
        text = re.sub(r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9])", " ", text)
        return re.sub(r"(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])", " ", text)
    return text
