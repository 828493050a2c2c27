"""The chat tab: maps its fields to messages and sampling settings, and shows the reply."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from backend.chat import ChatBackend, Message
from backend.engine.types import EngineStats
from backend.errors import UserError
from backend.live_reply import LiveReply
from backend.services import Services
from ui import answer, chat_view
from ui.chat_actions import EVENT, ChatActions
from ui.chat_list import ChatList
from ui.chat_settings import ChatSettings
from ui.chat_thread import ChatThread, Form, Updates
from ui.chat_tools import ChatTools
from ui.context_notice import ContextNotice, ContextUse, context_use, turns_to_drop
from ui.conversations import Conversation, ConversationStore
from ui.i18n import label, locale_of, t
from ui.owner import owner_of
from ui.remote_panel import RemotePanel
from ui.reply_stream import ReplyStream
from ui.roles import Page, caller


class ChatTab:
    """Builds the tab's components inside the current layout and wires them."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.store = ConversationStore(services.history)
        self.replies = ReplyStream(self.store, self._queue)
        with gr.Row(elem_id="chat-page"):
            self.list = ChatList(self.store)
            with gr.Column(scale=5, elem_id="chat-main"):
                self._build_header()
                self.thread = ChatThread()
                self.notice = ContextNotice()
                self._build_composer()
            with gr.Column(scale=2, min_width=280, elem_id="chat-settings"):
                self.remote = RemotePanel(services) if services.remote else None
                self.settings = ChatSettings(services, services.history)
                self.tools = ChatTools()
        # Each input of an event costs the browser a part of the first token's time.
        asking = {self.conversation_id, self.box, self.asked, self.going_on, *self.settings.fields,
                  *(self.remote.inputs if self.remote else ())}
        self.asking = asking
        self.form = asking | {
            self.tools.origin, *self.list.inputs, self.settings.presets.choice}
        self.begun = [
            *self.thread.turns, *self.notice.outputs, self.meter, self.box, self.returned,
            self.send, self.stop, self.resume, self.asked, self.going_on]
        self.outputs = [
            *self.begun, *self.thread.growing, *self.list.outputs, self.title, self.delete]
        self.for_hosts = [self.remote.server] if self.remote else []
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
                self.resume = gr.Button(
                    label("chat.resume"), elem_id="resume", size="sm", visible=False)
                self.stop = gr.Button(
                    label("chat.stop"), elem_id="stop", variant="stop", size="sm", visible=False)
                self.send = gr.Button(
                    label("chat.send"), elem_id="send", variant="primary", size="sm")
        self.conversation_id = gr.Textbox(visible=False, elem_id="conversation-id")
        self.returned = gr.Textbox(visible=False)  # an unsent message on its way back to the box
        self.asked = gr.State(None)  # (user's message, turns to keep) that the notice is about
        self.going_on = gr.State("")  # the chat that may fill its context, as the user said

    def _wire(self) -> None:
        self.give_back: dict[str, Any] = {
            "fn": None, "inputs": [self.box, self.returned], "outputs": [self.box],
            "js": "(box, returned) => box || returned"}
        chatbot, notice = self.thread.chatbot, self.notice
        begin: dict[str, Any] = {
            "inputs": self.asking, "outputs": self.begun, **EVENT,
            "js": "(...form) => { window.LMDESK.asking(); return form; }"}
        for event in (
            gr.on([self.box.submit, self.send.click], self.on_send, **begin),
            chatbot.example_select(self.on_example, **begin),
            chatbot.retry(self.on_retry, **begin),
            chatbot.edit(self.on_edit, **begin),
            self.resume.click(self.on_resume, **begin),
            notice.go_on.click(self.on_go_on, **begin),
            notice.drop.click(self.on_drop, **begin),
        ):
            event.then(None, js="() => window.LMDESK.asked()")
        self.thread.show.click(
            self.on_show, self.form, self.outputs, trigger_mode="always_last", **EVENT,
        ).then(**self.give_back).then(None, js="() => window.LMDESK.shown()")
        chatbot.undo(self.on_undo, self.form, self.outputs, **EVENT).then(**self.give_back)
        self.stop.click(self.on_stop, [self.conversation_id], [], queue=False, **EVENT)
        self.actions = ChatActions(self)

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """Show the browser tab's conversation when the page is opened or reloaded."""
        self.replies.wire(page)
        self.actions.wire_load(page)
        if self.remote:
            self.remote.wire_load(page)

    # Events that begin a reply

    async def on_send(self, form: Form, request: gr.Request) -> Updates:
        return await self._begin(form, request, form[self.box])

    async def on_example(self, form: Form, event: gr.SelectData, request: gr.Request) -> Updates:
        return await self._begin(form, request, event.value["text"])

    async def on_retry(self, form: Form, request: gr.Request) -> Updates:
        turns = (await self.open(form, request)).turns
        if not turns:  # the page shows what the server has forgotten
            return {self.returned: ""}
        return await self._begin(form, request, turns[-1].user, keep=len(turns) - 1)

    async def on_edit(self, form: Form, event: gr.EditData, request: gr.Request) -> Updates:
        conversation = await self.open(form, request)
        turn = chat_view.turn_of_message(conversation, locale_of(request), event.index)
        if turn is None:
            return {self.returned: ""}
        return await self._begin(form, request, event.value, keep=turn)

    async def on_resume(self, form: Form, request: gr.Request) -> Updates:
        conversation = await self.open(form, request)
        if not conversation.cut:  # the page shows what the server has forgotten
            return {self.returned: ""}
        cut = conversation.turns[-1]
        return await self._begin(
            form, request, cut.user, keep=len(conversation.turns) - 1, begun=cut.reply)

    async def on_go_on(self, form: Form, request: gr.Request) -> Updates:
        user, keep = form[self.asked] or ("", 0)
        form[self.going_on] = form[self.conversation_id]
        return await self._begin(form, request, user, keep=keep)

    async def on_drop(self, form: Form, request: gr.Request) -> Updates:
        user, keep = form[self.asked] or ("", 0)
        conversation = await self.open(form, request)
        if not conversation.busy and user:
            dropped = await turns_to_drop(
                self.backend(form, request), conversation, keep, user)
            await self.store.drop(conversation, dropped)
        return await self._begin(form, request, user, keep=keep)

    async def _begin(
        self, form: Form, request: gr.Request, user: str, *, keep: int | None = None,
        begun: str = "",
    ) -> Updates:
        """Begin the reply to `user` after the first `keep` turns (all of them), or go on with one
        that has `begun` already.

        `user` leaves the message box if it stands there; what becomes no turn goes back there.
        """
        locale = locale_of(request)
        try:
            conversation = await self.open(form, request)
            self._check(conversation, user, locale)
            sampling, backend = self.settings.params(form), self.backend(form, request)
            conversation.system_prompt = form[self.settings.system_prompt] or ""
            conversation.sampling = self.settings.values(form)
            keep = len(conversation.turns) if keep is None else keep
            messages = conversation.messages(keep, user)
            if begun:
                messages.append({"role": "assistant", "content": begun, "prefix": True})
            use = await self._use(backend, messages)
            if use.nearly_full and not begun and form[self.going_on] != conversation.id:
                droppable = keep > conversation.dropped
                return {**self.notice.shown(use, droppable, locale), self.asked: (user, keep),
                        self.returned: ""}
            self._check(conversation, user, locale)  # meanwhile another tab may have asked
            model = self.remote.model(form) if self.remote else None
            live = LiveReply(self.services.classroom.reply(
                caller(request), backend, messages, sampling, model=model), begun)
            self.store.begin(conversation, user, keep, live)
        except UserError as error:
            self.warn(error, request)
            return {self.returned: ""}
        return {
            **self.thread.now(conversation, locale),
            **self.notice.hidden(),
            **self._buttons(conversation),
            self.meter: chat_view.meter_html(use, locale),
            self.going_on: form[self.going_on],
            self.asked: None,
            self.returned: "",
            **({self.box: ""} if form[self.box] == user and not begun else {}),
        }

    def _check(self, conversation: Conversation, user: str, locale: str) -> None:
        if self.store.is_busy(conversation):
            raise UserError(t("error.busy", locale))
        if not isinstance(user, str) or not user.strip():
            raise UserError(t("error.empty_message", locale))

    # Events that show one

    async def on_show(self, form: Form, request: gr.Request) -> Updates:
        """The tab after a reply; of one that failed, say why."""
        ended = self.told(await self.open(form, request), request)
        return {**await self.now(form, request), **ended}

    def told(self, conversation: Conversation, request: gr.Request) -> Updates:
        """Say why the last reply failed, if it did; a message without an answer goes back."""
        failed = self.store.untold(conversation)
        for error in failed.troubles() if failed else ():
            self.warn(error, request)
        return {self.returned: failed.unanswered if failed else ""}

    async def _queue(self) -> EngineStats | None:
        return None if self.remote else (await self.services.chat.status()).stats

    # Other events

    async def on_undo(self, form: Form, request: gr.Request) -> Updates:
        conversation = await self.open(form, request)
        if conversation.busy:
            self.warn(UserError(t("error.busy", locale_of(request))), request)
            return {self.returned: ""}
        undone = await self.store.undo(conversation)
        return {**await self.now(form, request), self.returned: undone}

    async def on_stop(self, conversation_id: str, request: gr.Request) -> None:
        # The event that draws the reply sees its end and shows it.
        await self.store.stop(await self.store.open(
            self.owner(conversation_id, request), conversation_id))

    # What the parts share

    def owner(self, conversation_id: str, request: gr.Request) -> str:
        return owner_of(request, self.store.history.instance, conversation_id)

    async def open(self, form: Form, request: gr.Request) -> Conversation:
        """The conversation that the page shows."""
        chat_id = form[self.conversation_id]
        return await self.store.open(self.owner(chat_id, request), chat_id)

    def backend(self, form: Form | None, request: gr.Request) -> ChatBackend:
        """What answers; before the page has a form, the default."""
        return self.remote.backend(form, request) if self.remote and form else self.services.chat

    async def now(self, form: Form, request: gr.Request) -> Updates:
        """The tab as it should look now, but for the notice, which whoever answers it hides: it may
        have been asked since this event began."""
        return await self.shown(
            await self.open(form, request), form, request, form[self.list.search],
            form[self.list.shown])

    async def shown(
        self, conversation: Conversation, form: Form | None, request: gr.Request, search: str,
        count: float,
    ) -> Updates:
        """The tab with the conversation's turns, beside the owner's others."""
        locale = locale_of(request)
        backend = self.backend(form, request)  # may raise: before anything has begun
        listed, use = await asyncio.gather(
            self.list.updates(conversation.owner, conversation.id, search, count),
            self._use(backend, conversation.messages_now()))
        return {
            **self.thread.now(conversation, locale),
            **self.thread.no_reply(),
            **self._buttons(conversation),
            **listed,
            self.title: gr.update(
                value=conversation.name, interactive=bool(conversation.title)),
            self.delete: gr.update(visible=bool(conversation.title)),
            self.meter: chat_view.meter_html(use, locale),
        }

    def _buttons(self, conversation: Conversation) -> Updates:
        return {self.send: gr.update(visible=not conversation.busy),
                self.stop: gr.update(visible=conversation.busy),
                # Not every server knows how to go on: see docs/chat.md.
                self.resume: gr.update(visible=conversation.cut and self.remote is None)}

    async def _use(self, backend: ChatBackend, messages: list[Message]) -> ContextUse:
        try:
            return await context_use(backend, messages)
        except UserError:  # no model, or no server: the status bar says so, and a reply will
            return ContextUse(None, None)

    def warn(self, error: BaseException, request: gr.Request) -> None:
        """A toast with a sentence that helps."""
        answer.warn(error, locale_of(request))
