"""A quick look at the trained network: questions of ``data/check.toml``, answered greedily."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from assets.demo_model.train.conversation import Message
from assets.demo_model.train.evaluate import answers
from assets.demo_model.train.knowledge import load
from assets.demo_model.train.network import Llama

BATCH = 32


@dataclass(frozen=True)
class Checked:
    """One conversation's last question, the network's answer, and whether it is right."""

    question: str
    answer: str
    right: bool


def is_right(answer: str, words: list[list[str]]) -> bool:
    """True if the answer has one word of each group; case does not matter."""
    text = answer.lower()
    return all(any(word.lower() in text for word in group) for group in words)


def check_answers(model: Llama, tokenizer: Tokenizer, quick: bool = False) -> dict[str, Any]:
    """Answers all questions, turn by turn; ``quick`` takes only a few, cut short.

    Returns the number of right answers, of questions, and each question with its answer.
    """
    checks: list[dict[str, Any]] = load("check")["check"]
    if quick:
        checks = checks[:2]
    talks: list[list[Message]] = [[] for _ in checks]
    last = [""] * len(checks)
    for turn in range(max(len(c["ask"]) for c in checks)):
        asked = [i for i, c in enumerate(checks) if turn < len(c["ask"])]
        for index in asked:
            talks[index].append(Message("user", checks[index]["ask"][turn]))
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            replies = answers(model, tokenizer, [talks[i] for i in part], 8 if quick else 160)
            for index, reply in zip(part, replies, strict=True):
                talks[index].append(Message("assistant", reply))
                last[index] = reply
    checked = [
        Checked(" / ".join(c["ask"]), answer, is_right(answer, c["words"]))
        for c, answer in zip(checks, last, strict=True)
    ]
    return {
        "right": sum(c.right for c in checked),
        "questions": len(checked),
        "answers": [asdict(c) for c in checked],
    }
