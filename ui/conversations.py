"""The page's conversations, kept in the server's memory so that a reload shows them again.

A browser tab holds only a random id (see `conversationId` in assets/ui/page.js): turns are not
uploaded again with each message, and other servers seen through the same tunnel port cannot read
them out of the browser's storage.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from backend.chat import ChatBackend, Message, ReplyStats
from backend.errors import UserError
from ui.i18n import t
from ui.live_reply import LiveReply


@dataclass(slots=True)
class Turn:
    """A finished exchange. `finish_reason` is the engine's, or "stopped" or "failed"."""

    user: str
    reply: str
    finish_reason: str
    stats: ReplyStats | None = None


@dataclass(slots=True)
class Pending:
    """A reply being written to `user`; it will stand after the first `keep` turns."""

    user: str
    keep: int
    live: LiveReply


@dataclass(slots=True)
class Conversation:
    """What one browser tab talks about."""

    turns: list[Turn] = field(default_factory=list)
    system_prompt: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)  # as last sent, for a reload
    pending: Pending | None = None
    remote: tuple[tuple[str, str], ChatBackend] | None = None  # restful mode: (URL, key), client

    @property
    def busy(self) -> bool:
        return self.pending is not None

    @property
    def size(self) -> int:
        """Characters held."""
        turns = sum(len(turn.user) + len(turn.reply) for turn in self.turns)
        return len(self.system_prompt) + turns

    def messages(self, keep: int | None = None, user: str | None = None) -> list[Message]:
        """For the model: system prompt, the first `keep` turns (all of them), then `user`."""
        messages: list[Message] = []
        if self.system_prompt.strip():
            messages.append({"role": "system", "content": self.system_prompt})
        for turn in self.turns[:keep]:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.reply})
        if user is not None:
            messages.append({"role": "user", "content": user})
        return messages

    def settle(self, pending: Pending) -> None:
        """Make a pending reply a turn with what has come; without any text, forget it.

        Whoever sees the reply end first calls this: the event that shows it, or the reload of a
        page that went away in the middle. For who comes second there is nothing left to do.
        """
        if self.pending is not pending:
            return
        self.pending = None
        live = pending.live
        live.stop()
        if live.text or live.finish_reason:
            reason = live.finish_reason or ("stopped" if live.stopped else "failed")
            turn = Turn(pending.user, live.text, reason, live.stats)
            self.turns = [*self.turns[:pending.keep], turn]

    async def stop(self) -> None:
        """End a reply that is being written and keep what has come."""
        pending = self.pending
        if pending is not None:
            pending.live.stop()
            await pending.live.wait(1.0)
            self.settle(pending)


class ConversationStore:
    """Conversations by id; the least recently used go first when a cap is reached.

    Args:
        max_conversations: how many are kept.
        max_characters: of all of them together. Whole conversations go, none is cut.
    """

    def __init__(self, max_conversations: int = 1000, max_characters: int = 64_000_000) -> None:
        self.max_conversations = max_conversations
        self.max_characters = max_characters
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._conversations)

    def open(self, conversation_id: str) -> Conversation:
        """The conversation of that id, a new one if there is none (or no longer).

        Raises:
            UserError: not an id as the page makes them.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", conversation_id or ""):
            raise UserError(t("error.no_conversation"))
        conversation = self._conversations.setdefault(conversation_id, Conversation())
        self._conversations.move_to_end(conversation_id)
        if len(self) > self.max_conversations:  # pages that are opened and never asked anything
            self.trim()
        return conversation

    def trim(self) -> None:
        """Forget the least recently used conversations beyond the caps; call after each turn."""
        size = sum(c.size for c in self._conversations.values())
        for key, conversation in list(self._conversations.items())[:-1]:  # the newest stays
            if len(self) <= self.max_conversations and size <= self.max_characters:
                return
            if not conversation.busy:
                size -= conversation.size
                del self._conversations[key]
