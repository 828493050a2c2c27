"""Chats over a scripted model, for tests without a page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from backend.chat import Delta, ReplyStats
from backend.config import SamplingParams
from backend.live_reply import LiveReply
from ui.conversations import Conversation, ConversationStore, Pending


@dataclass
class Backend:
    """Yields `pieces`, then waits for ever if `hangs`."""

    pieces: list[str]
    hangs: bool = False
    error: Exception | None = None
    events: list[str] = field(default_factory=list)

    async def stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Delta, None]:
        try:
            for piece in self.pieces:
                yield Delta(piece)
            if self.error:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
            yield Delta("", "stop", stats=ReplyStats(3, len(self.pieces)))
        finally:
            self.events.append("closed")


ANNA, BERT = "browser:anna", "browser:bert"
CHAT = "a" * 32


class Clock:
    """A sleep that ends when the test says that the time is over."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.over = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.over.wait()


def begin(
    store: ConversationStore, conversation: Conversation, backend: Backend, user: str, keep: int
) -> Pending:
    live = LiveReply(backend.stream(conversation.messages(keep, user), SamplingParams()))
    return store.begin(conversation, user, keep, live)


async def talk(store: ConversationStore, *users: str, owner: str = ANNA) -> Conversation:
    """A chat with replies to these messages."""
    for keep, user in enumerate(users):
        pending = begin(store, await store.open(owner, CHAT), Backend([f"re {user}"]), user, keep)
        await pending.settled.wait()
    return await store.open(owner, CHAT)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)
