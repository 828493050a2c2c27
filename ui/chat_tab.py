"""The chat tab: maps its fields to messages and sampling settings, and shows the reply.

Finished turns stand in the Chatbot; the reply in the making stands in a Markdown below it, ten
times a second. A Chatbot that is redrawn for every token falls seconds behind after a few turns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from backend.chat import ChatBackend, Message
from backend.errors import UserError
from backend.services import Services
from ui import chat_view, forms
from ui.conversations import Conversation, ConversationStore, Pending
from ui.i18n import label, locale_of, t
from ui.live_reply import LiveReply
from ui.remote_panel import RemotePanel

logger = logging.getLogger(__name__)

EXAMPLES = ("example.kv_cache", "example.quant_policy", "example.sum", "example.w4a16")
FRAME_S = 0.1  # between two drawings of a growing reply
HEARTBEAT_S = 0.5  # between two signs of life without text; they also find a closed tab out

Form = dict[Any, Any]  # component -> value, as Gradio hands over a set of inputs
Updates = dict[Any, Any]  # component -> new value


class ChatTab:
    """Builds the tab's components inside the current layout and wires them."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.store = ConversationStore()
        self.defaults = forms.defaults(services.sampling_defaults)
        with gr.Row(elem_id="chat-page"):
            with gr.Column(scale=5, elem_id="chat-main"):
                self._build_thread()
                self._build_composer()
            with gr.Column(scale=2, min_width=280, elem_id="chat-settings"):
                self.remote = RemotePanel(services) if services.remote else None
                self._build_settings()
        self.form = {
            self.conversation_id, self.box, self.system_prompt, *self.sampling.values(),
            *(self.remote.inputs if self.remote else ()),
        }
        self._wire()

    # Layout

    def _build_thread(self) -> None:
        with gr.Column(elem_id="thread"):
            self.chatbot = gr.Chatbot(
                elem_id="chat",
                show_label=False,
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
            self.live = gr.Markdown(
                elem_id="live",
                line_breaks=True,
                latex_delimiters=chat_view.LATEX_DELIMITERS,
            )
            self.turn_stats = gr.HTML(elem_id="turn-stats", apply_default_css=False)

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
                self.clear = gr.Button(label("chat.clear"), elem_id="clear", size="sm")
                self.stop = gr.Button(
                    label("chat.stop"), elem_id="stop", variant="stop", size="sm", visible=False)
                self.send = gr.Button(
                    label("chat.send"), elem_id="send", variant="primary", size="sm")
        self.conversation_id = gr.Textbox(visible=False)
        self.returned = gr.Textbox(visible=False)  # an unsent message on its way back to the box

    def _build_settings(self) -> None:
        self.system_prompt = gr.Textbox(
            elem_id="system-prompt",
            label=label("chat.system_prompt"),
            placeholder=label("chat.system_prompt_placeholder"),
            lines=3,
            max_lines=10,
        )
        with gr.Accordion(label("chat.sampling"), open=True):
            main = forms.sampling_inputs(forms.MAIN_FIELDS, self.defaults)
        with gr.Accordion(label("chat.more_sampling"), open=False):
            more = forms.sampling_inputs(forms.MORE_FIELDS, self.defaults)
        self.sampling = dict(zip(forms.SAMPLING_FIELDS, [*main, *more], strict=True))

    def _wire(self) -> None:
        outputs = self._outputs()
        # No limit: the engine decides how many replies run at once, and tells who waits.
        event: dict[str, Any] = {
            "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        give_back: dict[str, Any] = {
            "fn": None, "inputs": [self.box, self.returned], "outputs": [self.box],
            "js": "(box, returned) => box || returned"}
        gr.on([self.box.submit, self.send.click], self.on_send, self.form, outputs,
              **event).then(**give_back)
        self.chatbot.example_select(self.on_example, self.form, outputs, **event).then(**give_back)
        self.chatbot.retry(self.on_retry, self.form, outputs, **event)
        self.chatbot.edit(self.on_edit, self.form, outputs, **event).then(**give_back)
        self.chatbot.undo(self.on_undo, self.form, outputs, **event).then(**give_back)
        self.clear.click(self.on_clear, self.form, outputs, **event)
        self.stop.click(self.on_stop, [self.conversation_id], [], queue=False, **event)

    def _outputs(self) -> list[Any]:
        return [self.chatbot, self.live, self.turn_stats, self.meter, self.box, self.returned,
                self.send, self.stop]

    def wire_load(self, page: gr.Blocks) -> None:
        """Show the tab's conversation when the page is opened or reloaded."""
        page.load(
            self.on_load, [self.conversation_id],
            [self.conversation_id, self.system_prompt, *self.sampling.values(), *self._outputs()],
            js="() => window.LMDESK.conversationId()",
            show_progress="hidden", concurrency_limit=None, api_visibility="private",
        )
        if self.remote:
            self.remote.wire_load(page)

    # Events

    async def on_load(self, conversation_id: str, request: gr.Request) -> Updates:
        conversation = self.store.open(conversation_id)
        await conversation.stop()  # its page went away in the middle of a reply
        locale = locale_of(request)
        sampling = self.defaults | conversation.sampling
        return {
            **await self._finished(conversation, None, locale),
            self.chatbot: gr.update(
                value=chat_view.chat_messages(conversation, locale),
                examples=[{"text": t(key, locale)} for key in EXAMPLES]),
            self.conversation_id: conversation_id,
            self.system_prompt: conversation.system_prompt,
            **{field: sampling[name] for name, field in self.sampling.items()},
        }

    async def on_send(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        reply = self._reply(form, locale_of(request), form[self.box], from_box=True)
        async with aclosing(reply) as frames:
            async for updates in frames:
                yield updates

    async def on_example(
        self, form: Form, event: gr.SelectData, request: gr.Request
    ) -> AsyncGenerator[Updates, None]:
        async with aclosing(
            self._reply(form, locale_of(request), event.value["text"])
        ) as frames:
            async for updates in frames:
                yield updates

    async def on_retry(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        locale = locale_of(request)
        conversation = self.store.open(form[self.conversation_id])
        if not conversation.turns:  # the page shows what the server has forgotten
            yield await self._finished(conversation, form, locale)
            return
        last = len(conversation.turns) - 1
        user = conversation.turns[last].user
        async with aclosing(self._reply(form, locale, user, keep=last)) as frames:
            async for updates in frames:
                yield updates

    async def on_edit(
        self, form: Form, event: gr.EditData, request: gr.Request
    ) -> AsyncGenerator[Updates, None]:
        locale = locale_of(request)
        conversation = self.store.open(form[self.conversation_id])
        turn = chat_view.turn_of_message(conversation, locale, event.index)
        if turn is None:
            yield await self._finished(conversation, form, locale)
            return
        async with aclosing(self._reply(form, locale, event.value, keep=turn)) as frames:
            async for updates in frames:
                yield updates

    async def on_undo(self, form: Form, request: gr.Request) -> Updates:
        locale = locale_of(request)
        conversation = self.store.open(form[self.conversation_id])
        if conversation.busy:
            self._warn(UserError(t("error.busy", locale)), locale)
            return {self.returned: ""}
        undone = ""
        if conversation.turns:
            *conversation.turns, turn = conversation.turns
            undone = turn.user
        return {self.returned: undone, **await self._finished(conversation, form, locale)}

    async def on_clear(self, form: Form, request: gr.Request) -> Updates:
        conversation = self.store.open(form[self.conversation_id])
        await conversation.stop()
        conversation.turns = []
        return await self._finished(conversation, form, locale_of(request))

    async def on_stop(self, conversation_id: str) -> None:
        pending = self.store.open(conversation_id).pending
        if pending is not None:
            pending.live.stop()  # the event that draws the reply sees its end and shows it

    # A reply

    async def _reply(
        self, form: Form, locale: str, user: str, *, keep: int | None = None, from_box: bool = False
    ) -> AsyncGenerator[Updates, None]:
        """Draw the reply to `user` after the first `keep` turns (all of them) as it grows.

        `user` leaves the message box if it came `from_box`; what becomes no turn goes back there.
        """
        try:
            conversation = self.store.open(form[self.conversation_id])
            pending = self._begin(conversation, form, locale, user, keep)
        except UserError as error:
            self._warn(error, locale)
            yield {self.returned: ""}
            return
        live, started, drawn, drawn_at = pending.live, time.monotonic(), "", 0.0
        try:
            yield {
                self.chatbot: chat_view.chat_messages(
                    conversation, locale, keep=pending.keep, user=user),
                self.live: chat_view.waiting_html(0, None, locale),
                self.send: gr.update(visible=False),
                self.stop: gr.update(visible=True),
                self.returned: "",
                **({self.box: ""} if from_box else {}),
            }
            asked = conversation.messages(pending.keep, user)
            yield {self.meter: await self._meter(conversation, asked, form, locale)}
            while not live.done:
                await live.wait(FRAME_S)
                now = time.monotonic()
                if live.text != drawn or now - drawn_at >= HEARTBEAT_S:
                    drawn, drawn_at = live.text, now
                    yield {self.live: await self._live_text(drawn, now - started, locale)}
        finally:  # the page may be gone
            conversation.settle(pending)
            self.store.trim()
        error = live.error()
        if error is not None:
            self._warn(error, locale)
        lost = not live.text and not live.finish_reason  # no turn came of it
        yield {
            self.returned: user if lost else "",
            **await self._finished(conversation, form, locale),
        }

    def _begin(
        self, conversation: Conversation, form: Form, locale: str, user: str, keep: int | None
    ) -> Pending:
        """Check what was typed and start the reply."""
        if conversation.busy:
            raise UserError(t("error.busy", locale))
        if not isinstance(user, str) or not user.strip():
            raise UserError(t("error.empty_message", locale))
        values = {name: form[field] for name, field in self.sampling.items()}
        sampling = forms.sampling_params(values)
        backend = self._backend(conversation, form)
        model = self.remote.model(form) if self.remote else None
        conversation.system_prompt = form[self.system_prompt] or ""
        conversation.sampling = values
        keep = len(conversation.turns) if keep is None else keep
        live = LiveReply(backend, conversation.messages(keep, user), sampling, model)
        conversation.pending = Pending(user, keep, live)
        return conversation.pending

    def _backend(self, conversation: Conversation, form: Form | None) -> ChatBackend:
        """What answers; before the page has a form, the default."""
        if self.remote and form is not None:
            return self.remote.backend(conversation, form)
        return self.services.chat

    async def _live_text(self, text: str, seconds: float, locale: str) -> str:
        if text:
            return chat_view.live_markdown(text)
        stats = None if self.remote else (await self.services.chat.status()).stats
        return chat_view.waiting_html(seconds, stats, locale)

    async def _finished(
        self, conversation: Conversation, form: Form | None, locale: str
    ) -> Updates:
        """The tab at rest, with all finished turns."""
        return {
            self.chatbot: chat_view.chat_messages(conversation, locale),
            self.live: "",
            self.turn_stats: chat_view.stats_html(conversation, locale),
            self.meter: await self._meter(conversation, conversation.messages(), form, locale),
            self.send: gr.update(visible=True),
            self.stop: gr.update(visible=False),
        }

    async def _meter(
        self, conversation: Conversation, messages: list[Message], form: Form | None, locale: str
    ) -> str:
        try:
            backend = self._backend(conversation, form)
            tokens = await backend.count_tokens(messages) if messages else 0
            if tokens is None or self.remote:
                return chat_view.meter_html(tokens, None, locale)
            info = (await backend.status()).info
        except UserError:  # no model, or no server: the status bar says so
            return ""
        return chat_view.meter_html(tokens, info.session_len if info else None, locale)

    def _warn(self, error: BaseException, locale: str) -> None:
        """A toast with a sentence that helps; what only a programmer understands is logged."""
        if isinstance(error, UserError):
            gr.Warning(escape(str(error)))
        else:
            logger.error("A reply failed", exc_info=error)
            gr.Warning(t("error.internal", locale))
