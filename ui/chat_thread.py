"""The thread: finished turns in a Chatbot, and the reply in the making in a Markdown below it.

A Chatbot that is redrawn for every token falls seconds behind after a few turns; so the growing
reply is drawn beside it, ten times a second.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import gradio as gr

from backend.engine.types import EngineStats
from ui import chat_view
from ui.conversations import Conversation, Pending
from ui.i18n import label

FRAME_S = 0.1  # between two drawings of a growing reply
HEARTBEAT_S = 0.5  # between two signs of life without text; they also find a closed tab out

Form = dict[Any, Any]  # component -> value, as Gradio hands over a set of inputs
Updates = dict[Any, Any]  # component -> new value
Frames = AsyncGenerator[Updates, None]


class ChatThread:
    """Builds the thread inside the current layout."""

    def __init__(self) -> None:
        with gr.Column(elem_id="thread"):
            self.chatbot = gr.Chatbot(
                elem_id="chat",
                show_label=False,
                label=label("chat.thread"),
                container=False,
                height=None,
                layout="bubble",
                editable="user",
                buttons=["copy"],
                feedback_options=None,
                allow_tags=False,
                latex_delimiters=chat_view.LATEX_DELIMITERS,
                placeholder=label("chat.empty"),
            )
            with gr.Accordion(
                label("chat.reasoning_live"), open=False, visible=False, elem_id="live-reasoning"
            ) as self.reasoning:
                self.thoughts = self._markdown("live-thoughts")
            self.live = self._markdown("live")
            self.turn_stats = gr.HTML(elem_id="turn-stats", apply_default_css=False)
        self.outputs = (
            self.chatbot, self.reasoning, self.thoughts, self.live, self.turn_stats)

    def _markdown(self, elem_id: str) -> gr.Markdown:
        return gr.Markdown(
            elem_id=elem_id, line_breaks=True, latex_delimiters=chat_view.LATEX_DELIMITERS)

    def at_rest(self, conversation: Conversation, locale: str) -> Updates:
        """All finished turns."""
        return {
            self.chatbot: chat_view.chat_messages(conversation, locale),
            self.reasoning: gr.update(visible=False),
            self.thoughts: "",
            self.live: "",
            self.turn_stats: chat_view.stats_html(conversation, locale),
        }

    def begun(self, conversation: Conversation, pending: Pending, locale: str) -> Updates:
        """The turns before a reply, and a sign that it is coming."""
        return {
            self.chatbot: chat_view.chat_messages(
                conversation, locale, keep=pending.keep, user=pending.user),
            self.live: chat_view.waiting_html(0, None, locale),
        }

    async def frames(
        self, pending: Pending, locale: str, queue: Callable[[], Awaitable[EngineStats | None]]
    ) -> Frames:
        """What changes while the reply grows, until it ends.

        Args:
            queue: the engine's figures, asked while there is no text.
        """
        live, drawn, drawn_at, thinks = pending.live, "", 0.0, False
        while not live.done:
            await live.wait(FRAME_S)
            now = time.monotonic()
            if live.text == drawn and now - drawn_at < HEARTBEAT_S:
                continue
            drawn, drawn_at = live.text, now
            if not drawn:
                stats = await queue()
                yield {self.live: chat_view.waiting_html(now - live.started, stats, locale)}
                continue
            thoughts, answer = chat_view.split_reasoning(drawn)
            updates: Updates = {self.live: answer}
            if thoughts:
                updates[self.thoughts] = thoughts
            if bool(thoughts) != thinks:
                thinks = bool(thoughts)
                updates[self.reasoning] = gr.update(visible=thinks)
            yield updates
