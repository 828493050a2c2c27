"""The quantize tab: a model, a method, a text to calibrate on; then a job and its verdict."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from backend.data_dir import data_dir, results_dir
from backend.errors import UserError
from backend.services import Services
from ui.answer import sentence, warn
from ui.i18n import label, locale_of, t
from ui.job_panel import JobPanel
from ui.job_view import command_html, problem_html


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Attributes:
        command: of `lite`; "evaluate" makes nothing, and measures.
        suffix: of the result's folder.
        load_options: EngineConfig's, for loading the result.
    """

    command: str
    suffix: str = ""
    load_options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "w4a16": Method("auto_awq", "awq"),
    "kv8": Method("evaluate", load_options={"quant_policy": 8}),
    "w8a8": Method("smooth_quant", "w8a8"),
    "both": Method("auto_awq", "awq", {"quant_policy": 8}),
}
DATASETS = ("bundled", "c4", "ptb", "wikitext2", "pileval")
OWN = "own"
MAX_TEXT = 4_000_000  # characters of an own text


class QuantizeTab:
    """The form, the command line that it amounts to, and the job."""

    def __init__(self, services: Services) -> None:
        assert services.jobs is not None and services.library is not None
        self.store, self.library = services.jobs, services.library
        with gr.Column(elem_classes="lmd-tab"):
            gr.Markdown(label("quantize.intro"))
            self.model = gr.Dropdown([], label=label("quantize.model"), elem_id="quantize-model",
                                     filterable=False)
            self.method = gr.Radio(
                [(label(f"quantize.method.{name}"), name) for name in METHODS],
                value=next(iter(METHODS)), label=label("quantize.method"),
                elem_id="quantize-method", elem_classes="lmd-cards")
            self.about = gr.Markdown(label("quantize.about.w4a16"), elem_id="quantize-about")
            with gr.Row():
                self.dataset = gr.Dropdown(
                    [(label(f"quantize.data.{name}"), name) for name in (*DATASETS, OWN)],
                    value=DATASETS[0], label=label("quantize.data"), elem_id="quantize-data",
                    filterable=False)
                self.samples = gr.Number(128, label=label("quantize.samples"), precision=0,
                                         elem_id="quantize-samples")
                self.seqlen = gr.Number(2048, label=label("quantize.seqlen"), precision=0,
                                        elem_id="quantize-seqlen")
                self.tokens = gr.Number(32768, label=label("quantize.tokens"), precision=0,
                                        elem_id="quantize-tokens")
            self.text = gr.Textbox(label=label("quantize.text"), lines=6, max_lines=12,
                                   visible=False, elem_id="quantize-text")
            self.command = gr.HTML(elem_id="quantize-command", apply_default_css=False)
            with gr.Row(elem_classes="lmd-actions"):
                self.start = gr.Button(label("quantize.start"), elem_id="quantize-start",
                                       variant="primary", size="sm")
            self.panel = JobPanel(services, "quantize")
        self.fields = [self.model, self.method, self.dataset, self.samples, self.seqlen,
                       self.tokens, self.text]
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([f.change for f in self.fields], self.on_change, self.fields,
              [self.command, self.about, self.text], **event)
        self.model.focus(self.on_models, [self.model], [self.model], **event)
        self.start.click(self.on_start, self.fields, [self.command, *self.panel.outputs], **event)

    def wire_load(self, page: gr.Blocks) -> None:
        """List the models, and show the newest job."""
        page.load(self.on_models, [self.model], [self.model], show_progress="hidden",
                  api_visibility="private")
        self.panel.wire_load(page)

    async def on_models(self, chosen: str | None) -> Any:
        models = await asyncio.to_thread(self.library.models)
        choices = [(m.name, str(m.path)) for m in models if m.kind != "workspace"]
        paths = [path for _, path in choices]
        return gr.update(choices=choices, value=chosen if chosen in paths else paths[0])

    async def on_change(
        self, model: str, method: str, dataset: str, samples: Any, seqlen: Any, tokens: Any,
        text: str, request: gr.Request,
    ) -> dict[Any, Any]:
        values = (model, method, dataset, samples, seqlen, tokens, text)
        method = values[1] if values[1] in METHODS else next(iter(METHODS))
        try:
            shown = command_html(shlex.join(["python", "app.py", *self._argv(*values)]),
                                 locale_of(request))
        except UserError as error:
            shown = problem_html(str(error))
        return {self.command: shown, self.about: label(f"quantize.about.{method}"),
                self.text: gr.update(visible=values[2] == OWN)}

    async def on_start(
        self, model: str, method: str, dataset: str, samples: Any, seqlen: Any, tokens: Any,
        text: str, request: gr.Request,
    ) -> dict[Any, Any]:
        locale = locale_of(request)
        arguments = (model, method, dataset, samples, seqlen, tokens, text)
        try:
            argv = await asyncio.to_thread(self._argv, *arguments, write=True)
            title = t("quantize.title", locale, model=Path(model).name, method=method.upper())
            job = await asyncio.to_thread(
                self.store.start, [*argv, "--progress", "json"], title, "quantize",
                details={"model": model, "load_options": METHODS[method].load_options})
        except Exception as error:
            warn(error, locale)
            return {self.command: problem_html(sentence(error, locale))}
        return await self.panel.show(job.id, locale)

    def _argv(
        self, model: str, method: str, dataset: str, samples: Any, seqlen: Any, tokens: Any,
        text: str, write: bool = False,
    ) -> list[str]:
        """The command line of the form.

        Args:
            write: store an own text where the command finds it.

        Raises:
            UserError: a value is not allowed.
        """
        folder = self.library.checked(model)
        if method not in METHODS:
            raise UserError(t("error.not_offered", value=repr(method)[:60]), field="method")
        how = METHODS[method]
        judged = ["--eval-tokens", str(_count(tokens, "eval_tokens", 1 << 24))]
        if how.command == "evaluate":
            return ["lite", "evaluate", str(folder), "--against", str(folder),
                    "--quant-policy", "8", *judged]
        return [
            "lite", how.command, str(folder), "--work-dir", str(self._target(folder, how.suffix)),
            "--calib-dataset", self._data(dataset, text, write),
            "--calib-samples", str(_count(samples, "calib_samples", 1 << 16)),
            "--calib-seqlen", str(_count(seqlen, "calib_seqlen", 1 << 20)), *judged]

    def _target(self, folder: Path, suffix: str) -> Path:
        """A folder among the results that is not there yet."""
        first = path = results_dir() / f"{folder.name}-{suffix}"
        number = 1
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}-{number}")
        return path

    def _data(self, dataset: str, text: str, write: bool) -> str:
        if dataset in DATASETS:
            return dataset
        if dataset != OWN:
            raise UserError(t("error.not_offered", value=repr(dataset)[:60]), field="calib_dataset")
        text = text if isinstance(text, str) else ""
        if write and not text.strip():
            raise UserError(t("quantize.no_text"))
        if len(text) > MAX_TEXT:
            raise UserError(t("quantize.long_text", most=MAX_TEXT))
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = data_dir() / "texts" / f"{name}.txt"
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return str(path)


def _count(value: Any, name: str, most: int) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    if not whole or not 1 <= value <= most:
        raise UserError(t("quantize.number", name=name, most=most), field=name)
    return int(value)
