"""How fast a model is: the form of a benchmark's job."""

from __future__ import annotations

import asyncio
import re
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
from ui.model_panel import KV_CHOICES

SMALL = ("1 2 4", 32, 32, 1)  # concurrency, prompt, completion, rounds: seconds on a laptop
ON_A_GPU = ("1 4 16 64", 128, 256, 3)
MOST_CASES, MOST_STREAMS, MOST_TOKENS, MOST_ROUNDS = 12, 1024, 1 << 15, 20
BLOCK = 64  # tokens of a block of the KV cache

Updates = dict[Any, Any]


class BenchmarkPanel:
    """Builds the form and the job's panel inside the current layout. To start one is the host's."""

    def __init__(self, services: Services) -> None:
        assert services.jobs is not None and services.library is not None
        self.services, self.store, self.library = services, services.jobs, services.library
        gr.Markdown(label("benchmark.intro"))
        with gr.Row():
            self.model = gr.Dropdown([], label=label("settings.model"), filterable=False,
                                     elem_id="benchmark-model", scale=2)
            self.kv = gr.Dropdown(
                [(label(f"models.kv.{choice}"), str(choice)) for choice in KV_CHOICES],
                value=KV_CHOICES[0], label=label("models.kv"), elem_id="benchmark-kv",
                filterable=False, scale=2)
        with gr.Row():
            self.concurrency = gr.Textbox(SMALL[0], label=label("benchmark.concurrency"),
                                          elem_id="benchmark-concurrency", min_width=130)
            numbers = [gr.Number(value, label=label(f"benchmark.{name}"),
                                 elem_id=f"benchmark-{name}", min_width=120)
                       for name, value in zip(("prompt", "completion", "rounds"), SMALL[1:])]
            self.prompt, self.completion, self.rounds = numbers
        self.command = gr.HTML(elem_id="benchmark-command", apply_default_css=False)
        with gr.Row(elem_classes="lmd-actions"):
            self.start = gr.Button(label("benchmark.start"), elem_id="benchmark-start",
                                   variant="primary", size="sm")
        self.panel = JobPanel(services, "benchmark")
        self.sizes = [self.concurrency, *numbers]
        self.fields = [self.model, self.kv, *self.sizes]
        self.fields_at_open = [self.model, *self.sizes]
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([f.change for f in self.fields], self.on_change, self.fields, [self.command], **event)
        self.start.click(self.on_start, self.fields, [self.command, *self.panel.outputs], **event)

    async def on_open(self, chosen: str | None, *sizes: Any) -> Updates:
        """The models, and sizes for this machine while nobody has typed others."""
        models = await asyncio.to_thread(self.library.models)
        paths = [str(model.path) for model in models]
        updates: Updates = {self.model: gr.update(
            choices=list(zip([model.name for model in models], paths)),
            value=chosen if chosen in paths else paths[0])}
        info = (await self.services.chat.status()).info
        if info is not None and info.device != "cpu" and sizes == SMALL:
            updates |= dict(zip(self.sizes, ON_A_GPU))
        return updates

    async def on_change(
        self, model: Any, kv: Any, concurrency: Any, prompt: Any, completion: Any, rounds: Any,
        request: gr.Request,
    ) -> str:
        locale = locale_of(request)
        try:
            argv = self._argv(model, kv, concurrency, prompt, completion, rounds, locale)
            return command_html(shlex.join(["python", "app.py", *argv]), locale)
        except UserError as error:
            return problem_html(sentence(error, locale))

    async def on_start(
        self, model: Any, kv: Any, concurrency: Any, prompt: Any, completion: Any, rounds: Any,
        request: gr.Request,
    ) -> Updates:
        locale = locale_of(request)
        try:
            require_host(caller_of(request.request.scope))
            argv = self._argv(model, kv, concurrency, prompt, completion, rounds, locale)
            title = t("benchmark.title", locale, model=Path(model).name,
                      streams=", ".join(map(str, _streams(concurrency, locale))))
            job = await asyncio.to_thread(
                self.store.start, [*argv, "--progress", "json"], title, "benchmark",
                details={"model": str(self.library.checked(model))})
        except Exception as error:
            warn(error, locale)
            return {self.command: problem_html(sentence(error, locale))}
        return await self.panel.show(job.id, locale)

    def _argv(
        self, model: Any, kv: Any, concurrency: Any, prompt: Any, completion: Any, rounds: Any,
        locale: str,
    ) -> list[str]:
        """The command line of the form.

        Raises:
            UserError: a value is not allowed.
        """
        folder = self.library.checked(model)
        if kv not in map(str, KV_CHOICES):
            raise UserError(t("error.not_offered", value=repr(kv)[:60]), field="quant_policy")
        streams = _streams(concurrency, locale)
        counts = {
            name: whole_number(value, t(f"benchmark.{name}", locale), most, locale, field=name)
            for name, value, most in (
                ("prompt", prompt, MOST_TOKENS), ("completion", completion, MOST_TOKENS),
                ("rounds", rounds, MOST_ROUNDS))
        }
        # All streams at once fit, and no more is taken: others may use the device as well.
        blocks = -(-(counts["prompt"] + counts["completion"]) // BLOCK)
        return [
            "benchmark", "profile_generation", str(folder),
            "--concurrency", *map(str, streams), "--prompt-tokens", str(counts["prompt"]),
            "--completion-tokens", str(counts["completion"]), "--rounds", str(counts["rounds"]),
            *(["--quant-policy", str(kv)] if str(kv).isdigit() else []),
            "--kv-cache-tokens", str(max(streams) * blocks * BLOCK),
        ]


def _streams(text: Any, locale: str) -> list[int]:
    """A list of concurrencies as typed, in order, each once.

    Raises:
        UserError: it is none, or too long.
    """
    words = re.split(r"[\s,，、;；]+", text.strip()) if isinstance(text, str) else []
    if not 0 < len(words) <= MOST_CASES or not all(re.fullmatch("[0-9]{1,6}", w) for w in words):
        raise UserError(t("benchmark.list", locale, cases=MOST_CASES, most=MOST_STREAMS),
                        field="concurrency")
    numbers = sorted({int(word) for word in words})
    if not 1 <= numbers[0] or numbers[-1] > MOST_STREAMS:
        raise UserError(t("benchmark.list", locale, cases=MOST_CASES, most=MOST_STREAMS),
                        field="concurrency")
    return numbers
