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
from backend.live_reply import LiveReply
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
            # The style sheet shows it when there are thoughts, so that no event has to. A closed
            # accordion would not tell: it has no children.
            with gr.Column(elem_id="live-reasoning"):
                fold = gr.Button(
                    label("chat.reasoning_live"), elem_id="toggle-thoughts", size="sm")
                fold.click(None, js="() => window.LMDESK.toggleThoughts()")
                self.thoughts = self._markdown("live-thoughts")
            self.live = self._markdown("live")
            self.turn_stats = gr.HTML(elem_id="turn-stats", apply_default_css=False)
        # A growing reply draws nothing else: see `ChatTab.begun`.
        self.live_outputs = (self.thoughts, self.live)
        self.outputs = (self.chatbot, *self.live_outputs, self.turn_stats)

    def _markdown(self, elem_id: str) -> gr.Markdown:
        return gr.Markdown(
            elem_id=elem_id, line_breaks=True, latex_delimiters=chat_view.LATEX_DELIMITERS)

    def now(self, conversation: Conversation, locale: str) -> Updates:
        """All finished turns, or those before the reply that is being written."""
        pending = conversation.pending
        if pending is None:
            return {
                self.chatbot: chat_view.chat_messages(conversation, locale),
                **self.no_reply(),
                self.turn_stats: chat_view.stats_html(conversation, locale),
            }
        return {
            self.chatbot: chat_view.chat_messages(
                conversation, locale, keep=pending.keep, user=pending.user),
            **(self.frame(pending.live.text) if pending.live.text else
               self._waiting(pending.live, None, locale)),
            self.turn_stats: chat_view.stats_html(conversation, locale),
        }

    def no_reply(self) -> Updates:
        """None is being written."""
        return {self.thoughts: "", self.live: ""}

    def frame(self, text: str) -> Updates:
        """What has come of a reply."""
        thoughts, answer = chat_view.split_reasoning(text)
        return {self.thoughts: thoughts, self.live: answer}

    def _waiting(self, live: LiveReply, stats: EngineStats | None, locale: str) -> Updates:
        seconds = time.monotonic() - live.started
        return {self.thoughts: "", self.live: chat_view.waiting_html(seconds, stats, locale)}

    async def frames(
        self, pending: Pending, locale: str, queue: Callable[[], Awaitable[EngineStats | None]]
    ) -> Frames:
        """How the reply grows, until it ends.

        Args:
            queue: the engine's figures, asked while there is no text.
        """
        live, drawn, drawn_at = pending.live, "", 0.0
        while not live.done:
            if not live.text:
                await live.wait_begun(HEARTBEAT_S)
                if not live.text and not live.done:
                    yield self._waiting(live, await queue(), locale)
                continue
            now = time.monotonic()
            if live.text != drawn or now - drawn_at >= HEARTBEAT_S:
                drawn, drawn_at = live.text, now
                yield self.frame(drawn)
            await live.wait(FRAME_S)
