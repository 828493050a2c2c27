"""The thread: finished turns in a Chatbot, and the reply in the making in a Markdown below it.

A Chatbot that is redrawn for every token falls seconds behind after a few turns; so the growing
reply is drawn beside it, by the page's script (see ui/reply_stream.py).
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui import chat_view
from ui.conversations import Conversation
from ui.i18n import label

Form = dict[Any, Any]  # component -> value, as Gradio hands over a set of inputs
Updates = dict[Any, Any]  # component -> new value


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
                gr.Button(label("chat.reasoning_live"), elem_id="toggle-thoughts", size="sm")
                self.thoughts = self._markdown("live-thoughts")
            self.live = self._markdown("live")
            self.growing = (self.thoughts, self.live)
            self.turn_stats = gr.HTML(elem_id="turn-stats", apply_default_css=False)
            # Both pressed by the page's script.
            draw = gr.Button(label("chat.thread"), elem_id="draw-reply")
            draw.click(None, None, list(self.growing), js="() => window.LMDESK.reply")
            self.show = gr.Button(label("chat.thread"), elem_id="show-reply")
        self.turns = (self.chatbot, self.turn_stats)

    def _markdown(self, elem_id: str) -> gr.Markdown:
        return gr.Markdown(
            elem_id=elem_id, line_breaks=True, latex_delimiters=chat_view.LATEX_DELIMITERS)

    def now(self, conversation: Conversation, locale: str) -> Updates:
        """All finished turns; while a reply is being written, those before it, and its question."""
        pending = conversation.pending
        shown = {"keep": pending.keep, "user": pending.user} if pending else {}
        return {
            self.chatbot: chat_view.chat_messages(conversation, locale, **shown),
            self.turn_stats: chat_view.stats_html(conversation, locale),
        }

    def no_reply(self) -> Updates:
        """None is being written."""
        return {self.thoughts: "", self.live: ""}
