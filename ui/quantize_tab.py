"""The quantize tab: a model, a method, a text to calibrate on; what that will take; then a job and
its verdict."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from backend.quick_command import QuickCommands
from backend.services import Services
from ui.answer import sentence, warn
from ui.i18n import label, locale_of, t
from ui.job_panel import JobPanel
from ui.job_view import command_html, problem_html
from ui.quantize_form import DATASETS, GROUP_SIZES, METHODS, OWN, QuantizeForm
from ui.quantize_view import plan_html, planning_html
from ui.roles import Page

# An error's field -> which of the notes tells it; others are told where the plan would be.
PLACES = {"model": "model", "method": "model"} | dict.fromkeys(
    ("w_group_size", "calib_dataset", "calib_samples", "calib_seqlen", "eval_tokens", "text"),
    "data")
PICK_TEXT = "(text) => window.LMDESK.pickText(text)"

Updates = dict[Any, Any]


class QuantizeTab:
    """The form, what it will take, the command line that it amounts to, and the job."""

    def __init__(self, services: Services) -> None:
        assert services.jobs is not None and services.library is not None
        self.store, self.library = services.jobs, services.library
        self.quick = QuickCommands()
        html: dict[str, Any] = {"apply_default_css": False}
        with gr.Column(elem_classes="lmd-tab"):
            gr.Markdown(label("quantize.intro"))
            self.model = gr.Dropdown([], label=label("quantize.model"), elem_id="quantize-model",
                                     filterable=False)
            model_note = gr.HTML(elem_id="quantize-model-note", visible=False, **html)
            self.method = gr.Radio(
                [(label(f"quantize.method.{name}"), name) for name in METHODS],
                value=next(iter(METHODS)), label=label("quantize.method"),
                elem_id="quantize-method", elem_classes="lmd-cards")
            self.about = gr.Markdown(label("quantize.about.w4a16"), elem_id="quantize-about")
            with gr.Row(elem_classes="lmd-fields"):
                self.dataset = gr.Dropdown(
                    [(label(f"quantize.data.{name}"), name) for name in (*DATASETS, OWN)],
                    value=DATASETS[0], label=label("quantize.calib_dataset"),
                    elem_id="quantize-data", filterable=False)
                self.samples = self._number(128, "calib_samples", "quantize-samples")
                self.seqlen = self._number(2048, "calib_seqlen", "quantize-seqlen")
                self.group = gr.Dropdown(list(GROUP_SIZES), label=label("quantize.w_group_size"),
                                         elem_id="quantize-group", filterable=False, min_width=120)
                self.tokens = self._number(32768, "eval_tokens", "quantize-tokens")
            with gr.Column(visible=False, elem_id="quantize-own") as self.own:
                self.text = gr.Textbox(label=label("quantize.text"), lines=6, max_lines=12,
                                       elem_id="quantize-text")
                pick = gr.Button(label("quantize.pick"), elem_id="quantize-pick", size="sm",
                                 elem_classes="lmd-quiet-button")
                unread = gr.HTML(elem_id="quantize-unread", visible=False, **html)
            data_note = gr.HTML(elem_id="quantize-data-note", visible=False, **html)
            self.notes = {"model": model_note, "data": data_note}
            self.plan = gr.HTML(elem_id="quantize-plan", **html)
            self.command = gr.HTML(elem_id="quantize-command", **html)
            with gr.Row(elem_classes="lmd-actions"):
                self.start = gr.Button(label("quantize.start"), elem_id="quantize-start",
                                       variant="primary", size="sm")
            self.panel = JobPanel(services, "quantize")
        self.fields = [self.model, self.method, self.dataset, self.samples, self.seqlen,
                       self.group, self.tokens, self.text]
        told = [*self.notes.values(), self.plan, self.command, self.start]
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        changes = [f.change for f in self.fields]
        gr.on(changes, self.on_change, self.fields,
              [self.about, self.own, self.samples, self.seqlen, self.group, *told], **event)
        gr.on(changes, self.on_plan, self.fields, told, trigger_mode="always_last", **event)
        pick.click(None, [self.text], [self.text, unread], js=PICK_TEXT)
        self.start.click(self.on_start, self.fields, [*told, *self.panel.outputs], **event)
        self._event = event

    @staticmethod
    def _number(value: int, name: str, elem_id: str) -> gr.Number:
        return gr.Number(value, label=label(f"quantize.{name}"), elem_id=elem_id,
                         min_width=120)

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """Show the newest job, and list the models."""
        self.panel.shown_on(tab.select)
        tab.select(self.on_models, [self.model], [self.model], **self._event)

    async def on_models(self, chosen: str | None) -> Any:
        models = await asyncio.to_thread(self.library.models)
        choices = [(m.name, str(m.path)) for m in models if m.kind != "workspace"]
        paths = [path for _, path in choices]
        return gr.update(choices=choices, value=chosen if chosen in paths else paths[0])

    async def on_change(
        self, model: Any, method: Any, dataset: Any, samples: Any, seqlen: Any, group: Any,
        tokens: Any, text: Any, request: gr.Request,
    ) -> Updates:
        """What can be said at once; `on_plan` follows."""
        form = QuantizeForm(model, method, dataset, samples, seqlen, group, tokens, text)
        locale, told = locale_of(request), self._told()
        try:
            await asyncio.to_thread(form.argv, self.library, locale)
        except Exception as error:
            told = self._refused(error, sentence(error, locale))
        method = method if method in METHODS else next(iter(METHODS))
        how = METHODS[method]
        return {
            **told, self.about: label(f"quantize.about.{method}"),
            self.own: gr.update(visible=how.calibrates and form.dataset == OWN),
            self.samples: gr.update(interactive=how.calibrates),
            self.seqlen: gr.update(interactive=how.calibrates),
            self.group: gr.update(interactive=how.command == "auto_awq"),
        }

    async def on_plan(
        self, model: Any, method: Any, dataset: Any, samples: Any, seqlen: Any, group: Any,
        tokens: Any, text: Any, request: gr.Request,
    ) -> AsyncGenerator[Updates, None]:
        """What the job will take, or why it will not do, by its own command."""
        form = QuantizeForm(model, method, dataset, samples, seqlen, group, tokens, text)
        locale = locale_of(request)
        yield self._told() | {self.plan: planning_html(locale)}
        try:
            argv = await asyncio.to_thread(form.argv, self.library, locale, write=True)
            found = await self.quick.ask([*argv, "--plan"])
            before = await asyncio.to_thread(self._seconds_before, argv)
        except Exception as error:
            yield self._refused(error, sentence(error, locale))
            return
        yield self._told() | {
            self.plan: plan_html(found["plan"], before, locale),
            self.command: command_html(shlex.join(["python", "app.py", *argv]), locale)}

    async def on_start(
        self, model: Any, method: Any, dataset: Any, samples: Any, seqlen: Any, group: Any,
        tokens: Any, text: Any, request: gr.Request,
    ) -> Updates:
        form = QuantizeForm(model, method, dataset, samples, seqlen, group, tokens, text)
        locale = locale_of(request)
        try:
            argv = await asyncio.to_thread(form.argv, self.library, locale, write=True)
            folder = str(self.library.checked(form.model))
            title = t("quantize.title", locale, model=Path(folder).name,
                      method=t(f"quantize.method.{form.method}", locale))
            details: dict[str, Any] = {"model": folder, "load_options": form.how.load_options}
            if not form.how.calibrates:
                details["serves"] = folder  # nothing is made: this very model, by those options
            job = await asyncio.to_thread(
                self.store.start, [*argv, "--progress", "json"], title, "quantize",
                details=details)
        except Exception as error:
            return self._refused(error, warn(error, locale))
        return await self.panel.show(job.id, locale)

    def _told(self) -> Updates:
        """Nothing is wrong."""
        return {**{note: gr.update(value="", visible=False) for note in self.notes.values()},
                self.start: gr.update(interactive=True)}

    def _refused(self, error: Exception, said: str) -> Updates:
        """The refusal, beside the field that it is about."""
        words = problem_html(said)
        place = PLACES.get(getattr(error, "field", None) or "")
        told = self._told() | {self.start: gr.update(interactive=False), self.command: ""}
        if place is None:
            return told | {self.plan: words}
        return told | {self.plan: "", self.notes[place]: gr.update(value=words, visible=True)}

    def _seconds_before(self, argv: Sequence[str]) -> float | None:
        """How long the same job took the last time; None if it was never run to its end."""
        same = _without_target(argv)
        for job in self.store.list():
            if job.kind == "quantize" and job.state == "finished" and job.ended:
                if _without_target(job.argv[:len(argv)]) == same:
                    return job.ended - job.started
        return None


def _without_target(argv: Sequence[str]) -> list[str]:
    words = list(argv)
    if "--work-dir" in words:
        at = words.index("--work-dir")
        del words[at:at + 2]
    return words
