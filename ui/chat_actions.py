"""What is done with whole chats and their settings: open, begin, rename, delete, take along."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import gradio as gr

from backend.errors import UserError
from backend.history import MAX_TITLE
from ui import chat_list, chat_tools, forms, snippets
from ui.chat_thread import Form, Updates  # at run time, too: Gradio reads handlers' signatures
from ui.i18n import label, locale_of, t

if TYPE_CHECKING:
    from ui.chat_tab import ChatTab

EXAMPLES = ("example.kv_cache", "example.quant_policy", "example.sum", "example.w4a16")
# No limit: the engine decides how many replies run at once, and tells who waits.
EVENT: dict[str, Any] = {
    "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}


class ChatActions:
    """Wires the chat tab's parts beside the thread."""

    def __init__(self, tab: ChatTab) -> None:
        self.tab = tab
        self.version = gr.Number(visible=False, precision=0)
        # All pressed by the page's script: when another chat is to be shown; when a button is that
        # it draws under the replies; when the user has said yes, for an event that waits for that
        # would let no other begin.
        self.show = gr.Button(label("chat.chats"), elem_id="show-chat")
        self.pick = gr.Button(label("chat.version"), elem_id="pick-version")
        self.delete = gr.Button(label("chat.delete"), elem_id="delete-surely")
        self.opened = [
            tab.conversation_id, *tab.settings.fields, tab.settings.presets.choice, *tab.outputs]
        self._wire_chats()
        self._wire_settings()
        self._wire_tools()

    # Which chat is shown

    def _wire_chats(self) -> None:
        tab = self.tab
        chat_id, chats = tab.conversation_id, tab.list
        current, new = "window.LMDESK.conversationId()", "() => window.LMDESK.newChat()"
        # Each change of the chat ends here: it is shown, and the reply that it may be getting.
        self.show.click(
            self.on_open, [chat_id, *chats.inputs, tab.tools.origin],
            [*self.opened, tab.tools.origin], trigger_mode="always_last", **EVENT,
            js=f"(id, search, shown) => [{current}, search, shown, window.LMDESK.origin()]",
        ).then(**tab.give_back).then(None, js="() => window.LMDESK.opened()")
        chats.chats.input(None, [chats.chats], js="(id) => window.LMDESK.openChat(id)")
        tab.notice.new.click(self.on_leave_full, tab.form, [tab.returned], **EVENT).then(
            **tab.give_back).then(None, js=new)
        self.delete.click(self.on_delete, [chat_id], [], **EVENT).then(None, js=new)
        chats.search.change(self.on_list, tab.form, list(chats.outputs),
                            trigger_mode="always_last", **EVENT)
        chats.more.click(self.on_more, tab.form, [chats.shown, *chats.outputs], **EVENT)
        gr.on([tab.title.submit, tab.title.blur], self.on_rename, [tab.title, *self._place],
              [tab.title, *chats.outputs], **EVENT)
        self.pick.click(
            self.on_version, [chat_id, self.version], [],
            js=f"() => [{current}, window.LMDESK.version]", **EVENT,
        ).then(self.on_shown, tab.form, tab.outputs, **EVENT)

    @property
    def _place(self) -> list[Any]:
        return [self.tab.conversation_id, *self.tab.list.inputs]

    def wire_load(self, page: gr.Blocks) -> None:
        """Show the browser tab's conversation when the page is opened."""
        page.load(None, js="() => window.LMDESK.showChat()")

    async def on_open(
        self, chat_id: str, search: str, shown: float, origin: str, request: gr.Request
    ) -> Updates:
        tab, locale = self.tab, locale_of(request)
        owner = tab.owner(chat_id, request)
        conversation = await tab.store.open(owner, chat_id)
        updates, presets = await asyncio.gather(
            tab.shown(conversation, None, request, search, shown),
            tab.settings.presets.updates(owner, locale))
        updates[tab.thread.chatbot] = gr.update(
            value=updates[tab.thread.chatbot],
            examples=[{"text": t(key, locale)} for key in EXAMPLES])
        return {
            **updates, **tab.told(conversation, request), **tab.notice.hidden(), **presets,
            **tab.settings.of(conversation),
            tab.conversation_id: chat_id, tab.tools.origin: origin, tab.asked: None,
        }

    async def on_list(self, form: Form, request: gr.Request) -> Updates:
        chat_id, chats = form[self.tab.conversation_id], self.tab.list
        return await chats.updates(
            self.tab.owner(chat_id, request), chat_id, form[chats.search], form[chats.shown])

    async def on_more(self, form: Form, request: gr.Request) -> Updates:
        shown = self.tab.list.shown
        form[shown] = (form[shown] or 0) + chat_list.PAGE
        return {shown: form[shown], **await self.on_list(form, request)}

    async def on_rename(
        self, title: str, chat_id: str, search: str, shown: float, request: gr.Request
    ) -> Updates:
        tab, owner = self.tab, self.tab.owner(chat_id, request)
        conversation = await tab.store.open(owner, chat_id)
        title = " ".join((title or "")[:MAX_TITLE].split()) or conversation.title
        if title != conversation.title:
            conversation.title = title
            await asyncio.to_thread(tab.store.history.rename, owner, chat_id, title)
        return {tab.title: conversation.title,
                **await tab.list.updates(owner, chat_id, search, shown)}

    async def on_delete(self, chat_id: str, request: gr.Request) -> None:
        store, owner = self.tab.store, self.tab.owner(chat_id, request)
        await store.delete(await store.open(owner, chat_id))

    async def on_leave_full(self, form: Form) -> Updates:
        """The message that did not fit goes along to the new chat."""
        user, _ = form[self.tab.asked] or ("", 0)
        return {self.tab.returned: user}

    async def on_version(self, chat_id: str, reply: float, request: gr.Request) -> None:
        """Show another version of a turn, with what followed it."""
        store, owner = self.tab.store, self.tab.owner(chat_id, request)
        conversation = await store.open(owner, chat_id)
        if conversation.busy:
            gr.Warning(t("error.busy", locale_of(request)))
        elif isinstance(reply, int | float):
            await asyncio.to_thread(
                store.history.show, owner, chat_id, int(reply), newest=True)

    async def on_shown(self, form: Form, request: gr.Request) -> Updates:
        return await self.tab.now(form, request)

    # Presets

    def _wire_settings(self) -> None:
        tab, presets = self.tab, self.tab.settings.presets
        presets.choice.input(
            self.on_preset, tab.form, [*tab.settings.fields], **EVENT)
        presets.save.click(self.on_save_preset, tab.form, [presets.choice], **EVENT)
        presets.delete.click(self.on_delete_preset, tab.form, [presets.choice], **EVENT)

    async def on_preset(self, form: Form, request: gr.Request) -> Updates:
        settings, owner = self.tab.settings, self._owner(form, request)
        preset = await settings.presets.find(
            owner, locale_of(request), form[settings.presets.choice])
        if preset is None:  # a new name, of one that is to be saved
            return {settings.system_prompt: gr.skip()}
        return settings.shown(preset.system_prompt, preset.sampling)

    async def on_save_preset(self, form: Form, request: gr.Request) -> Updates:
        settings, owner, locale = self.tab.settings, self._owner(form, request), locale_of(request)
        choice = form[settings.presets.choice]
        try:
            settings.params(form)
            choice = await settings.presets.save_as(
                owner, locale, choice, form[settings.system_prompt] or "", settings.values(form))
            gr.Info(t("preset.saved", locale))
        except UserError as error:
            self.tab.warn(error, request)
        return await settings.presets.updates(owner, locale, choice)

    async def on_delete_preset(self, form: Form, request: gr.Request) -> Updates:
        presets, owner, locale = self.tab.settings.presets, self._owner(form, request), locale_of(
            request)
        choice = form[presets.choice]
        try:
            await presets.remove(owner, locale, choice)
            choice = None
        except UserError as error:
            self.tab.warn(error, request)
        return await presets.updates(owner, locale, choice)

    def _owner(self, form: Form, request: gr.Request) -> str:
        return self.tab.owner(form[self.tab.conversation_id], request)

    # Files and code

    def _wire_tools(self) -> None:
        tools, form = self.tab.tools, self.tab.form
        tools.wire_download(gr.on(
            [button.click for button in tools.export], self.on_export, form, [tools.file], **EVENT))
        gr.on([button.click for button in tools.show], self.on_code, form, [tools.shown], **EVENT)

    async def on_export(
        self, form: Form, event: gr.EventData, request: gr.Request
    ) -> Updates:
        tools, conversation = self.tab.tools, await self.tab.open(form, request)
        if (kind := tools.files.get(forms.pressed(event))) is None:
            return {tools.file: gr.skip()}
        ending, write = chat_tools.FILES[kind]
        name = snippets.file_name(conversation.title, ending)
        return tools.file_update(name, write(conversation))

    async def on_code(
        self, form: Form, event: gr.EventData, request: gr.Request
    ) -> Updates:
        tools = self.tab.tools
        try:
            if kind := tools.code.get(forms.pressed(event)):
                return tools.code_update(kind, await self._code(kind, form, request))
        except UserError as error:
            self.tab.warn(error, request)
        return {tools.shown: gr.skip()}

    async def _code(self, kind: str, form: Form, request: gr.Request) -> str:
        """Code that asks what Send would ask now; with an empty box, the last message again."""
        tab, conversation = self.tab, await self.tab.open(form, request)
        conversation.system_prompt = form[tab.settings.system_prompt] or ""
        keep, user = len(conversation.turns), (form[tab.box] or "").strip()
        if not user and keep:
            keep, user = keep - 1, conversation.turns[-1].user
        messages = conversation.messages(keep, user or t(EXAMPLES[0], locale_of(request)))
        settings = snippets.chosen(tab.settings.params(form), forms.SAMPLING_FIELDS)
        url = form[tab.remote.url] if tab.remote else form[tab.tools.origin]
        url = (url or "").strip().rstrip("/")
        if kind == "command_line":
            return snippets.as_command_line(url, conversation.system_prompt, settings)
        model = tab.remote.model(form) if tab.remote else None
        model = model or next(iter(await tab.backend(form, request).models()), "")
        write = snippets.as_curl if kind == "curl" else snippets.as_python
        return write(url, model, messages, settings)
