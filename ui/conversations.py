"""The page's conversations: the history's, and the replies that are being written to them.

A browser tab holds only a random id (`conversationId` in assets/ui/chat.js). What is finished is
in the history and read from there each time; only a conversation with a reply in the making, or
with turns that could not be saved, is held here.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from backend.chat import Message
from backend.errors import UserError
from backend.history import History, StoredChat, Summary, Turn, title_of
from backend.live_reply import LiveReply
from ui.i18n import t

GRACE_S = 30.0  # a reply goes on for so long without anybody looking
MAX_UNSAVED = 1000  # conversations
CUT = ("length", "stopped", "failed")  # ways in which a reply ended before its end


@dataclass(slots=True, eq=False)
class Pending:
    """A reply being written to `user`; it will stand after the first `keep` turns.

    Attributes:
        settled: the reply has ended, and is a turn if anything came.
        trouble: why the turn could not be saved, once settled.
    """

    user: str
    keep: int
    live: LiveReply
    viewers: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    trouble: UserError | None = None
    ending: asyncio.Task[None] | None = None  # sees the reply to its end
    leaving: asyncio.Task[None] | None = None  # ends it, unless somebody comes back

    @property
    def lost(self) -> bool:
        """Whether nothing came, so that there is no turn."""
        return self.live.text == self.live.begun and not self.live.finish_reason

    @property
    def unanswered(self) -> str:
        """The user's message, if it got no reply at all, once settled; else ""."""
        return self.user if self.lost and not self.live.begun else ""

    def troubles(self) -> list[BaseException]:
        """What its user should be told, once settled."""
        return [error for error in (self.live.error(), self.trouble) if error is not None]


@dataclass(slots=True, eq=False)
class Conversation(StoredChat):
    """What one browser tab talks about."""

    owner: str = ""
    id: str = ""
    pending: Pending | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.id

    @property
    def busy(self) -> bool:
        return self.pending is not None

    @property
    def name(self) -> str:
        """Its title, or what that will be; "" before the first message."""
        return self.title or (title_of(self.pending.user) if self.pending else "")

    @property
    def cut(self) -> bool:
        """Whether the last reply could go on."""
        return not self.busy and bool(self.turns) and (
            self.turns[-1].finish_reason in CUT and bool(self.turns[-1].reply))

    @property
    def saved(self) -> bool:
        return all(turn.id is not None for turn in self.turns)

    def messages_now(self) -> list[Message]:
        """With the question that is being answered, if one is."""
        pending = self.pending
        return self.messages(pending.keep, pending.user) if pending else self.messages()

    def messages(
        self, keep: int | None = None, user: str | None = None, dropped: int | None = None
    ) -> list[Message]:
        """For the model: system prompt, the first `keep` turns (all of them), then `user`.

        Args:
            dropped: turns left out at the beginning; by default those that the user dropped.
        """
        messages: list[Message] = []
        if self.system_prompt.strip():
            messages.append({"role": "system", "content": self.system_prompt})
        for turn in self.turns[self.dropped if dropped is None else dropped:keep]:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.reply})
        if user is not None:
            messages.append({"role": "user", "content": user})
        return messages


