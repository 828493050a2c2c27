"""Who answers on one side of a comparison: what is served, a model of the library, a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gradio as gr

from backend.classroom import Role
from backend.compare import Side
from backend.errors import UserError
from backend.services import Services
from ui.i18n import label, t
from ui.model_panel import KV_CHOICES
from ui.roles import caller

SERVED, SERVER = "served", "server"  # further values are folders of models
EXAMPLE = "http://127.0.0.1:23333"
MAX_FIELD = 2000  # characters of an address, a key, a name
KV_NAMES = {"0": "KV 16 bit", "8": "KV int8", "4": "KV int4"}  # the field's terms, in any language

Form = dict[Any, Any]  # component -> value


class TargetPicker:
    """Builds one side's fields inside the current layout.

    Args:
        side: "left" or "right".
    """

    def __init__(self, services: Services, side: str) -> None:
        self.services = services
        with gr.Column(elem_id=f"compare-{side}", elem_classes="lmd-target"):
            self.target = gr.Dropdown(
                [(label("compare.served"), SERVED)],  # hosts get more when they look
                value=SERVED, label=label(f"compare.{side}"), elem_id=f"compare-{side}-target",
                filterable=False)
            self.kv = gr.Dropdown(
                [(label(f"models.kv.{choice}"), str(choice)) for choice in KV_CHOICES],
                value=KV_CHOICES[0], label=label("models.kv"), elem_id=f"compare-{side}-kv",
                filterable=False, visible=False)
            with gr.Column(visible=False, elem_classes="lmd-target-server") as self.server:
                self.url = gr.Textbox(label=label("remote.url"), elem_id=f"compare-{side}-url",
                                      placeholder=EXAMPLE)
                self.api_key = gr.Textbox(
                    label=label("remote.api_key"), type="password", elem_id=f"compare-{side}-key",
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off"))
            self.model = gr.Textbox(label=label("compare.model"), elem_id=f"compare-{side}-model",
                                    placeholder=label("compare.model_first"),
                                    visible=services.remote)
        self.inputs = (self.target, self.kv, self.url, self.api_key, self.model)
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.target.change(self.on_target, [self.target], [self.kv, self.server, self.model],
                           **event)
        self.target.focus(self.on_choices, [self.target], [self.target], **event)

    async def on_target(self, target: str) -> dict[Any, Any]:
        own = target not in (SERVED, SERVER)
        return {self.kv: gr.update(visible=own), self.server: gr.update(visible=target == SERVER),
                self.model: gr.update(visible=target == SERVER or
                                      target == SERVED and self.services.remote)}

    async def on_choices(self, chosen: str | None, request: gr.Request) -> Any:
        """The choices as they are now; a student has one."""
        choices: list[tuple[Any, str]] = [(label("compare.served"), SERVED)]
        if caller(request).role is Role.HOST:
            if self.services.library is not None:
                models = await asyncio.to_thread(self.services.library.models)
                choices += [(model.name, str(model.path)) for model in models]
            choices.append((label("compare.server"), SERVER))
        known = [value for _, value in choices]
        return gr.update(choices=choices, value=chosen if chosen in known else SERVED)

    def is_served(self, form: Form) -> bool:
        """Whether it is what is served already, which takes no memory and asks nobody else."""
        return bool(form[self.target] == SERVED)

    async def side(self, form: Form, locale: str) -> Side:
        """What the fields say.

        Raises:
            UserError: the model is not one of the library's, the server not one of the page's,
                or no model is served.
        """
        target = form[self.target]
        fields = [form[field] or "" for field in (self.url, self.api_key, self.model)]
        if not all(isinstance(field, str) and len(field) <= MAX_FIELD for field in fields):
            raise UserError(t("compare.long_field", locale, most=MAX_FIELD))
        url, api_key, model = (field.strip() for field in fields)
        if target == SERVER:
            if not url:
                raise UserError(t("compare.no_url", locale), field="url")
            backend = await asyncio.to_thread(self.services.connect, url, api_key)
            return Side(model or backend.url, backend, model=model or None)
        if target == SERVED:
            if self.services.engines is not None:
                return self.services.comparisons.served_side()
            name = model or next(iter(await self.services.chat.models()), "")
            return Side(name, self.services.chat, model=model or None)
        return self._loaded(target, str(form[self.kv]))

    def _loaded(self, target: str, kv: str) -> Side:
        """A model of the library."""
        if self.services.library is None or kv not in map(str, KV_CHOICES):
            raise UserError(t("error.not_offered", value=repr(kv)[:60]), field="model")
        folder = self.services.library.checked(target)
        names = (Path(folder).name, KV_NAMES.get(kv))
        return self.services.comparisons.model_side(
            str(folder), " · ".join(filter(None, names)), int(kv) if kv.isdigit() else None)
