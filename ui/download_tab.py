"""The download tab: a plan first, then a job that fetches it."""

from __future__ import annotations

import asyncio
from html import escape
from typing import Any

import gradio as gr

from backend.errors import UserError
from backend.hub.fetch import gigabytes
from backend.hub.names import ENDPOINTS, id_of_page
from backend.hub.plan import Hub, Plan, make_plan
from backend.services import Services
from ui.answer import sentence, warn
from ui.i18n import catalogs, label, locale_of, t
from ui.job_panel import JobPanel
from ui.job_view import problem_html
from ui.roles import Page
from ui.sentences import joined

LOCAL = "local"
EXAMPLE = "Qwen/Qwen2.5-0.5B-Instruct"


class DownloadTab:
    """Source, id and token; the plan; the job."""

    def __init__(self, services: Services) -> None:
        assert services.jobs is not None and services.library is not None
        self.store, self.library = services.jobs, services.library
        with gr.Column(elem_classes="lmd-tab"):
            gr.Markdown(label("download.intro"))
            self.source = gr.Radio(
                [(label(f"download.source.{name}"), name) for name in (*ENDPOINTS, LOCAL)],
                value=next(iter(ENDPOINTS)), label=label("download.source"),
                elem_id="download-source")
            with gr.Row():
                self.id = gr.Textbox(label=label("download.id"), placeholder=EXAMPLE,
                                     elem_id="download-id", scale=3)
                self.revision = gr.Textbox(label=label("download.revision"), scale=1,
                                           elem_id="download-revision")
            with gr.Row():
                self.endpoint = gr.Textbox(
                    label=label("download.endpoint"), info=label("download.endpoint_info"),
                    elem_id="download-endpoint")
                self.token = gr.Textbox(
                    label=label("download.token"), info=label("download.token_info"),
                    type="password", elem_id="download-token",
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off"))
            with gr.Row(elem_classes="lmd-actions"):
                self.plan = gr.Button(label("download.plan"), elem_id="download-plan", size="sm")
                self.start = gr.Button(label("download.start"), elem_id="download-start",
                                       variant="primary", size="sm")
            self.planned = gr.HTML(elem_id="download-planned", apply_default_css=False)
            self.panel = JobPanel(services, "download")
        fields = [self.source, self.id, self.revision, self.endpoint, self.token]
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([self.plan.click, self.id.submit], self.on_plan, fields, [self.planned], **event)
        self.start.click(self.on_start, fields, [self.planned, *self.panel.outputs], **event)

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """Show the newest download."""
        self.panel.shown_on(tab.select)

    async def on_plan(
        self, source: str, id: str, revision: str, endpoint: str, token: str, request: gr.Request
    ) -> str:
        locale = locale_of(request)
        try:
            if source == LOCAL:
                return self._local(id, locale)
            plan = await asyncio.to_thread(_plan, source, id, revision, endpoint, token)
            return plan_html(plan, locale)
        except Exception as error:
            return problem_html(_helpful(error, sentence(error, locale), locale))

    async def on_start(
        self, source: str, id: str, revision: str, endpoint: str, token: str, request: gr.Request
    ) -> dict[Any, Any]:
        locale = locale_of(request)
        try:
            if source == LOCAL:
                return {self.planned: self._local(id, locale)}
            plan = await asyncio.to_thread(_plan, source, id, revision, endpoint, token)
            if not plan.fits:
                raise UserError(t("download.no_room", locale, free=gigabytes(plan.disk_free)))
            if plan.complete:
                return {self.planned: plan_html(plan, locale)}
            argv = ["download", plan.id, "--source", source]
            argv += ["--endpoint", plan.endpoint] if endpoint.strip() else []
            argv += ["--revision", revision.strip()] if revision.strip() else []
            argv += ["--token-file", "-"] if token.strip() else []
            job = await asyncio.to_thread(
                self.store.start, [*argv, "--progress", "json"], plan.id, "download",
                details={"target": str(plan.target)}, secret=token.strip() or None)
        except Exception as error:
            said = warn(error, locale)
            return {self.planned: problem_html(_helpful(error, said, locale))}
        return {self.planned: "", **await self.panel.show(job.id, locale)}

    def _local(self, path: str, locale: str) -> str:
        """A folder of this machine is there already: whether it can be used."""
        folder = self.library.checked(path)
        names = {model.path.resolve(): model.name for model in self.library.models()}
        if folder not in names:
            raise UserError(t("download.local_none", locale, folder=str(folder)))
        return f'<p class="lmd-good">{escape(t("download.local", locale, name=names[folder]))}</p>'


def _plan(source: str, id: str, revision: str, endpoint: str, token: str) -> Plan:
    if source not in ENDPOINTS:
        raise UserError(t("error.not_offered", value=repr(source)[:60]), field="source")
    hub = Hub(source, endpoint.strip(), token.strip() or None)
    return make_plan(hub, id_of_page(id.strip()), revision=revision.strip())


def _helpful(error: Exception, said: str, locale: str) -> str:
    """What is `said` of the error, and for the usual ones what to do on this page."""
    key = f"download.help.{getattr(error, 'code', '')}"
    more = t(key, locale) if key in catalogs()["en"] else ""
    return joined(said, more)


def plan_html(plan: Plan, locale: str) -> str:
    """Files, sizes, what is there, and the disk."""
    rows = []
    for planned in plan.files:
        state = t("download.fetch", locale)
        if planned.verified:
            state = t("download.there", locale)
        elif planned.partial:
            state = t("download.partly", locale, size=gigabytes(planned.partial))
        rows.append(f"<tr><td>{escape(planned.file.path)}</td>"
                    f"<td>{gigabytes(planned.file.size)}</td><td>{escape(state)}</td></tr>")
    if plan.complete:
        words = t("download.complete", locale, id=plan.id)
    else:
        words = t("download.to_fetch", locale, fetch=gigabytes(plan.bytes_to_fetch),
                  total=gigabytes(plan.total_bytes), free=gigabytes(plan.disk_free))
    heads = "".join(f"<th>{escape(t(f'download.{key}', locale))}</th>"
                    for key in ("file", "size", "state"))
    full = "" if plan.fits else problem_html(
        t("download.no_room", locale, free=gigabytes(plan.disk_free)))
    head = f"<p><strong>{escape(plan.id)}</strong> · {escape(words)}</p>{full}"
    return (f'<div class="lmd-plan">{head}'
            f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>")
