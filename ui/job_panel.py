"""One job on a tab: its progress, and the buttons that it takes now.

    self.jobs = JobPanel(services, "quantize")      # inside the tab's layout
    ...
    return await self.jobs.show(job.id, locale)     # in an event with outputs=self.jobs.outputs
    self.jobs.shown_on(tab.select)                  # finds the newest of its kind again

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
from ui.answer import no_success, warn
from ui.forms import pressed
from ui.i18n import label, locale_of, t

POLL_S = 1.0
TO_CHAT = "() => window.LMDESK.showTab('chat')"
# What the jobs of a kind take; "" are those of all kinds, which can be forgotten, too.
BUTTONS = {
    "download": ("load", "pause", "resume", "cancel"),
    "quantize": ("load", "compare", "pause", "resume", "cancel"),
    "benchmark": ("load", "csv", "resume", "cancel"),
    "evaluate": ("load", "resume", "cancel"),
    "": ("load", "compare", "csv", "pause", "resume", "cancel", "remove"),
}
VARIANTS = {"load": "primary", "cancel": "stop"}

Updates = dict[Any, Any]


class JobPanel:
    """Args:
        kind: of the jobs that it shows by itself; "" are all.

    Attributes:
        buttons: by name; "compare" is wired by the tab that compares.
    """

    def __init__(self, services: Services, kind: str = "") -> None:
        assert services.jobs is not None and services.library is not None
        self.services, self.store, self.library = services, services.jobs, services.library
        self.kind = kind
        name = f"job-{kind or 'any'}"
        with gr.Column(elem_id=name, elem_classes="lmd-job-panel", visible=False) as self.box:
            self.view = gr.HTML(elem_id=f"{name}-view", apply_default_css=False)
            with gr.Row(elem_classes="lmd-job-buttons"):
                self.buttons = {
                    key: gr.Button(label(f"job.{key}"), elem_id=f"{name}-{key}", size="sm",
                                   variant=VARIANTS.get(key, "secondary"), visible=False)
                    for key in BUTTONS[kind]}
        self.job_id = gr.State("")
        self.timer = gr.Timer(POLL_S, active=False)
        self.outputs = [self.box, self.view, self.job_id, self.timer, *self.buttons.values()]
        self._wire()

    def _wire(self) -> None:
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        buttons = self.buttons
        self.timer.tick(self.on_tick, [self.job_id], self.outputs, queue=False, **event)
        acts = {"pause": self.store.pause, "resume": self.store.resume, "cancel": self._cancel,
                "remove": self.store.remove}
        self.acts = {buttons[key].elem_id: act for key, act in acts.items() if key in buttons}
        gr.on([buttons[key].click for key in acts if key in buttons], self.on_act, [self.job_id],
              self.outputs, **event)
        buttons["load"].click(self.on_load_model, [self.job_id], [], **event).success(
            None, None, None, js=TO_CHAT)
        if "csv" in buttons:
            file = gr.Textbox(visible=False)  # on its way to the browser's downloads
            buttons["csv"].click(self.on_csv, [self.job_id], [file], **event).then(
                None, [file], [], js="(file) => file && window.LMDESK.download(file)")

    def shown_on(self, event: Any) -> None:
        """Show the newest job of the kind on that event."""
        event(self.on_open, [], self.outputs, show_progress="hidden", api_visibility="private")

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
        result = self._result(job)
        offered = {
            "load": result is not None,
            "compare": result is not None and "model" in job.details,
            "csv": bool(progress.benchmark.rows),
            "pause": job.running and "pause" in BUTTONS.get(job.kind, ()),
            "resume": not job.running and job.state != "finished" and result is None,
            "cancel": job.running or job.state == "paused",
            "remove": not job.running,
        }
        return {
            self.box: gr.update(visible=True), self.view: html, self.job_id: job.id,
            self.timer: gr.Timer(active=job.running),
            **{button: gr.update(visible=offered[key]) for key, button in self.buttons.items()},
        }

    async def on_act(self, job_id: str, event: gr.EventData, request: gr.Request) -> Updates:
        """Do with the job what the pressed button says."""
        try:
            if act := self.acts.get(pressed(event)):
                await asyncio.to_thread(act, job_id)
        except Exception as error:
            warn(error, locale_of(request))
        return await self.show(job_id, locale_of(request))

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
            raise no_success() from error

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
