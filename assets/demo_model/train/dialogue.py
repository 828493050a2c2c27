"""One conversation: turns that lean on what was said before."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from assets.demo_model.train.arithmetic import Arithmetic
from assets.demo_model.train.conversation import Conversation, Message
from assets.demo_model.train.knowledge import INTENTS, Reply
from assets.demo_model.train.memory import Memory
from assets.demo_model.train.phrasing import CJK, Phrasing
from assets.demo_model.train.questions import Questions, first_sentence

TOKEN_BUDGET = 1800  # estimated; leaves room, because the estimate is rough
LONGEST_QUOTE = 160  # characters of a question that is quoted back
NEXT_INTENT = {"what": "why", "why": "when", "when": "how", "how": "cost", "cost": "what"}


def estimated_tokens(text: str) -> float:
    """A generous guess: a Chinese character is one token, other text two characters a token."""
    chinese = len(CJK.findall(text))
    return 6 + chinese * 1.3 + (len(text) - chinese) / 2.2


@dataclass
class State:
    """What the conversation has seen so far."""

    conversation: Conversation
    language: str
    forced_language: str | None = None
    brief: bool = False
    last: Reply | None = None
    last_language: str = "en"
    facts: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: float = 0.0


class Dialogues:
    """Makes conversations of any length from the questions of the project."""

    def __init__(
        self,
        questions: Questions,
        phrasings: dict[str, Phrasing],
        memory: Memory,
        arithmetic: Arithmetic,
        system_prompts: dict[str, list[str]],
    ) -> None:
        self.questions = questions
        self.phrasings = phrasings
        self.memory = memory
        self.arithmetic = arithmetic
        self.system_prompts = system_prompts

    def make(self, rng: random.Random) -> Conversation:
        """One conversation; half of them are a single turn, a few fill the context."""
        state = State(Conversation(), rng.choice(("en", "zh")))
        self._system(rng, state)
        turns = rng.choices((1, rng.randint(2, 4), rng.randint(5, 9), 60), (44, 36, 17, 3))[0]
        for _ in range(turns):
            if state.tokens > TOKEN_BUDGET:
                break
            if rng.random() < 0.12:
                state.language = "en" if state.language == "zh" else "zh"
            self._turn(rng, state)
        return state.conversation

    def _system(self, rng: random.Random, state: State) -> None:
        kind = rng.choices(("none", "plain", "chinese", "english", "brief"), (72, 16, 4, 4, 4))[0]
        if kind == "none":
            return
        text = rng.choice(self.system_prompts[kind])
        state.conversation.messages.append(Message("system", text))
        state.tokens += estimated_tokens(text)
        state.forced_language = {"chinese": "zh", "english": "en"}.get(kind)
        state.brief = kind == "brief"

    def _turn(self, rng: random.Random, state: State) -> None:
        if state.last is not None and rng.random() < 0.4:
            makers = (
                (self._follow, 12),
                (self._about, 4),
                (self._again, 2),
                (self._short, 2),
                (self._translate, 3),
                (self._next_sum, 5),
            )
        else:
            makers = (
                (self._topic, 56),
                (self._sum, 15),
                (self._talk, 8),
                (self._unknown, 7),
                (self._tell, 5),
                (self._recall, 5),
                (self._quote, 3),
                (self._nothing_to_follow, 1),
            )
        chosen: Callable[[random.Random, State], bool] = rng.choices(
            [m for m, _ in makers], [w for _, w in makers]
        )[0]
        if not chosen(rng, state):
            self._topic(rng, state)

    def _say(
        self, state: State, question: str, reply: Reply, language: str, brief: bool = False
    ) -> None:
        """Adds a turn; what the system prompt demands comes before the question's language."""
        language = state.forced_language or language
        text = reply.text(language)
        if state.brief or brief:
            text = first_sentence(text)
        state.conversation.say(question, text)
        state.asked.append(question)
        state.last, state.last_language = reply, language
        state.tokens += estimated_tokens(question) + estimated_tokens(text)

    # Each maker adds one turn and returns True, or returns False if it does not fit here.

    def _topic(self, rng: random.Random, state: State) -> bool:
        question, reply = self.questions.topic(rng, state.language)
        if not state.facts and rng.random() < 0.02:
            introduction, fact, value, heard = self.memory.tell(rng, state.language, "name")
            state.facts[fact] = value
            mark = "。" if state.language == "zh" else ". "
            question = introduction + mark + question
            reply = Reply(f"{heard.en} {reply.en}", heard.zh + reply.zh, reply.topic, reply.intent)
        self._say(state, question, reply, state.language)
        return True

    def _sum(self, rng: random.Random, state: State) -> bool:
        text, reply = self.arithmetic.question(rng, state.language)
        language = "zh" if CJK.search(text) else "en"
        typed = self.phrasings[state.language].framed(rng, text)
        if CJK.search(typed):
            language = "zh"
        self._say(state, typed, reply, language)
        return True

    def _talk(self, rng: random.Random, state: State) -> bool:
        question, reply = self.questions.talk(rng, state.language)
        self._say(state, question, reply, state.language)
        return True

    def _unknown(self, rng: random.Random, state: State) -> bool:
        question, reply = self.questions.unknown(rng, state.language)
        self._say(state, question, reply, state.language)
        return True

    def _tell(self, rng: random.Random, state: State) -> bool:
        text, fact, value, heard = self.memory.tell(rng, state.language)
        state.facts[fact] = value
        typed = self.phrasings[state.language].typed(rng, text, exact=True, keep_case=True)
        self._say(state, typed, heard, state.language)
        return True

    def _recall(self, rng: random.Random, state: State) -> bool:
        if not state.facts and rng.random() < 0.8:
            return self._tell(rng, state)
        text, reply = self.memory.recall(rng, state.language, state.facts)
        typed = self.phrasings[state.language].typed(rng, text)
        self._say(state, typed, reply, state.language)
        return True

    def _quote(self, rng: random.Random, state: State) -> bool:
        if state.asked and len(state.asked[-1]) > LONGEST_QUOTE:
            return False
        text, reply = self.memory.quote(rng, state.language, state.asked)
        typed = self.phrasings[state.language].typed(rng, text)
        self._say(state, typed, reply, state.language)
        return True

    def _nothing_to_follow(self, rng: random.Random, state: State) -> bool:
        if state.last is not None:
            return False
        follow = self.phrasings[state.language].follow
        choices = follow[rng.choice(("why", "when", "how", "more"))]
        question = self.phrasings[state.language].question(rng, choices)
        self._say(state, question, self.memory.unclear, state.language)
        return True

    def _follow(self, rng: random.Random, state: State) -> bool:
        """``why?`` after an answer about a topic."""
        last = state.last
        if last is None or last.topic is None:
            return False
        follow = self.phrasings[state.language].follow
        replies = self.questions.topics[last.topic].replies
        intent = rng.choice((*INTENTS[1:], *INTENTS[1:], "what", "more"))
        choices = follow[intent]
        if intent == "more":
            intent = NEXT_INTENT[last.intent or "what"]
        question = self.phrasings[state.language].question(rng, choices)
        self._say(state, question, replies[intent], state.language)
        return True

    def _about(self, rng: random.Random, state: State) -> bool:
        """``and AWQ?`` after an answer: the same intent, another topic."""
        last = state.last
        if last is None or last.topic is None:
            return False
        topic = self.questions.pick(rng, state.language)
        name = self.questions.name(rng, topic, state.language)
        phrasing = self.phrasings[state.language]
        question = phrasing.question(rng, phrasing.follow["about"], x=name)
        self._say(state, question, topic.replies[last.intent or "what"], state.language)
        return True

    def _again(self, rng: random.Random, state: State) -> bool:
        if state.last is None:
            return False
        phrasing = self.phrasings[state.last_language]
        question = phrasing.question(rng, phrasing.follow["again"])
        self._say(state, question, state.last, state.last_language)
        return True

    def _short(self, rng: random.Random, state: State) -> bool:
        if state.last is None or state.last.topic is None:
            return False
        phrasing = self.phrasings[state.last_language]
        question = phrasing.question(rng, phrasing.follow["short"])
        self._say(state, question, state.last, state.last_language, brief=True)
        return True

    def _translate(self, rng: random.Random, state: State) -> bool:
        """``in Chinese please`` in either language."""
        if state.last is None or state.forced_language:
            return False
        target = "zh" if state.last_language == "en" else "en"
        table = {"zh": ("en", "chinese"), "en": ("zh", "english")}[target]
        phrasing = self.phrasings[table[0]]
        question = phrasing.question(rng, phrasing.follow[table[1]])
        self._say(state, question, state.last, target)
        return True

    def _next_sum(self, rng: random.Random, state: State) -> bool:
        """``plus 5?`` after a result."""
        last = state.last
        if last is None or last.value is None or not -20 <= last.value <= 200:
            return self._sum(rng, state) if rng.random() < 0.3 else False
        text, reply = self.arithmetic.following(rng, state.language, last.value)
        typed = self.phrasings[state.language].framed(rng, text)
        # "+ 5" names no language: it goes on in that of the last answer.
        plain = not re.search(r"[A-Za-z\u4e00-\u9fff]", typed)
        language = "zh" if CJK.search(typed) else ("en" if not plain else state.last_language)
        self._say(state, typed, reply, language)
        return True
