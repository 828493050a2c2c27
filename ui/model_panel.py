"""Which model is served: the panel below the status bar that loads and unloads."""

from __future__ import annotations

import asyncio
from html import escape
from typing import Any

import gradio as gr

from backend.engine_manager import RepliesOpenError
from backend.errors import EngineNotReadyError
from backend.hub.fetch import gigabytes
from backend.services import Services
from ui.answer import warn
from ui.i18n import label, locale_of, t

KV_CHOICES = ("default", 0, 8, 4)  # quant_policy


class ModelPanel:
    """Hidden until its button is pressed. Asks before it ends others' replies."""

    def __init__(self, services: Services) -> None:
        assert services.engines is not None and services.library is not None
        self.engines, self.library = services.engines, services.library
        with gr.Column(elem_id="model-panel", visible=False) as self.box:
            with gr.Row():
                self.model = gr.Dropdown([], label=label("models.model"), elem_id="models-model",
                                         filterable=False, scale=3)
                self.kv = gr.Dropdown(
                    [(label(f"models.kv.{choice}"), str(choice)) for choice in KV_CHOICES],
                    value=KV_CHOICES[0], label=label("models.kv"), elem_id="models-kv",
                    filterable=False, scale=2)
                self.session_len = gr.Number(None, label=label("models.session_len"),
                                             elem_id="models-session-len", scale=1)
            self.question = gr.HTML(elem_id="models-question", visible=False,
                                    apply_default_css=False)
            with gr.Row(elem_classes="lmd-actions"):
                self.load = gr.Button(label("models.load"), elem_id="models-load", size="sm",
                                      variant="primary")
                self.unload = gr.Button(label("models.unload"), elem_id="models-unload", size="sm")
                self.force = gr.Button(label("models.force"), elem_id="models-force", size="sm",
                                       variant="stop", visible=False)
        self.pending = gr.State("")  # what waits for the answer: "load" or "unload"
        self.shown = gr.State(False)
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        form = [self.model, self.kv, self.session_len]
        self.outputs = [self.box, self.shown, self.question, self.force, self.pending]
        self.load.click(self.on_load, form, self.outputs, **event)
        self.unload.click(self.on_unload, [], self.outputs, **event)
        self.force.click(self.on_force, [self.pending, *form], self.outputs, **event)
        self._event = event

    def opened_by(self, button: gr.Button) -> None:
        """Let `button` show and hide the panel."""
        button.click(self.on_toggle, [self.shown, self.model],
                     [*self.outputs, self.model], **self._event)

    async def on_toggle(self, shown: bool, chosen: str | None) -> dict[Any, Any]:
        if shown:
            return self._closed()
        models = await asyncio.to_thread(self.library.models)
        choices = [(f"{m.name} · {gigabytes(m.bytes)}", str(m.path)) for m in models]
        paths = [path for _, path in choices]
        return {**self._closed(), self.box: gr.update(visible=True), self.shown: True,
                self.model: gr.update(choices=choices,
                                      value=chosen if chosen in paths else paths[0])}

    async def on_load(
        self, model: str, kv: str, session_len: Any, request: gr.Request
    ) -> dict[Any, Any]:
        return await self._act("load", (model, kv, session_len), False, locale_of(request))

    async def on_unload(self, request: gr.Request) -> dict[Any, Any]:
        return await self._act("unload", (), False, locale_of(request))

    async def on_force(
        self, pending: str, model: str, kv: str, session_len: Any, request: gr.Request
    ) -> dict[Any, Any]:
        form = (model, kv, session_len) if pending == "load" else ()
        return await self._act(pending, form, True, locale_of(request))

    async def _act(
        self, what: str, form: tuple[Any, ...], force: bool, locale: str
    ) -> dict[Any, Any]:
        try:
            if what == "load":
                model, kv, session_len = form
                options: dict[str, Any] = {"session_len": session_len}
                if kv != "default":
                    options |= {"quant_policy": int(kv) if str(kv).isdigit() else kv,
                                "kv_cache_dtype": None}
                await self.engines.load(str(self.library.checked(model)), options, force=force)
            else:
                self.engines.require()
                await self.engines.unload(force=force)
        except RepliesOpenError as error:
            question = escape(t("models.open", locale, count=error.count))
            return {self.question: gr.update(value=f"<p>{question}</p>", visible=True),
                    self.force: gr.update(visible=True), self.pending: what}
        except EngineNotReadyError:
            return self._closed()
        except Exception as error:
            warn(error, locale)
            return {self.force: gr.update(visible=False), self.pending: ""}
        return self._closed()

    def _closed(self) -> dict[Any, Any]:
        return {self.box: gr.update(visible=False), self.shown: False,
                self.question: gr.update(visible=False), self.force: gr.update(visible=False),
                self.pending: ""}
