"""Conversations that the server keeps for /v1/chat/interactive: messages, not KV.

A turn sends the whole conversation to the engine, whose prefix cache has most of it already. So a
session costs a few kilobytes here and nothing there, and an engine that dies takes none along.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from backend.chat import Message
from backend.errors import UserError
from backend.server.failures import ClientGoneError

T = TypeVar("T")


class SessionBusyError(UserError):
    """The session is answering; there is no telling in which order the two would have come."""

    status = 409
    code = "session_busy"


class TooManySessionsError(UserError):
    """One caller has as many sessions as it may have, or all callers together have."""

    status = 429
    code = "too_many_sessions"


@dataclass(frozen=True)
class SessionLimits:
    """What bounds the memory of sessions whose owners never end them.

    One key may have `max_per_key`, as many as it may have replies open. One that nobody has used
    for `idle_s` is forgotten: longer than a break, shorter than what piles up over a day. All keys
    together may have `max_in_all`: in a class anybody who logs in anew counts as another.
    """

    max_per_key: int = 256
    idle_s: float = 3600.0
    max_in_all: int = 4096


@dataclass
class Session:
    """A conversation, and the turn that is adding to it.

    Attributes:
        place: where the last reply came from, if there are several: its prefix is cached there.
    """

    last_used: float
    messages: list[Message] = field(default_factory=list)
    turn: Turn | None = None
    place: object = None


class Sessions:
    """All sessions of a server. Belongs to one event loop.

    A session's name is (key, number): the same number under another key is another session.
    """

    def __init__(
        self, limits: SessionLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or SessionLimits()
        self._clock = clock
        self._by_key: dict[str, dict[int, Session]] = {}

    def turn(self, key: str, number: int, messages: list[Message], keep: bool) -> Turn:
        """Begin an exchange; `with` it, its `messages` are what is to be answered.

        Args:
            number: of the session; -1 is one that nobody can come back to.
            messages: what is said now.
            keep: the session goes on afterwards.

        Raises:
            SessionBusyError, TooManySessionsError: see there.
        """
        session = Session(0.0) if number == -1 else self._open(key, number)
        session.turn = Turn(
            session, messages, lambda failed: self._settled(key, number, keep or failed))
        return session.turn

    def end(self, key: str, number: int) -> None:
        """Forget a conversation, if there is one.

        Raises:
            SessionBusyError: see there.
        """
        if self._find(key, number):
            self._open(key, number)
            self._settled(key, number, keep=False)

    def cancel(self, key: str, number: int) -> None:
        """Stop the reply that is being given, if there is one. What was said of it stays in the
        conversation, which can go on at once."""
        session = self._find(key, number)
        if session and session.turn:
            session.turn.cancel()

    def messages(self, key: str, number: int) -> list[Message]:
        """What was said in a conversation, without the turn that is being answered."""
        session = self._find(key, number)
        return list(session.messages) if session else []

    def _find(self, key: str, number: int) -> Session | None:
        """The session, if it is there; the forgotten ones are not."""
        self._forget_idle(key)
        return self._by_key.get(key, {}).get(number)

    def _forget_idle(self, key: str) -> None:
        own = self._by_key.get(key, {})
        before = self._clock() - self.limits.idle_s
        for idle in [n for n, s in own.items() if s.turn is None and s.last_used <= before]:
            del own[idle]
        if not own:
            self._by_key.pop(key, None)

    def _open(self, key: str, number: int) -> Session:
        """The session, made if it is not there, and free."""
        session = self._find(key, number)
        if session is None:
            self._check_room(key)
            own = self._by_key.setdefault(key, {})
            session = own[number] = Session(self._clock())
        if session.turn is not None:
            raise SessionBusyError(
                f"Session {number} is still answering.",
                "Wait for the end of the reply, or stop it with \"cancel\": true.",
                field="session_id")
        return session

    def _check_room(self, key: str) -> None:
        wait = f"idle ones end after {self.limits.idle_s / 60:.0f} minutes."
        if (count := len(self._by_key.get(key, {}))) >= self.limits.max_per_key:
            raise TooManySessionsError(
                f"There are {count} sessions open already.",
                f"End one (interactive_mode false, with an empty prompt), or wait: {wait}")
        if self._count() >= self.limits.max_in_all:
            for other in list(self._by_key):
                self._forget_idle(other)
            if (count := self._count()) >= self.limits.max_in_all:
                raise TooManySessionsError(
                    f"This server has {count} sessions open, as many as it keeps.",
                    f"Ask without a session (leave session_id out), or wait: {wait}")

    def _count(self) -> int:
        return sum(map(len, self._by_key.values()))

    def _settled(self, key: str, number: int, keep: bool) -> None:
        """Nobody is adding to the session any more."""
        own = self._by_key.get(key, {})
        if number not in own:
            return
        own[number].last_used = self._clock()
        if not keep or not own[number].messages:
            del own[number]
        if not own:
            del self._by_key[key]


class Turn:
    """One exchange. When it is left, the conversation has what was said and the reply as far as it
    came; or neither, if no reply came where one was to come. After an error the session is what it
    was before.

    Attributes:
        messages: the conversation to answer.
        cancelled: by another request; the reply ends here.
        failed: the reply ended in an error.
    """

    def __init__(
        self, session: Session, new: list[Message], on_settled: Callable[[bool], None]
    ) -> None:
        self._session = session
        self._on_settled = on_settled
        self.messages = [*session.messages, *new]
        self.cancelled = self.failed = False
        self._accepted = False
        self._reply: list[str] | None = None
        self._waiting: asyncio.Timeout | None = None

    @property
    def place(self) -> object:
        """The session's."""
        return self._session.place

    @place.setter
    def place(self, place: object) -> None:
        self._session.place = place

    def said(self, text: str) -> None:
        """A piece of the reply, perhaps an empty one."""
        if self._reply is None:
            self._reply = []
        self._reply.append(text)

    def accept(self) -> None:
        """There is to be no reply: what was said stays all the same."""
        self._accepted = True

    def cancel(self) -> None:
        """End the reply. The session is free when this returns."""
        self.cancelled = True
        self._settle()
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def until_cancelled(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """`items` as long as nobody cancels, not even while the next one is awaited."""
        while not self.cancelled:
            try:
                async with asyncio.timeout(None) as self._waiting:
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not self.cancelled:
                    raise
                return
            finally:
                self._waiting = None
            yield item

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ClientGoneError):
            self.failed = True
        self._settle()

    def _settle(self) -> None:
        if self._session.turn is not self:
            return  # cancelled, and perhaps the next turn has begun
        self._session.turn = None
        if self.failed:
            pass
        elif self._reply is not None:
            reply = {"role": "assistant", "content": "".join(self._reply)}
            self._session.messages = [*self.messages, reply]
        elif self._accepted:
            self._session.messages = self.messages
        self._on_settled(self.failed)
