"""The demo model's exam: 200 held-out questions, graded by required and forbidden words.

    python -m assets.demo_model.exam.exam [MODEL_DIR] [--questions FILE] [--max-tokens 160]

An answer is right when it contains at least one alternative of every required group and no
forbidden word. The facts behind the questions are in `../topics.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": str}
AnswerAll = Callable[[Sequence[list[Message]]], Iterable[str]]  # an answer each, in order

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "questions.jsonl"
TOPICS = HERE.parent / "topics.md"


@dataclass(frozen=True)
class Question:
    """One line of questions.jsonl. The last message is the user's and is the one graded."""

    id: str
    lang: str  # "en" | "zh"
    topic: str  # an id of topics.md
    messages: list[Message]
    required: list[list[str]]  # every group, by any of its alternatives
    forbidden: list[str]


@dataclass(frozen=True)
class Topic:
    """One topic of topics.md; `facts` maps "en" and "zh" to text, empty for arithmetic."""

    id: str
    section: str
    facts: dict[str, str]


def load_topics(path: Path = TOPICS) -> dict[str, Topic]:
    """Read topics.md: `## section`, `### id - names`, `- en: facts`; in Arithmetic, table rows."""
    topics: dict[str, Topic] = {}
    section = ""
    topic: Topic | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section, topic = line[3:].strip(), None
        elif line.startswith("### "):
            topic = Topic(line[4:].split()[0], section, {})
            topics[topic.id] = topic
        elif topic and (fact := re.match(r"- (en|zh): (.+)", line)):
            topic.facts[fact[1]] = fact[2]
        elif section == "Arithmetic" and (row := re.match(r"\| (\w+) \|", line)) and row[1] != "id":
            topics[row[1]] = Topic(row[1], section, {})
    return topics


# --- grading ---------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Fold case, full-width forms and minus signs; drop spaces between Chinese and anything."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("\u2019", "'")
    return re.sub(r"(?<=[\u4e00-\u9fff])\s+|\s+(?=[\u4e00-\u9fff])", "", text)


def _is_negative(before: str) -> bool:
    """Whether a number that follows the text `before` has a sign: `= -7` has, `12 - 7` not."""
    before = before.rstrip()
    if before.endswith(("负", "negative")):
        return True
    for sign in ("-", "minus"):
        if before.endswith(sign):
            left = before[: -len(sign)]
            operand = left.rstrip()[-1:]  # a number or a closing bracket makes it a subtraction
            is_hyphen = sign == "-" and left[-1:].isalpha()
            return not (operand.isdigit() or operand == ")" or is_hyphen)
    return False


def contains(text: str, wanted: str) -> bool:
    """Whether `text` contains `wanted`, case-insensitively, digits at its ends as whole numbers.

    "4 GB" is not in "14 GB", "12" not in "120", "1.2" or "fp12"; "7" is not in "-7", and "-7" is in
    "5 - 12 = -7", "minus 7" and "负 7" but not in "12 - 7".
    """
    text, wanted = normalize(text), normalize(wanted)
    number = re.fullmatch(r"(-?)(\d+(?:\.\d+)?)", wanted)
    body = number[2] if number else wanted
    left = r"(?<![a-z\d.])" if body[0].isdigit() else ""
    right = r"(?!\d|\.\d|,\d{3})" if body[-1].isdigit() else ""
    for match in re.finditer(left + re.escape(body) + right, text):
        if not number or _is_negative(text[: match.start()]) == bool(number[1]):
            return True
    return False


def grade(answer: str, question: Question) -> list[str]:
    """The failures of an answer, each one line; empty when it is right."""
    failures = [
        "lacks " + " | ".join(group)
        for group in question.required
        if not any(contains(answer, word) for word in group)
    ]
    failures += [f"says {word}" for word in question.forbidden if contains(answer, word)]
    return failures


# --- questions -------------------------------------------------------------------------------


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)


