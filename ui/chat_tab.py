"""The chat tab: maps its fields to messages and sampling settings, and shows the reply."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from backend.chat import ChatBackend, Message
from backend.engine.types import EngineStats
from backend.errors import UserError
from backend.live_reply import LiveReply
from backend.services import Services
from ui import chat_view
from ui.chat_actions import EVENT, ChatActions
from ui.chat_list import ChatList
from ui.chat_settings import ChatSettings
from ui.chat_thread import ChatThread, Form, Frames, Updates
from ui.chat_tools import ChatTools
from ui.context_notice import ContextNotice, turns_to_drop
from ui.conversations import Conversation, ConversationStore, Pending
from ui.i18n import label, locale_of, t
from ui.owner import owner_of
from ui.remote_panel import RemotePanel

logger = logging.getLogger(__name__)


class ChatTab:
    """Builds the tab's components inside the current layout and wires them."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.store = ConversationStore(services.history)
        with gr.Row(elem_id="chat-page"):
            self.list = ChatList(services.history)
            with gr.Column(scale=5, elem_id="chat-main"):
                self._build_header()
                self.thread = ChatThread()
                self.notice = ContextNotice()
                self._build_composer()
            with gr.Column(scale=2, min_width=280, elem_id="chat-settings"):
                self.remote = RemotePanel(services) if services.remote else None
                self.settings = ChatSettings(services, services.history)
                self.tools = ChatTools()
        self.form = {
            self.conversation_id, self.box, self.asked, self.going_on, self.tools.origin,
            *self.list.inputs, *self.settings.inputs,
            *(self.remote.inputs if self.remote else ()),
        }
        self.outputs = [
            *self.thread.outputs, *self.notice.outputs, *self.list.outputs, self.title,
            self.delete, self.meter, self.box, self.returned, self.send, self.stop, self.asked,
            self.going_on,
        ]
        self._wire()

    # Layout

    def _build_header(self) -> None:
        with gr.Row(elem_id="chat-header"):
            self.toggle = gr.Button(label("chat.chats"), elem_id="toggle-chats", size="sm")
            self.title = gr.Textbox(
                elem_id="chat-title", label=label("chat.title"), show_label=False, lines=1,
                max_lines=1, container=False, placeholder=label("chat.new"), interactive=False)
            self.delete = gr.Button(
                label("chat.delete"), elem_id="delete-chat", size="sm", visible=False)

    def _build_composer(self) -> None:
        with gr.Column(elem_id="composer"):
            self.box = gr.Textbox(
                elem_id="message",
                label=label("chat.message"),
                show_label=False,
                placeholder=label("chat.placeholder"),
                lines=1,
                max_lines=8,
                autofocus=True,
                container=False,
            )
            with gr.Row(elem_id="composer-row"):
                self.meter = gr.HTML(elem_id="meter", apply_default_css=False)
                self.stop = gr.Button(
                    label("chat.stop"), elem_id="stop", variant="stop", size="sm", visible=False)
                self.send = gr.Button(
                    label("chat.send"), elem_id="send", variant="primary", size="sm")
        self.conversation_id = gr.Textbox(visible=False)
        self.returned = gr.Textbox(visible=False)  # an unsent message on its way back to the box
        self.asked = gr.State(None)  # (user's message, turns to keep) that the notice is about
        self.going_on = gr.State("")  # the chat that may fill its context, as the user said

    def _wire(self) -> None:
        self.give_back: dict[str, Any] = {
            "fn": None, "inputs": [self.box, self.returned], "outputs": [self.box],
            "js": "(box, returned) => box || returned"}
        notice = self.notice
        replies = [
            gr.on([self.box.submit, self.send.click], self.on_send, self.form, self.outputs,
                  **EVENT),
            self.thread.chatbot.example_select(
                self.on_example, self.form, self.outputs, **EVENT),
            self.thread.chatbot.retry(self.on_retry, self.form, self.outputs, **EVENT),
            self.thread.chatbot.edit(self.on_edit, self.form, self.outputs, **EVENT),
            notice.go_on.click(self.on_go_on, self.form, self.outputs, **EVENT),
            notice.drop.click(self.on_drop, self.form, self.outputs, **EVENT),
        ]
        for reply in replies:
            reply.then(**self.give_back)
        self.thread.chatbot.undo(self.on_undo, self.form, self.outputs, **EVENT).then(
            **self.give_back)
        self.stop.click(self.on_stop, [self.conversation_id], [], queue=False, **EVENT)
        self.toggle.click(None, js="() => window.LMDESK.toggleChats()")
        self.actions = ChatActions(self, replies)

    def wire_load(self, page: gr.Blocks) -> None:
        """Show the tab's conversation when the page is opened or reloaded."""
        self.actions.wire_load(page)
        if self.remote:
            self.remote.wire_load(page)

    # Events

    async def on_send(self, form: Form, request: gr.Request) -> Frames:
        async with aclosing(self._reply(form, request, form[self.box])) as frames:
            async for updates in frames:
                yield updates

    async def on_example(self, form: Form, event: gr.SelectData, request: gr.Request) -> Frames:
        async with aclosing(self._reply(form, request, event.value["text"])) as frames:
            async for updates in frames:
                yield updates

    async def on_retry(self, form: Form, request: gr.Request) -> Frames:
        conversation = await self.open(form, request)
        if not conversation.turns:  # the page shows what the server has forgotten
            yield await self.at_rest(form, request)
            return
        last = len(conversation.turns) - 1
        user = conversation.turns[last].user
        async with aclosing(self._reply(form, request, user, keep=last)) as frames:
            async for updates in frames:
                yield updates

    async def on_edit(self, form: Form, event: gr.EditData, request: gr.Request) -> Frames:
        conversation = await self.open(form, request)
        turn = chat_view.turn_of_message(conversation, locale_of(request), event.index)
        if turn is None:
            yield await self.at_rest(form, request)
            return
        async with aclosing(self._reply(form, request, event.value, keep=turn)) as frames:
            async for updates in frames:
                yield updates

    async def on_go_on(self, form: Form, request: gr.Request) -> Frames:
        user, keep = form[self.asked] or ("", 0)
        form[self.going_on] = form[self.conversation_id]
        async with aclosing(self._reply(form, request, user, keep=keep)) as frames:
            async for updates in frames:
                yield updates

    async def on_drop(self, form: Form, request: gr.Request) -> Frames:
        user, keep = form[self.asked] or ("", 0)
        conversation = await self.open(form, request)
        if not conversation.busy and user:
            dropped = await turns_to_drop(self.backend(form), conversation, keep, user)
            await self.store.drop(conversation, dropped)
        async with aclosing(self._reply(form, request, user, keep=keep)) as frames:
            async for updates in frames:
                yield updates

    async def on_undo(self, form: Form, request: gr.Request) -> Updates:
        conversation = await self.open(form, request)
        if conversation.busy:
            self.warn(UserError(t("error.busy", locale_of(request))), request)
            return {self.returned: ""}
        undone = await self.store.undo(conversation)
        return {**await self.at_rest(form, request), self.returned: undone}

    async def on_stop(self, conversation_id: str, request: gr.Request) -> None:
        # The event that draws the reply sees its end and shows it.
        await self.store.stop(await self.store.open(
            self.owner(conversation_id, request), conversation_id))

    async def on_attach(self, form: Form, request: gr.Request) -> Frames:
        """Draw the reply that is being written already, if one is."""
        conversation = await self.open(form, request)
        if conversation.pending is None:
            yield {self.returned: ""}
            return
        async with aclosing(
            self._watch(form, request, conversation, conversation.pending)
        ) as frames:
            async for updates in frames:
                yield updates

    # A reply

    async def _reply(
        self, form: Form, request: gr.Request, user: str, *, keep: int | None = None
    ) -> Frames:
        """Draw the reply to `user` after the first `keep` turns (all of them) as it grows.

        `user` leaves the message box if it stands there; what becomes no turn goes back there.
        """
        locale = locale_of(request)
        try:
            conversation = await self.open(form, request)
            self._check(conversation, user, locale)
            sampling, backend = self.settings.params(form), self.backend(form)
            conversation.system_prompt = form[self.settings.system_prompt] or ""
            conversation.sampling = self.settings.values(form)
            keep = len(conversation.turns) if keep is None else keep
            if form[self.going_on] != conversation.id and (notice := await self._notice(
                    backend, conversation, keep, user, locale)):
                yield {**notice, self.asked: (user, keep), self.returned: ""}
                return
            self._check(conversation, user, locale)  # meanwhile another tab may have asked
            model = self.remote.model(form) if self.remote else None
            live = LiveReply(backend, conversation.messages(keep, user), sampling, model)
            pending = self.store.begin(conversation, user, keep, live)
        except UserError as error:
            self.warn(error, request)
            yield {self.returned: ""}
            return
        async with aclosing(self._watch(form, request, conversation, pending)) as frames:
            async for updates in frames:
                yield updates

    async def _watch(
        self, form: Form, request: gr.Request, conversation: Conversation, pending: Pending
    ) -> Frames:
        """Draw a reply as it grows, and the tab at rest when it has ended."""
        locale = locale_of(request)
        with self.store.watching(pending):
            yield {
                **self.thread.begun(conversation, pending, locale),
                **self.notice.hidden(),
                self.send: gr.update(visible=False),
                self.stop: gr.update(visible=True),
                self.going_on: form[self.going_on],
                self.asked: None,
                self.returned: "",
                **({self.box: ""} if form[self.box] == pending.user else {}),
            }
            asked = conversation.messages(pending.keep, pending.user)
            yield {self.meter: await self._meter(asked, form, locale)}
            frames = self.thread.frames(pending, locale, self._queue)
            async with aclosing(frames):
                async for updates in frames:
                    yield updates
            await pending.settled.wait()
        for error in (pending.live.error(), pending.trouble):
            if error is not None:
                self.warn(error, request)
        yield {**await self.at_rest(form, request),
               self.returned: pending.user if pending.lost else ""}

    def _check(self, conversation: Conversation, user: str, locale: str) -> None:
        if self.store.is_busy(conversation):
            raise UserError(t("error.busy", locale))
        if not isinstance(user, str) or not user.strip():
            raise UserError(t("error.empty_message", locale))

    async def _notice(
        self, backend: ChatBackend, conversation: Conversation, keep: int, user: str, locale: str
    ) -> Updates:
        try:
            return await self.notice.updates(backend, conversation, keep, user, locale)
        except UserError:  # no model, or no server: the reply will say so
            return {}

    async def _queue(self) -> EngineStats | None:
        return None if self.remote else (await self.services.chat.status()).stats

    # What the parts share

    def owner(self, conversation_id: str, request: gr.Request) -> str:
        return owner_of(request, self.store.history.instance, conversation_id)

    async def open(self, form: Form, request: gr.Request) -> Conversation:
        """The conversation that the page shows."""
        chat_id = form[self.conversation_id]
        return await self.store.open(self.owner(chat_id, request), chat_id)

    def backend(self, form: Form | None) -> ChatBackend:
        """What answers; before the page has a form, the default."""
        return self.remote.backend(form) if self.remote and form else self.services.chat

    async def at_rest(self, form: Form, request: gr.Request) -> Updates:
        """The tab with all finished turns."""
        conversation = await self.open(form, request)
        return await self.shown(
            conversation, form, locale_of(request), form[self.list.search], form[self.list.shown])

    async def shown(
        self, conversation: Conversation, form: Form | None, locale: str, search: str, count: float
    ) -> Updates:
        """The tab with the conversation's turns, beside the owner's others."""
        messages = conversation.messages()
        listed, meter = await asyncio.gather(
            self.list.updates(conversation.owner, conversation.id, search, count),
            self._meter(messages, form, locale))
        return {
            **self.thread.at_rest(conversation, locale),
            **self.notice.hidden(),
            **listed,
            self.title: gr.update(
                value=conversation.title, interactive=bool(conversation.title)),
            self.delete: gr.update(visible=bool(conversation.title)),
            self.meter: meter,
            self.send: gr.update(visible=not conversation.busy),
            self.stop: gr.update(visible=conversation.busy),
        }

    async def _meter(self, messages: list[Message], form: Form | None, locale: str) -> str:
        try:
            backend = self.backend(form)
            tokens = await backend.count_tokens(messages) if messages else 0
            if tokens is None or self.remote:
                return chat_view.meter_html(tokens, None, locale)
            info = (await backend.status()).info
        except UserError:  # no model, or no server: the status bar says so
            return ""
        return chat_view.meter_html(tokens, info.session_len if info else None, locale)

    def warn(self, error: BaseException, request: gr.Request) -> None:
        """A toast with a sentence that helps; what only a programmer understands is logged."""
        if isinstance(error, UserError):
            gr.Warning(escape(str(error)))
        else:
            logger.error("A reply failed", exc_info=error)
            gr.Warning(t("error.internal", locale_of(request)))
