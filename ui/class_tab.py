"""The class tab, for hosts: who is here, what they do, and what they may."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.classroom import MOST_REPLIES, MOST_TOKENS, StudentLimits
from backend.services import Services
from ui import class_view
from ui.answer import warn
from ui.forms import whole_number
from ui.i18n import label, locale_of, t
from ui.roles import Page, caller


class ClassTab:
    """A dashboard that the page's script refreshes while somebody looks at it, two buttons, and
    the limits of each student."""

    def __init__(self, services: Services) -> None:
        self.classroom, self.invitation = services.classroom, services.invitation
        with gr.Column(elem_classes="lmd-tab", elem_id="class-page"):
            self.summary = gr.HTML(
                elem_id="class-summary", padding=False, apply_default_css=False)
            with gr.Row(elem_classes="lmd-actions"):
                self.pause = gr.Button(label("class.pause"), elem_id="class-pause", size="sm")
                self.resume = gr.Button(label("class.resume"), elem_id="class-resume", size="sm",
                                        variant="primary", visible=False)
            self.people = gr.HTML(
                elem_id="class-people", padding=False, apply_default_css=False)
            with gr.Column(elem_id="class-limits"):
                gr.Markdown(label("class.limits"))
                with gr.Row():
                    self.max_replies = gr.Number(
                        None, label=label("class.max_replies"), elem_id="class-max-replies",
                        info=label("class.max_replies_info"), min_width=200)
                    self.max_tokens = gr.Number(
                        None, label=label("class.max_tokens"), elem_id="class-max-tokens",
                        info=label("class.max_tokens_info"), min_width=200)
                with gr.Row(elem_classes="lmd-actions"):
                    self.save = gr.Button(label("class.save"), elem_id="class-save", size="sm")
            with gr.Column(elem_id="class-invitation"):
                gr.Markdown(label("class.invitation"))
                self.text = gr.Textbox(
                    label=label("class.invitation_info"), elem_id="class-text", interactive=False,
                    lines=4, max_lines=12, buttons=["copy"])
        # Pressed by the page's script; see assets/ui/class.js.
        self.refresh = gr.Button(label("class.refresh"), elem_id="class-refresh")
        self._wire()

    def _wire(self) -> None:
        event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        figures = [self.summary, self.people, self.pause, self.resume]
        limits = [self.max_replies, self.max_tokens]
        self.refresh.click(self.on_refresh, [], figures, queue=False, **event)
        self.pause.click(self.on_pause, [], figures, **event)
        self.resume.click(self.on_resume, [], figures, **event)
        gr.on([self.save.click, self.max_replies.submit, self.max_tokens.submit],
              self.on_save, limits, limits, **event)
        self._opened = dict(fn=self.on_open, inputs=[], outputs=[*figures, *limits, self.text],
                            **event)

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """Show the class as it is now."""
        tab.select(**self._opened)

    async def on_open(self, request: gr.Request) -> dict[Any, Any]:
        text = class_view.invitation_text(self.invitation, locale_of(request))
        return {**await self.on_refresh(request), **self._limits(), self.text: text}

    async def on_refresh(self, request: gr.Request) -> dict[Any, Any]:
        status, locale = self.classroom.snapshot(caller(request)), locale_of(request)
        return {
            self.summary: class_view.summary_html(status, locale),
            self.people: class_view.people_html(status, caller(request), locale),
            self.pause: gr.update(visible=not status.paused),
            self.resume: gr.update(visible=status.paused),
        }

    async def on_pause(self, request: gr.Request) -> dict[Any, Any]:
        self.classroom.pause(caller(request))
        return await self.on_refresh(request)

    async def on_resume(self, request: gr.Request) -> dict[Any, Any]:
        self.classroom.resume(caller(request))
        return await self.on_refresh(request)

    async def on_save(
        self, max_replies: Any, max_tokens: Any, request: gr.Request
    ) -> dict[Any, Any]:
        locale = locale_of(request)
        try:
            self.classroom.set_limits(caller(request), StudentLimits(
                whole_number(max_replies, t("class.max_replies", locale), MOST_REPLIES, locale,
                             field="max_replies"),
                None if max_tokens is None else whole_number(
                    max_tokens, t("class.max_tokens", locale), MOST_TOKENS, locale,
                    field="max_tokens")))
        except Exception as error:
            warn(error, locale)
            return {self.max_replies: gr.skip()}  # what was typed stays, to be mended
        gr.Info(t("class.saved", locale))
        return self._limits()

    def _limits(self) -> dict[Any, Any]:
        """The limits that hold."""
        limits = self.classroom.student_limits
        return {self.max_replies: limits.max_replies, self.max_tokens: limits.max_tokens}
