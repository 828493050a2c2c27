"""How good a model is, by held-out text: the form of an evaluation's job."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from backend.classroom import caller_of, require_host
from backend.errors import UserError
from backend.services import Services
from ui.answer import sentence, warn
from ui.forms import whole_number
from ui.i18n import label, locale_of, t
from ui.job_panel import JobPanel
from ui.job_view import command_html, problem_html

ALONE = "alone"
KV_BITS = ("0", "8", "4")  # `lite evaluate --quant-policy`
MOST_TOKENS = 1 << 20

Updates = dict[Any, Any]


class PerplexityPanel:
    """Builds the form and the job's panel inside the current layout. To start one is the host's."""

    def __init__(self, services: Services) -> None:
        assert services.jobs is not None and services.library is not None
        self.store, self.library = services.jobs, services.library
        gr.Markdown(label("perplexity.intro"))
        with gr.Row():
            self.model = gr.Dropdown([], label=label("settings.model"), filterable=False,
                                     elem_id="perplexity-model", scale=2)
            self.against = gr.Dropdown(
                [(label("perplexity.alone"), ALONE)], value=ALONE, filterable=False,
                label=label("perplexity.against"), elem_id="perplexity-against", scale=2)
        with gr.Row():
            self.kv = gr.Dropdown([(label(f"models.kv.{bits}"), bits) for bits in KV_BITS],
                                  value=KV_BITS[0], label=label("models.kv"), filterable=False,
                                  elem_id="perplexity-kv")
            self.tokens = gr.Number(8192, label=label("perplexity.tokens"),
                                    elem_id="perplexity-tokens")
        self.command = gr.HTML(elem_id="perplexity-command", apply_default_css=False)
        with gr.Row(elem_classes="lmd-actions"):
            self.start = gr.Button(label("perplexity.start"), elem_id="perplexity-start",
                                   variant="primary", size="sm")
        self.panel = JobPanel(services, "evaluate")
        self.fields = [self.model, self.against, self.kv, self.tokens]
        self.fields_at_open = [self.model, self.against]
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([f.change for f in self.fields], self.on_change, self.fields, [self.command], **event)
        self.start.click(self.on_start, self.fields, [self.command, *self.panel.outputs], **event)

    async def on_open(self, chosen: str | None, against: str | None) -> Updates:
        """The models that there are now."""
        models = await asyncio.to_thread(self.library.models)
        choices: list[tuple[Any, str]] = [
            (m.name, str(m.path)) for m in models if m.kind != "workspace"]
        paths = [path for _, path in choices]
        return {
            self.model: gr.update(choices=choices, value=chosen if chosen in paths else paths[0]),
            self.against: gr.update(choices=[(label("perplexity.alone"), ALONE), *choices],
                                    value=against if against in paths else ALONE),
        }

    async def on_change(
        self, model: Any, against: Any, kv: Any, tokens: Any, request: gr.Request
    ) -> str:
        locale = locale_of(request)
        try:
            argv = self._argv(model, against, kv, tokens, locale)
            return command_html(shlex.join(["python", "app.py", *argv]), locale)
        except UserError as error:
            return problem_html(sentence(error, locale))

    async def on_start(
        self, model: Any, against: Any, kv: Any, tokens: Any, request: gr.Request
    ) -> Updates:
        locale = locale_of(request)
        try:
            require_host(caller_of(request.request.scope))
            argv = self._argv(model, against, kv, tokens, locale)
            title = t("perplexity.title", locale, model=Path(model).name)
            job = await asyncio.to_thread(
                self.store.start, [*argv, "--progress", "json"], title, "evaluate")
        except Exception as error:
            warn(error, locale)
            return {self.command: problem_html(sentence(error, locale))}
        return await self.panel.show(job.id, locale)

    def _argv(self, model: Any, against: Any, kv: Any, tokens: Any, locale: str) -> list[str]:
        """The command line of the form.

        Raises:
            UserError: a value is not allowed.
        """
        folder = self.library.checked(model)
        if kv not in KV_BITS:
            raise UserError(t("error.not_offered", value=repr(kv)[:60]), field="quant_policy")
        words = ["lite", "evaluate", str(folder)]
        if against != ALONE:
            words += ["--against", str(self.library.checked(against, "against"))]
        words += ["--quant-policy", kv] if kv != "0" else []
        count = whole_number(
            tokens, t("perplexity.tokens", locale), MOST_TOKENS, locale, field="eval_tokens")
        return [*words, "--eval-tokens", str(count)]
