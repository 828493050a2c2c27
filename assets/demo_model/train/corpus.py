"""The corpus: an endless stream of conversations, the same for the same seed."""

from __future__ import annotations

import random
import re
from pathlib import Path

from assets.demo_model.train.arithmetic import Arithmetic
from assets.demo_model.train.conversation import Conversation
from assets.demo_model.train.dialogue import Dialogues
from assets.demo_model.train.knowledge import load
from assets.demo_model.train.memory import Memory
from assets.demo_model.train.phrasing import Phrasing
from assets.demo_model.train.questions import Questions

CALIBRATION = Path(__file__).parents[2] / "calibration"


def strange_words() -> dict[str, list[str]]:
    """Words from the calibration text that the questions do not know, by language.

    They stand for everything the model has never heard of. Chinese ones are made of two nouns of
    ``data/unknown.toml``, because Chinese text has no borders between words.
    """
    text = (CALIBRATION / "en.txt").read_text(encoding="utf-8")
    known = set(re.findall(r"[a-z]+", topic_words()))
    words = sorted(set(re.findall(r"\b[a-z]{4,11}\b", text)) - known)
    beyond = load("unknown")
    chinese = beyond["thing_zh"] + beyond["food_zh"] + beyond["place_zh"] + beyond["person_zh"]
    return {"en": words, "zh": chinese}


def topic_words() -> str:
    """All that the topic files and patterns say, in lower case."""
    data = Path(__file__).parent / "data"
    files = [*sorted(data.glob("topics_*.toml")), data / "patterns_en.toml", data / "noise.toml"]
    return "\n".join(f.read_text(encoding="utf-8") for f in files).lower()


class Corpus:
    """Makes conversations; all randomness comes from the caller's generator."""

    def __init__(self) -> None:
        strange = strange_words()
        phrasings = {k: Phrasing(k, strange[k]) for k in ("en", "zh")}
        self.questions = Questions(phrasings, strange)
        self.arithmetic = Arithmetic()
        self.dialogues = Dialogues(
            self.questions, phrasings, Memory(), self.arithmetic, load("system")
        )

    def conversation(self, rng: random.Random) -> Conversation:
        """The next conversation."""
        return self.dialogues.make(rng)