def parse_question(line: str) -> Question:
    """Read one line of questions.jsonl; ValueError says what is wrong with it."""
    data = json.loads(line)
    if not isinstance(data, dict) or set(data) != set(Question.__annotations__):
        raise ValueError(f"must be an object with exactly {', '.join(Question.__annotations__)}")
    question = Question(**data)
    if question.lang not in ("en", "zh"):
        raise ValueError(f"lang must be en or zh, not {question.lang!r}")
    if not _is_texts([question.id, question.topic]):
        raise ValueError("id and topic must be text")
    if not isinstance(question.messages, list) or len(question.messages) % 2 == 0:
        raise ValueError("messages must be turns that begin and end with the user's")
    for i, message in enumerate(question.messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"message {i} must have exactly role and content")
        if message["role"] != role or not _is_texts([message["content"]]):
            raise ValueError(f"message {i} must be text of the {role}")
    groups = question.required
    if not isinstance(groups, list) or not groups or not all(g and _is_texts(g) for g in groups):
        raise ValueError("required must be a list of groups of words, at least one")
    if not _is_texts(question.forbidden):
        raise ValueError("forbidden must be a list of words")
    return question


def load_questions(path: Path = QUESTIONS) -> list[Question]:
    """Read and check questions.jsonl.

    Raises:
        UserError: naming the line, when the file is missing, malformed, or repeats itself.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The questions {path} cannot be read: {error}.") from error
    questions: list[Question] = []
    ids: set[str] = set()
    prompts: set[tuple[str, ...]] = set()
    for number, line in enumerate(lines, 1):
        try:
            question = parse_question(line)
            prompt = tuple(normalize(m["content"]).strip() for m in question.messages)
            if question.id in ids or prompt in prompts:
                raise ValueError(f"repeats an id or a conversation ({question.id})")
        except ValueError as error:
            raise UserError(f"{path.name}, line {number}: {error}.") from error
        ids.add(question.id)
        prompts.add(prompt)
        questions.append(question)
    return questions


# --- report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A question, the model's answer, and what is wrong with it (nothing when right)."""

    question: Question
    answer: str
    failures: list[str]


def examine(
    questions: Sequence[Question], answer_all: AnswerAll, show: Callable[[str], None] = print
) -> list[Verdict]:
    """Ask every question, show each answer with its verdict as it comes, return the verdicts."""
    verdicts = []
    answers = answer_all([question.messages for question in questions])
    for question, answer in zip(questions, answers, strict=True):
        verdict = Verdict(question, answer, grade(answer, question))
        verdicts.append(verdict)
        show(f"{'FAIL ' if verdict.failures else 'right'} {question.id}")
        for message in question.messages:
            show(f"      {message['role']}: {message['content']}")
        show(f"   -> {answer.strip()}")
        for failure in verdict.failures:
            show(f"      {failure}")
    return verdicts


def summary(verdicts: Sequence[Verdict], topics: dict[str, Topic]) -> str:
    """Right answers by section of topics.md and language; the last line is the result."""
    sections: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        topic = topics.get(verdict.question.topic)
        sections.setdefault(topic.section if topic else "(unknown topic)", []).append(verdict)

    def score(some: Sequence[Verdict]) -> str:
        return f"{sum(not v.failures for v in some)}/{len(some)}" if some else "-"

    lines = [f"{'':24}{'en':>8}{'zh':>8}{'all':>9}"]
    for name, part in [*sections.items(), ("all", list(verdicts))]:
        by_lang = [[v for v in part if v.question.lang == lang] for lang in ("en", "zh")]
        lines.append(f"{name:24}{score(by_lang[0]):>8}{score(by_lang[1]):>8}{score(part):>9}")
    right = sum(not v.failures for v in verdicts)
    share = 100 * right / len(verdicts) if verdicts else 0.0
    lines.append(f"{right} of {len(verdicts)} right: {share:.1f} %")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exam on a model folder and print every answer and the summary."""
    parser = argparse.ArgumentParser(prog="exam", description="Examine the demo model.")
    parser.add_argument("model", nargs="?", type=Path, default=HERE.parent, help="model folder")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="file of JSON lines")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer in tokens")
    parser.add_argument("--reader", choices=["engine", "transformers"], default="engine")
    args = parser.parse_args(argv)
    try:
        if not (args.model / "config.json").is_file():
            raise UserError(f"{args.model} is no model folder: it has no config.json.")
        if args.max_tokens < 1:
            raise UserError(f"--max-tokens must be at least 1, not {args.max_tokens}.")
        questions = load_questions(args.questions)
        # Imported here, so that grading and its tests need no torch.
        reader: Any
        if args.reader == "engine":
            from assets.demo_model.exam.answer_by_engine import EngineReader

            reader = EngineReader(args.model, max_tokens=args.max_tokens)
        else:
            from assets.demo_model.exam.answer_by_transformers import TransformersReader

            reader = TransformersReader(args.model, max_tokens=args.max_tokens)
        verdicts = examine(questions, reader.answer_all)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(verdicts, load_topics()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
