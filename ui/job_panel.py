"""One job on a tab: its progress, and the buttons that it takes now.

    self.jobs = JobPanel(services, "quantize")      # inside the tab's layout
    ...
    return await self.jobs.show(job.id, locale)     # in an event with outputs=self.jobs.outputs
    self.jobs.wire_load(page)                       # finds the newest of its kind again

It polls only while the job that it shows is running.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import gradio as gr

from backend.errors import UserError
from backend.hub.library import discard
from backend.job_events import JobProgress
from backend.jobs import Job
from backend.services import Services
from ui import job_view
from ui.answer import warn
from ui.i18n import label, locale_of, t

POLL_S = 1.0
TO_CHAT = "() => window.LMDESK.showTab('chat')"

Updates = dict[Any, Any]


class JobPanel:
    """Args:
        kind: of the jobs that it shows by itself; "" are all.
        removable: whether a job can be forgotten here.
    """

    def __init__(self, services: Services, kind: str = "", *, removable: bool = False) -> None:
        assert services.jobs is not None and services.library is not None
        self.services, self.store, self.library = services, services.jobs, services.library
        self.kind, self.removable = kind, removable
        name = f"job-{kind or 'any'}"
        with gr.Column(elem_id=name, elem_classes="lmd-job-panel", visible=False) as self.box:
            self.view = gr.HTML(elem_id=f"{name}-view", apply_default_css=False)
            with gr.Row(elem_classes="lmd-job-buttons"):
                def button(key: str, **options: Any) -> gr.Button:
                    return gr.Button(label(f"job.{key}"), elem_id=f"{name}-{key}", size="sm",
                                     visible=False, **options)

                self.load = button("load", variant="primary")
                self.compare = button("compare")  # wired by the tab that compares
                self.csv = button("csv")
                self.pause, self.resume = button("pause"), button("resume")
                self.cancel = button("cancel", variant="stop")
                self.remove = button("remove")
        self.job_id = gr.State("")
        self.file = gr.Textbox(visible=False)  # on its way to the browser's downloads
        self.timer = gr.Timer(POLL_S, active=False)
        self.outputs = [self.box, self.view, self.job_id, self.timer, self.load, self.compare,
                        self.csv, self.pause, self.resume, self.cancel, self.remove]
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.timer.tick(self.on_tick, [self.job_id], self.outputs, queue=False, **event)
        for clicked, act in ((self.pause, self.store.pause), (self.resume, self.store.resume),
                             (self.cancel, self._cancel), (self.remove, self.store.remove)):
            clicked.click(self._handler(act), [self.job_id], self.outputs, **event)
        self.csv.click(self.on_csv, [self.job_id], [self.file], **event).then(
            None, [self.file], [], js="(file) => file && window.LMDESK.download(file)")
        self.load.click(self.on_load_model, [self.job_id], [], **event).success(
            None, None, None, js=TO_CHAT)

    def wire_load(self, page: gr.Blocks) -> None:
        """Show the newest job of the kind when the page is opened."""
        page.load(self.on_open, [], self.outputs, show_progress="hidden",
                  api_visibility="private")

    async def on_open(self, request: gr.Request) -> Updates:
        newest = next((j for j in await asyncio.to_thread(self.store.list)
                       if j.kind == self.kind or not self.kind), None)
        return await self.show(newest.id if newest else "", locale_of(request))

    async def on_tick(self, job_id: str, request: gr.Request) -> Updates:
        return await self.show(job_id, locale_of(request))

    async def show(self, job_id: str, locale: str) -> Updates:
        """The panel with that job; nothing without one."""
        try:
            job, progress, html = await asyncio.to_thread(self._look, job_id, locale)
        except UserError:
            return {self.box: gr.update(visible=False), self.job_id: "",
                    self.timer: gr.Timer(active=False)}
        goes_on = job.kind in ("download", "quantize")
        return {
            self.box: gr.update(visible=True), self.view: html, self.job_id: job.id,
            self.timer: gr.Timer(active=job.running),
            self.load: gr.update(visible=self._result(job) is not None),
            self.compare: gr.update(visible=self._result(job) is not None
                                    and "model" in job.details),
            self.csv: gr.update(visible=bool(progress.benchmark.rows)),
            self.pause: gr.update(visible=job.running and goes_on),
            self.resume: gr.update(visible=not job.running and job.state != "finished"
                                   and self._result(job) is None),
            self.cancel: gr.update(visible=job.running or job.state == "paused"),
            self.remove: gr.update(visible=self.removable and not job.running),
        }

    async def on_load_model(self, job_id: str, request: gr.Request) -> None:
        """Serve what the job has made."""
        try:
            job = self.store.get(job_id)
            folder = self._result(job)
            if folder is None or self.services.engines is None:
                raise UserError(t("job.no_result", locale_of(request)))
            options = job.details.get("load_options") or {}
            await self.services.engines.load(str(self.library.checked(folder)), options)
        except Exception as error:
            warn(error, locale_of(request))
            raise gr.Error(visible=False, print_exception=False) from error

    async def on_csv(self, job_id: str, request: gr.Request) -> str:
        """A benchmark's rows. They are made of its events: no file is named, and none is read."""
        try:
            job = self.store.get(job_id)
            progress = await asyncio.to_thread(self.store.progress, job_id)
        except UserError as error:
            warn(error, locale_of(request))
            return ""
        return json.dumps({"name": f"{job.kind}-{job.id}.csv", "text": progress.benchmark.csv()})

    def pair(self, job_id: str, locale: str) -> tuple[str, str, int | None]:
        """(original, result, the result's `quant_policy`) of a job that has made a model.

        Raises:
            UserError: it has made none.
        """
        job = self.store.get(job_id)
        original, result = job.details.get("model"), self._result(job)
        if original is None or result is None:
            raise UserError(t("job.no_result", locale))
        return original, result, (job.details.get("load_options") or {}).get("quant_policy")

    def _look(self, job_id: str, locale: str) -> tuple[Job, JobProgress, str]:
        job, progress = self.store.get(job_id), self.store.progress(job_id)
        html = job_view.job_html(job, progress, self.store.log_tail(job_id), locale)
        return job, progress, html

    def _result(self, job: Job) -> str | None:
        """The folder of the model that it has made, or has measured as it would be served."""
        result = None if job.running else self.store.progress(job.id).result
        if result is None:
            return None
        found = result.get("folder") or result.get("path") or job.details.get("serves")
        return found if found and Path(found).is_dir() else None

    def _cancel(self, job_id: str) -> None:
        job = self.store.cancel(job_id)
        if job.kind == "download" and "target" in job.details and not job.running:
            discard(self.library.allowed(job.details["target"]))

    def _handler(self, act: Any) -> Any:
        async def handler(job_id: str, request: gr.Request) -> Updates:
            try:
                await asyncio.to_thread(act, job_id)
            except Exception as error:
                warn(error, locale_of(request))
            return await self.show(job_id, locale_of(request))
        return handler
