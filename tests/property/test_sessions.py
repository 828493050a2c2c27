"""Sessions of any order of requests, against a model of what each conversation must have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backend.errors import UserError
from backend.server.sessions import (
    SessionBusyError,
    SessionLimits,
    Sessions,
    TooManySessionsError,
    Turn,
)

IDLE_S = 10.0
MOST = 2
keys, numbers = st.sampled_from("ab"), st.integers(0, 3)
Name = tuple[str, int]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Conversations(RuleBasedStateMachine):
    """`kept` holds what was said in each session, `open` the turns that go on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sessions = Sessions(SessionLimits(MOST, IDLE_S), lambda: self.now)
        self.kept: dict[Name, tuple[list[str], float]] = {}
        self.open: dict[Name, tuple[Turn, bool, list[str], str]] = {}
        self.said = 0

    def word(self) -> str:
        self.said += 1
        return str(self.said)

    def expect(self, name: Name, work: Callable[[], Any]) -> Any:
        """The result of `work` on a free session; None if it had to be, and was, refused."""
        others = {n for n in {*self.kept, *self.open} if n[0] == name[0]}
        error: type[UserError] | None = None
        if name in self.open:
            error = SessionBusyError
        elif name not in others and len(others) >= MOST:
            error = TooManySessionsError
        try:
            result = work()
        except UserError as refusal:
            assert type(refusal) is error
            return None
        assert error is None
        return result

    @rule(key=keys, number=numbers, keep=st.booleans())
    def begin(self, key: str, number: int, keep: bool) -> None:
        text = self.word()
        turn = self.expect((key, number), lambda: self.sessions.turn(key, number, [user(text)],
                                                                     keep))
        if turn is not None:
            before, _ = self.kept.get((key, number), ([], 0.0))
            assert [m["content"] for m in turn.messages] == [*before, text]
            self.open[key, number] = (turn, keep, [], text)

    @rule(key=keys, number=numbers)
    def say(self, key: str, number: int) -> None:
        if (key, number) in self.open:
            turn, _, reply, _ = self.open[key, number]
            reply.append(self.word())
            turn.said(reply[-1])

    @rule(key=keys, number=numbers, how=st.sampled_from(["end", "fail", "cancel"]))
    def settle(self, key: str, number: int, how: str) -> None:
        found = self.open.pop((key, number), None)
        if how == "cancel":
            async def cancel() -> None:
                self.sessions.cancel(key, number)
            asyncio.run(cancel())
        if found is None:
            return
        turn, keep, reply, asked = found
        if how == "cancel":
            assert turn.cancelled
            turn.said("too late")
        turn.__exit__(None, ValueError() if how == "fail" else None, None)
        before, _ = self.kept.get((key, number), ([], 0.0))
        if how != "fail":
            before = [*before, asked, "".join(reply)] if reply else before
            if not keep:
                before = []
        self.kept.pop((key, number), None)
        if before:
            self.kept[key, number] = (before, self.now)

    @rule(key=keys, number=numbers)
    def add(self, key: str, number: int) -> None:
        text = self.word()
        before, _ = self.kept.get((key, number), ([], 0.0))

        def work() -> bool:
            with self.sessions.turn(key, number, [user(text)], keep=True) as turn:
                turn.accept()
            return True

        if self.expect((key, number), work):
            self.kept[key, number] = ([*before, text], self.now)

    @rule(key=keys, number=numbers)
    def end(self, key: str, number: int) -> None:
        try:
            self.sessions.end(key, number)
        except SessionBusyError:
            assert (key, number) in self.open
        else:
            assert (key, number) not in self.open
            self.kept.pop((key, number), None)

    @rule(seconds=st.sampled_from([1.0, 4.0, IDLE_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for name, (_, used) in list(self.kept.items()):
            if name not in self.open and used <= self.now - IDLE_S:
                del self.kept[name]

    @invariant()
    def nothing_else_is_kept(self) -> None:
        for key in "ab":
            for number in range(4):
                session = self.sessions._find(key, number)
                before, _ = self.kept.get((key, number), ([], 0.0))
                assert (session is None) == (
                    (key, number) not in self.kept and (key, number) not in self.open)
                if session is not None:
                    assert [m["content"] for m in session.messages] == before


Conversations.TestCase.settings = settings(max_examples=100, stateful_step_count=30,
                                           deadline=None)
TestConversations = Conversations.TestCase
