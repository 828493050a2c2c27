"""Before the context is full: what fills it, and the choice of what to do. Nothing is cut silently.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from backend.chat import ChatBackend, Message
from ui.chat_view import ContextUse
from ui.conversations import Conversation
from ui.i18n import label, t

ROOM = 0.5  # of the context, which dropping turns makes free


class ContextNotice:
    """The panel above the message box."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="context-notice") as self.panel:
            self.text = gr.HTML(elem_id="context-text", apply_default_css=False)
            with gr.Row(elem_classes="lmd-buttons"):
                self.drop = gr.Button(label("context.drop"), elem_id="context-drop", size="sm")
                self.new = gr.Button(label("context.new"), elem_id="context-new", size="sm")
                self.go_on = gr.Button(label("context.go_on"), elem_id="context-go-on", size="sm")
        self.outputs = (self.panel, self.text, self.drop, self.go_on)

    def hidden(self) -> dict[Any, Any]:
        return {self.panel: gr.update(visible=False)}

    def shown(self, use: ContextUse, droppable: bool, locale: str) -> dict[Any, Any]:
        """The panel, with what a message would make of the context, which is known.

        Args:
            droppable: there are turns that could be dropped.
        """
        assert use.tokens is not None and use.limit is not None
        fits = use.tokens < use.limit
        text = t("context.notice" if fits else "context.too_long", locale,
                 tokens=use.tokens, limit=use.limit)
        return {
            self.panel: gr.update(visible=True),
            self.text: f'<div role="alert">{html.escape(text)}</div>',
            self.drop: gr.update(visible=droppable),
            self.go_on: gr.update(visible=fits),
        }


async def context_use(backend: ChatBackend, messages: Sequence[Message]) -> ContextUse:
    """What the messages take of the context.

    Raises:
        UserError: nothing answers, or the template refuses them.
    """
    tokens = await backend.count_tokens(messages) if messages else 0
    return ContextUse(tokens, None if tokens is None else await _limit(backend))


async def _limit(backend: ChatBackend) -> int | None:
    info = (await backend.status()).info
    return info.session_len if info else None


async def turns_to_drop(
    backend: ChatBackend, conversation: Conversation, keep: int, user: str
) -> int:
    """How many turns at the beginning to leave out, so that `ROOM` of the context is free."""
    limit = await _limit(backend) or 0
    fewest, most = conversation.dropped, keep
    while fewest < most:  # the more are dropped, the shorter it is
        middle = (fewest + most) // 2
        tokens = await backend.count_tokens(conversation.messages(keep, user, middle)) or 0
        if tokens <= (1 - ROOM) * limit:
            most = middle
        else:
            fewest = middle + 1
    return most
