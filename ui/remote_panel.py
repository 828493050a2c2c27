"""Restful mode: which api_server to talk to, with which key, and which of its models."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import gradio as gr

from backend.chat import ChatBackend
from backend.classroom import require_host
from backend.services import Services
from ui.answer import warn
from ui.i18n import label, locale_of
from ui.roles import caller

MAX_CLIENTS = 100


class RemotePanel:
    """URL, key and model fields. The key lives in the server's memory only."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._clients: OrderedDict[tuple[str, str], ChatBackend] = OrderedDict()
        with gr.Group(elem_id="remote"):
            with gr.Column(elem_id="remote-server") as self.server:
                self.url = gr.Textbox(
                    services.default_url, label=label("remote.url"), elem_id="remote-url")
                self.api_key = gr.Textbox(
                    label=label("remote.api_key"), info=label("remote.api_key_info"),
                    type="password", elem_id="remote-key",
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off"))
                self.connect = gr.Button(
                    label("remote.connect"), elem_id="remote-connect", size="sm")
            self.models = gr.Dropdown(
                [], label=label("remote.model"), elem_id="remote-model",
                allow_custom_value=True)
        self.inputs = (self.url, self.api_key, self.models)
        self._connect_on([self.connect.click, self.url.submit, self.api_key.submit])

    def wire_load(self, page: gr.Blocks) -> None:
        """Connect to the default server when the page is opened."""
        self._connect_on([page.load])

    def _connect_on(self, triggers: list[Any]) -> None:
        default = json.dumps(self.services.default_url)
        gr.on(
            triggers, self.on_connect, [self.url, self.api_key], [self.models],
            show_progress="hidden", concurrency_limit=None, api_visibility="private",
        ).then(  # the status bar polls the default server only
            None, [self.url, self.models], [],
            js=f"(url, model) => window.LMDESK.showTarget(url === {default} ? '' : url, model)",
        )

    async def on_connect(self, url: str, api_key: str, request: gr.Request) -> Any:
        try:
            names = await self._client(*self._target(url, api_key, request)).models()
        except Exception as error:
            warn(error, locale_of(request))
            return gr.update(choices=[], value=None)
        return gr.update(choices=names, value=names[0] if names else None)

    def backend(self, form: dict[Any, Any], request: gr.Request) -> ChatBackend:
        """The client for the form's URL and key; kept, for it learns what its server can do.

        Raises:
            UserError: the URL is none, not one of this page's, or not a student's.
        """
        target = self._target(form[self.url], form[self.api_key], request)
        if target not in self._clients:
            self._clients[target] = self._client(*target)
        self._clients.move_to_end(target)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return self._clients[target]

    def model(self, form: dict[Any, Any]) -> str | None:
        return form[self.models] or None

    def _target(
        self, url: str | None, api_key: str | None, request: gr.Request
    ) -> tuple[str, str]:
        """What the form says; of a student, only the server that the operator named."""
        target = (url or "").strip(), (api_key or "").strip()
        if target != (self.services.default_url, ""):
            require_host(caller(request))
        return target

    def _client(self, url: str, api_key: str) -> ChatBackend:
        if url == self.services.default_url and not api_key:
            return self.services.chat  # may have a key from the command line
        return self.services.connect(url, api_key)
