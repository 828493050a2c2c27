"""A conversation in the terminal: kept here and sent whole each time, or kept by a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from backend.chat import ChatBackend, Delta, Message
from backend.config import SamplingParams


class Conversation(Protocol):
    """Whoever keeps it: what the console needs of one."""

    @property
    def backend(self) -> ChatBackend:
        """Who answers."""

    async def begin(self) -> str:
        """What is in it already, in a sentence; "" if nothing is."""

    def say(self, text: str, sampling: SamplingParams) -> AsyncGenerator[Delta, None]:
        """The reply to the next message. What fails is not remembered; what is closed half-way is,
        as far as it came."""

    async def end(self) -> None:
        """Forget what was said."""

    def farewell(self) -> str:
        """What becomes of it when the user leaves, in a sentence; "" if nothing does."""


class OwnConversation:
    """Kept here, and gone with the program.

    Args:
        system: system prompt.
    """

    def __init__(self, backend: ChatBackend, system: str | None = None) -> None:
        self.backend = backend
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    async def begin(self) -> str:
        return ""

    async def say(self, text: str, sampling: SamplingParams) -> AsyncGenerator[Delta, None]:
        asked = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        failed = False
        try:
            async with aclosing(self.backend.stream(asked, sampling)) as deltas:
                async for delta in deltas:
                    pieces.append(delta.text)
                    yield delta
        except Exception:
            failed = True
            raise
        finally:
            if (reply := "".join(pieces)) and not failed:
                self._messages = [*asked, {"role": "assistant", "content": reply}]

    async def end(self) -> None:
        self._messages = list(self._opening)

    def farewell(self) -> str:
        return ""
