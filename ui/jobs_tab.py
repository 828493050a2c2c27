"""The jobs tab: every long task, whoever started it and whenever; one of them closely."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from backend.services import Services
from ui.i18n import label, locale_of, t
from ui.job_panel import JobPanel
from ui.roles import Page


class JobsTab:
    """A list to choose from, and the chosen job."""

    def __init__(self, services: Services) -> None:
        assert services.jobs is not None
        self.store = services.jobs
        with gr.Column(elem_classes="lmd-tab"):
            self.empty = gr.Markdown(label("jobs.empty"), elem_id="jobs-empty")
            with gr.Row():
                self.choice = gr.Dropdown([], label=label("jobs.choose"), elem_id="jobs-choice",
                                          filterable=False)
                self.refresh = gr.Button(label("jobs.refresh"), elem_id="jobs-refresh", size="sm",
                                         scale=0, elem_classes="lmd-quiet-button")
            self.panel = JobPanel(services)
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.choice.input(self.on_choose, [self.choice], self.panel.outputs, **event)
        self._event = event
        self._wire_refresh(self.refresh.click)
        self._wire_refresh(self.panel.buttons["remove"].click)

    def _wire_refresh(self, act: Any) -> None:
        act(self.on_refresh, [self.panel.job_id],
            [self.choice, self.empty, *self.panel.outputs], **self._event)

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """List what there is."""
        self._wire_refresh(tab.select)

    async def on_choose(self, job_id: str, request: gr.Request) -> dict[Any, Any]:
        return await self.panel.show(job_id, locale_of(request))

    async def on_refresh(self, job_id: str, request: gr.Request) -> dict[Any, Any]:
        locale = locale_of(request)
        jobs = await asyncio.to_thread(self.store.list)
        choices = [(f"{t(f'job.state.{j.state}', locale)} · {j.title}", j.id) for j in jobs]
        ids = [job.id for job in jobs]
        chosen = job_id if job_id in ids else (ids[0] if ids else None)
        return {self.choice: gr.update(choices=choices, value=chosen, visible=bool(ids)),
                self.empty: gr.update(visible=not ids),
                **await self.panel.show(chosen or "", locale)}
