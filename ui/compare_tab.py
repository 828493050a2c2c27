"""The compare tab: two models side by side; how fast a model is; how good it is.

Of its parts, `SideBySide` chats, and loads what is not served; the others start jobs, and are there
only where the page has jobs of its own, and for hosts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from backend.services import Services
from ui.answer import no_success, warn
from ui.benchmark_panel import BenchmarkPanel
from ui.i18n import label, locale_of
from ui.job_panel import JobPanel
from ui.perplexity_panel import PerplexityPanel
from ui.roles import Page, only_for_hosts
from ui.side_by_side import SideBySide

TO_COMPARE = "() => window.LMDESK.showTab('compare')"
Updates = dict[Any, Any]
EVENT: dict[str, Any] = {
    "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}


class CompareTab:
    """Builds the tab's components inside the current layout and wires them.

    Attributes:
        for_hosts: parts that students do not see.
    """

    def __init__(self, services: Services) -> None:
        with gr.Column(elem_classes="lmd-tab", elem_id="compare-page"):
            gr.Markdown(label("compare.intro"))
            self.sides = SideBySide(services)
            self.for_hosts: list[Any] = [*self.sides.for_hosts]
            self.jobs: list[BenchmarkPanel | PerplexityPanel] = []
            if services.jobs is not None:
                with only_for_hosts():
                    self._build_jobs(services)

    def _build_jobs(self, services: Services) -> None:
        for name, build in (("benchmark", BenchmarkPanel), ("perplexity", PerplexityPanel)):
            with gr.Accordion(label(f"compare.{name}"), open=False, elem_id=f"{name}-section",
                              elem_classes="lmd-section") as section:
                part = build(services)
            section.expand(part.on_open, part.fields_at_open, part.fields_at_open, **EVENT)
            part.panel.shown_on(section.expand)
            self.for_hosts.append(section)
            self.jobs.append(part)

    def wire_tabs(self, tabs: Sequence[Any]) -> None:
        """A job that has made a model leads here, from whichever tab shows it."""
        for tab in tabs:
            panel = getattr(tab, "panel", None)
            if isinstance(panel, JobPanel) and "compare" in panel.buttons:
                panel.buttons["compare"].click(
                    self._opener(panel), [panel.job_id], self.sides.targets, **EVENT,
                ).success(None, js=TO_COMPARE)

    def _opener(self, panel: JobPanel) -> Any:
        async def on_compare(job_id: str, request: gr.Request) -> Updates:
            """The model that a job has made, beside the one that it was made of."""
            try:
                return await self.sides.preset(*panel.pair(job_id, locale_of(request)), request)
            except Exception as error:
                warn(error, locale_of(request))
                raise no_success() from error
        return on_compare

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """List the models; when the page is closed, free what it has opened."""
        page.unload(self.sides.on_leave)
        targets = [picker.target for picker in self.sides.pickers]
        tab.select(self.sides.on_choices, targets, targets, **EVENT)
