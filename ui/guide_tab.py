"""The guide tab: the tutorials' walk from 16 bits to 4, each step measured by a job.

What is shown is files: any tab of any browser sees the same, and the same job running.
"""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from backend.errors import UserError
from backend.guide import STEPS, Walk, measure_command
from backend.jobs import Job
from backend.services import Services
from ui import guide_view
from ui.answer import sentence, warn
from ui.i18n import label, locale_of, t
from ui.roles import Page

Updates = dict[Any, Any]
KIND = "guide"
FIRST = next(iter(STEPS))
POLL_S = 2.0


class GuideTab:
    """Builds the tab's components inside the current layout and wires them."""

    def __init__(self, services: Services) -> None:
        assert services.library is not None
        self.library, self.jobs = services.library, services.jobs
        html: dict[str, Any] = {"apply_default_css": False}
        with gr.Column(elem_id="guide-page", elem_classes="lmd-form"):
            gr.Markdown(label("guide.intro"), elem_id="guide-intro")
            self.model = gr.Dropdown([], label=label("settings.model"), elem_id="guide-model")
            self.step = gr.Radio(list(STEPS), value=FIRST, label=label("guide.step"),
                                 elem_id="guide-step")
            self.about = gr.HTML(elem_id="guide-about", **html)
            with gr.Row(elem_classes="lmd-actions"):
                self.measure = gr.Button(label("guide.measure"), elem_id="guide-measure",
                                         variant="primary", size="sm")
                self.cancel = gr.Button(label("guide.cancel"), elem_id="guide-cancel",
                                        size="sm", visible=False)
            self.progress = gr.HTML(elem_id="guide-progress", **html)
            self.figures = gr.HTML(elem_id="guide-figures", **html)
            self.replies = gr.HTML(elem_id="guide-replies", **html)
            with gr.Row(elem_classes="lmd-actions"):
                self.good = gr.Button(label("guide.good"), elem_id="guide-good", size="sm")
                self.bad = gr.Button(label("guide.bad"), elem_id="guide-bad", size="sm")
            self.result = gr.HTML(elem_id="guide-result", **html)
            self.timer = gr.Timer(POLL_S, active=False)
        self._wire()

    def _wire(self) -> None:
        event: dict[str, Any] = {
            "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        shown = [self.about, self.measure, self.cancel, self.progress, self.figures,
                 self.replies, self.good, self.bad, self.result, self.timer]
        inputs = [self.model, self.step]
        gr.on([self.model.change, self.step.change, self.timer.tick], self.on_show, inputs, shown,
              **event)
        self.measure.click(self.on_measure, inputs, shown, **event)
        self.cancel.click(self.on_cancel, inputs, shown, **event)
        self.good.click(self.on_good, inputs, [self.step, *shown], **event)
        self.bad.click(self.on_bad, inputs, [self.step, *shown], **event)

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """List the models, and the steps in the reader's language."""
        tab.select(self.on_open, [self.model], [self.model, self.step], show_progress="hidden",
                   concurrency_limit=None, api_visibility="private")

    async def on_open(self, chosen: str | None, request: gr.Request) -> Updates:
        models = [m for m in self.library.models() if m.kind != "workspace"]
        paths = [str(model.path) for model in models]
        locale = locale_of(request)
        return {
            self.model: gr.update(choices=list(zip([m.name for m in models], paths)),
                                  value=chosen if chosen in paths else paths[0]),
            self.step: gr.update(choices=[(t(f"guide.steps.{step}", locale), step)
                                          for step in STEPS]),
        }

    async def on_show(self, model: str, step: str, request: gr.Request) -> Updates:
        try:
            return await asyncio.to_thread(self._shown, model, step, locale_of(request))
        except UserError as error:
            return {self.progress: guide_view.problem(sentence(error, locale_of(request))),
                    self.timer: gr.update(active=False)}

    async def on_measure(self, model: str, step: str, request: gr.Request) -> Updates:
        locale = locale_of(request)
        try:
            if self.jobs is None:
                raise UserError(t("guide.no_home", locale))
            walk = self._walk(model, step)
            running = self._job(walk, step)
            if running is None or not running.running:
                argv = [*measure_command(walk.model, step), "--progress", "json"]
                title = f"{walk.folder.name}: {step}"
                details = {"model": walk.model, "step": step}
                await asyncio.to_thread(self.jobs.start, argv, title, KIND, details=details)
        except UserError as error:
            warn(error, locale_of(request))
            return {}
        return await self.on_show(model, step, request)

    async def on_cancel(self, model: str, step: str, request: gr.Request) -> Updates:
        try:
            job = self._job(self._walk(model, step), step)
            if job is not None and self.jobs is not None:
                await asyncio.to_thread(self.jobs.cancel, job.id)
        except UserError as error:
            warn(error, locale_of(request))
        return await self.on_show(model, step, request)

    async def on_good(self, model: str, step: str, request: gr.Request) -> Updates:
        return await self._judge(model, step, True, request)

    async def on_bad(self, model: str, step: str, request: gr.Request) -> Updates:
        return await self._judge(model, step, False, request)

    async def _judge(self, model: str, step: str, good: bool, request: gr.Request) -> Updates:
        """Good enough leads on; not good enough, back to the step before."""
        try:
            walk = self._walk(model, step)
            if step not in walk.figures():
                raise UserError(t("guide.measure_first", locale_of(request)))
            walk.judge(step, good)
        except UserError as error:
            warn(error, locale_of(request))
            return {}
        steps = list(STEPS)
        at = min(max(steps.index(step) + (1 if good else -1), 0), len(steps) - 1)
        return {self.step: steps[at], **await self.on_show(model, steps[at], request)}

    def _walk(self, model: str, step: str) -> Walk:
        if step not in STEPS:
            raise UserError(t("error.not_offered", value=repr(step)[:60]), field="step")
        return Walk(self.library.checked(model))

    def _job(self, walk: Walk, step: str) -> Job | None:
        """The newest job of a step."""
        jobs = self.jobs.list() if self.jobs is not None else ()
        wanted = {"model": walk.model, "step": step}
        return next((j for j in jobs if j.kind == KIND and j.details == wanted), None)

    def _shown(self, model: str, step: str, locale: str) -> Updates:
        walk = self._walk(model, step)
        found, job = walk.figures(), self._job(walk, step)
        running = job is not None and job.running
        progress = self.jobs.progress(job.id) if job is not None and self.jobs is not None else None
        best = walk.recommended()
        command = job.command_line if job is not None else ""
        return {
            self.about: guide_view.about(step, locale),
            self.measure: gr.update(interactive=not running),
            self.cancel: gr.update(visible=running),
            self.progress: guide_view.progress(job, progress, command, locale),
            self.figures: guide_view.figures(found, step, walk.judged(), locale),
            self.replies: guide_view.replies(found, locale),
            self.good: gr.update(interactive=step in found),
            self.bad: gr.update(interactive=step in found),
            self.result: guide_view.result(best, found, locale),
            self.timer: gr.update(active=running),
        }
