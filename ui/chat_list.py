"""The owner's chats beside the open one: search, open, begin, rename, delete."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.conversations import ConversationStore
from ui.i18n import label

PAGE = 30  # chats shown at first, and by each "more"
MAX_SHOWN = 1000


class ChatList:
    """The column at the left. What a click means for the open chat is the chat tab's business."""

    def __init__(self, store: ConversationStore) -> None:
        self.store = store
        with gr.Column(elem_id="chat-list", min_width=0):
            self.new = gr.Button(label("chat.new"), elem_id="new-chat", size="sm")
            self.search = gr.Textbox(
                elem_id="chat-search", label=label("chat.search"), show_label=False,
                placeholder=label("chat.search"), container=False, lines=1, max_lines=1)
            self.chats = gr.Radio(
                [], elem_id="chat-choices", label=label("chat.chats"), container=False)
            self.none = gr.Markdown(label("chat.no_chats"), elem_id="no-chats", visible=False)
            self.more = gr.Button(
                label("chat.more_chats"), elem_id="more-chats", size="sm", visible=False)
            self.shown = gr.Number(PAGE, visible=False, precision=0)
        self.inputs = (self.search, self.shown)
        self.outputs = (self.chats, self.none, self.more)

    async def updates(
        self, owner: str, chat_id: str, search: str | None, shown: float | None
    ) -> dict[Any, Any]:
        """The list with the chats that `search` finds, the open one marked."""
        limit = int(min(max(shown or PAGE, PAGE), MAX_SHOWN))
        found = await self.store.summaries(owner, search or "", limit + 1)
        choices = [(summary.title, summary.id) for summary in found[:limit]]
        marked = chat_id if any(chat_id == choice for _, choice in choices) else None
        return {
            self.chats: gr.update(choices=choices, value=marked),
            self.none: gr.update(visible=not choices),
            self.more: gr.update(visible=len(found) > limit and limit < MAX_SHOWN),
        }