class ConversationStore:
    """Conversations by owner and id. Belongs to one event loop.

    Args:
        sleep: waits for seconds; tests give their own.
    """

    def __init__(
        self,
        history: History,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.history = history
        self._sleep = sleep
        self._held: dict[tuple[str, str], Conversation] = {}
        self._untold: dict[tuple[str, str], Pending] = {}  # they failed
        # Of those who wait for a reply to begin; forgotten with the last of them.
        self._coming: WeakValueDictionary[tuple[str, str], asyncio.Future[Pending]] = (
            WeakValueDictionary())

    async def open(self, owner: str, chat_id: str) -> Conversation:
        """The owner's conversation of that id, a new one if there is none.

        Raises:
            UserError: not an id as the page makes them, or the history cannot be read.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", chat_id or ""):
            raise UserError(t("error.no_conversation"))
        key = (owner, chat_id)
        if key not in self._held:
            stored = await asyncio.to_thread(self.history.open, owner, chat_id) or StoredChat()
            if key not in self._held:  # a reply may have begun meanwhile
                return Conversation(stored.title, stored.system_prompt, stored.sampling,
                                    stored.dropped, stored.turns, owner, chat_id)
        return self._held[key]

    async def summaries(self, owner: str, search: str, limit: int) -> list[Summary]:
        """The owner's chats as `History.summaries` has them, after those that are in no history
        yet because their first reply is still being written."""
        found = await asyncio.to_thread(self.history.summaries, owner, search, limit)
        if search:
            return found
        begun = [Summary(held.id, title_of(held.pending.user), time.time())
                 for held in self._held.values()
                 if held.owner == owner and held.pending and not held.title]
        return [*reversed(begun), *found][:limit]

    # Replies

    def begin(self, conversation: Conversation, user: str, keep: int, live: LiveReply) -> Pending:
        """Hold the conversation until its reply `live` has ended and is saved, looked at or not.

        The caller has made sure that the conversation is not `busy`, and not awaited since.
        """
        pending = conversation.pending = Pending(user, keep, live)
        self._held[conversation.key] = conversation
        self._untold.pop(conversation.key, None)
        pending.leaving = asyncio.create_task(self._abandon(pending))  # until somebody looks
        pending.ending = asyncio.create_task(self._see_to_end(conversation, pending))
        if (coming := self._coming.pop(conversation.key, None)) is not None:
            coming.set_result(pending)
        return pending

    async def next_reply(self, conversation: Conversation, seconds: float) -> Pending | None:
        """The reply that begins next; None if none does in that time."""
        coming = self._coming.setdefault(
            conversation.key, asyncio.get_running_loop().create_future())
        await asyncio.wait({coming}, timeout=seconds)
        return coming.result() if coming.done() else None

    def untold(self, conversation: Conversation) -> Pending | None:
        """The conversation's last reply, if it failed and nobody was told; told once."""
        return self._untold.pop(conversation.key, None)

    def is_busy(self, conversation: Conversation) -> bool:
        """Whether a reply is being written to it, be it from another tab."""
        held = self._held.get(conversation.key)
        return conversation.busy or held is not None and held.busy

    @contextmanager
    def watching(self, pending: Pending) -> Iterator[None]:
        """While somebody looks at a reply it goes on; when nobody does, for the time of grace."""
        pending.viewers += 1
        if pending.leaving:
            pending.leaving.cancel()
        try:
            yield
        finally:
            pending.viewers -= 1
            if not pending.viewers and not pending.live.done:
                pending.leaving = asyncio.create_task(self._abandon(pending))

    async def stop(self, conversation: Conversation) -> None:
        """End the reply that is being written, and keep what has come."""
        if conversation.pending:
            conversation.pending.live.stop()
            await conversation.pending.settled.wait()

    async def _abandon(self, pending: Pending) -> None:
        await self._sleep(GRACE_S)
        pending.live.stop()

    async def _see_to_end(self, conversation: Conversation, pending: Pending) -> None:
        live = pending.live
        await live.wait()
        if pending.leaving:
            pending.leaving.cancel()
        try:
            if not pending.lost:
                reason = live.finish_reason or ("stopped" if live.stopped else "failed")
                turn = Turn(pending.user, live.text, reason, live.stats)
                conversation.turns = [*conversation.turns[:pending.keep], turn]
                conversation.dropped = min(conversation.dropped, pending.keep)
                conversation.title = conversation.title or title_of(conversation.turns[0].user)
                await self.save(conversation)
        except UserError as error:
            pending.trouble = error
        finally:
            conversation.pending = None
            if pending.lost or pending.troubles():
                self._untold[conversation.key] = pending
                for key in list(self._untold)[:-MAX_UNSAVED]:
                    del self._untold[key]
            self._release(conversation)
            pending.settled.set()

    async def save(self, conversation: Conversation) -> None:
        """Write the turns that are not in the history yet.

        Raises:
            UserError: they cannot be saved; they are held, and saved with the next one.
        """
        parent: int | None = None
        for turn in conversation.turns:
            if turn.id is None:
                turn.id = await asyncio.to_thread(
                    self.history.add_turn, conversation.owner, conversation.id, parent, turn,
                    conversation)
            parent = turn.id

    def _release(self, conversation: Conversation) -> None:
        if conversation.saved:
            self._held.pop(conversation.key, None)
        unsaved = [key for key, held in self._held.items() if not held.busy]
        for key in unsaved[:-MAX_UNSAVED]:
            del self._held[key]

    # Changes to a conversation at rest

    async def undo(self, conversation: Conversation) -> str:
        """Take the last turn out of view; returns its user's message, "" if there is none."""
        if not conversation.turns:
            return ""
        *turns, undone = conversation.turns
        last = turns[-1].id if turns else None
        await asyncio.to_thread(self.history.show, conversation.owner, conversation.id, last)
        conversation.turns = turns
        self._release(conversation)
        return undone.user

    async def drop(self, conversation: Conversation, dropped: int) -> None:
        """Leave the first `dropped` turns out of what the model gets."""
        conversation.dropped = dropped
        await asyncio.to_thread(
            self.history.drop_turns, conversation.owner, conversation.id, dropped)

    async def delete(self, conversation: Conversation) -> None:
        await self.stop(conversation)
        await asyncio.to_thread(self.history.delete, conversation.owner, conversation.id)
        self._held.pop(conversation.key, None)
        self._untold.pop(conversation.key, None)
