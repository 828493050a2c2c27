"""One prompt to two targets, their replies beside each other.

Students may ask what is served already; over an api_server, any of its models. A model of the
library is loaded for it, and another api_server is somebody else's: these are the host's to name,
as `check_caller` says, and so is what becomes of the memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from backend.chat import Message
from backend.classroom import require_host
from backend.compare import Comparison, ServedModelLeavesError, Side
from backend.config import SamplingParams
from backend.errors import UserError
from backend.services import Services
from ui import compare_view, forms
from ui.answer import no_success, warn
from ui.chat_view import LATEX_DELIMITERS
from ui.compare_target import SERVED, Form, TargetPicker
from ui.compare_view import Record
from ui.i18n import label, locale_of, t
from ui.reply_stream import FRAME_S
from ui.roles import caller, only_for_hosts

SAMPLING = {"temperature": 0.0, "max_tokens": 256, "seed": None}  # greedy: only the models differ
HEARTBEAT_S = 0.5  # between two signs of life without text; they also find a closed tab out
MAX_PROMPT = 200_000  # characters; the context is checked in tokens
MAX_UNSEEN = 1000  # ended comparisons whose ends nobody has fetched yet

Updates = dict[Any, Any]
Frames = AsyncGenerator[Updates, None]


class SideBySide:
    """Builds the comparison inside the current layout and wires it.

    Attributes:
        for_hosts: parts that students do not see.
    """

    def __init__(self, services: Services) -> None:
        self.services, self.room = services, services.comparisons
        self._running: dict[str, Comparison] = {}  # by browser tab
        html: dict[str, Any] = {"apply_default_css": False}
        with gr.Row(elem_classes="lmd-pair") as choice:
            self.pickers = tuple(TargetPicker(services, side) for side in ("left", "right"))
        self.for_hosts = [] if services.remote else [choice]  # one answers there, for students
        self.prompt = gr.Textbox(
            label=label("compare.prompt"), placeholder=label("compare.placeholder"), lines=1,
            max_lines=10, elem_id="compare-prompt")
        with gr.Accordion(label("compare.settings"), open=False, elem_id="compare-settings"):
            self.system_prompt = gr.Textbox(label=label("chat.system_prompt"), lines=2,
                                            max_lines=8, elem_id="compare-system")
            with gr.Row():
                inputs = forms.sampling_inputs(list(SAMPLING), SAMPLING, "compare")
            self.sampling = dict(zip(SAMPLING, inputs, strict=True))
        with gr.Row(elem_classes="lmd-actions"):
            self.go = gr.Button(label("compare.go"), elem_id="compare-go", variant="primary",
                                size="sm")
            self.stop = gr.Button(label("compare.stop"), elem_id="compare-stop", variant="stop",
                                  size="sm", visible=False)
            self.free = gr.Button(label("compare.free"), elem_id="compare-free", size="sm",
                                  visible=False)
        self.question = gr.HTML(elem_id="compare-question", visible=False, **html)
        self.force = gr.Button(label("compare.force"), elem_id="compare-force", size="sm",
                               variant="stop", visible=False)
        self.note = gr.HTML(elem_id="compare-note", **html)
        self.heads, self.replies, self.feet = [], [], []
        with gr.Row(elem_classes="lmd-pair"):
            for side in ("left", "right"):
                with gr.Column(elem_id=f"pane-{side}", elem_classes="lmd-pane"):
                    self.heads.append(gr.HTML(elem_id=f"pane-{side}-head", **html))
                    self.replies.append(gr.Markdown(
                        elem_id=f"pane-{side}-reply", line_breaks=True,
                        latex_delimiters=LATEX_DELIMITERS))
                    self.feet.append(gr.HTML(elem_id=f"pane-{side}-foot", **html))
        with gr.Row(elem_classes="lmd-actions", visible=False) as self.exports:
            self.markdown = gr.Button(label("chat.export.markdown"), size="sm",
                                      elem_id="compare-markdown")
            self.json = gr.Button(label("chat.export.json"), size="sm", elem_id="compare-json")
        self.record = gr.State(None)  # of the comparison that is shown, when it has ended
        self.file = gr.Textbox(visible=False)  # on its way to the browser's downloads
        self.targets = [field for picker in self.pickers for field in (
            picker.target, picker.kv, picker.server, picker.model)]
        self._wire()

    def _wire(self) -> None:
        event: dict[str, Any] = {
            "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        form = {self.prompt, self.system_prompt, *self.sampling.values(),
                *(field for picker in self.pickers for field in picker.inputs)}
        panes = [*self.heads, *self.replies, *self.feet]
        buttons = [self.go, self.stop, self.free, self.exports, self.record]
        begun = [*buttons, self.question, self.force, self.note, *panes]

        def draws(begins: Any) -> None:
            # Frames touch the panes alone, and go out as they are: each output costs every frame.
            begins.success(self.on_draw, [], panes, postprocess=False, **event).then(
                self.on_end, [], buttons, **event)

        draws(gr.on([self.go.click, self.prompt.submit], self.on_go, form, begun, **event))
        self.stop.click(self.on_stop, [], [], queue=False, **event)
        with only_for_hosts():
            draws(self.force.click(self.on_force, form, begun, **event))
            self.free.click(self.on_free, [], [self.free], **event)
        for button, write in ((self.markdown, self.on_markdown), (self.json, self.on_json)):
            button.click(write, [self.record], [self.file], **event).then(
                None, [self.file], [], js="(file) => file && window.LMDESK.download(file)")

    async def on_choices(self, left: str, right: str, request: gr.Request) -> Updates:
        """The targets that there are now."""
        return {picker.target: await picker.on_choices(chosen, request)
                for picker, chosen in zip(self.pickers, (left, right))}

    # Events

    async def on_go(self, form: Form, request: gr.Request) -> Frames:
        async for updates in self._begin(form, request, force=False):
            yield updates

    async def on_force(self, form: Form, request: gr.Request) -> Frames:
        async for updates in self._begin(form, request, force=True):
            yield updates

    async def on_draw(self, request: gr.Request) -> Frames:
        """Draw the replies as they grow; when nobody looks any more, end them."""
        locale, tab = locale_of(request), _tab(request)
        comparison = self._running.get(tab)
        if comparison is None:  # called by hand
            return
        drawn, drawn_at = None, 0.0
        try:
            while not comparison.ended:
                await comparison.wait(FRAME_S)
                state, now = _state(comparison), time.monotonic()
                if state != drawn or now - drawn_at >= HEARTBEAT_S:
                    drawn, drawn_at = state, now
                    yield self._panes(comparison, locale)
            yield self._panes(comparison, locale)
        finally:
            if not comparison.ended:  # the browser tab was closed
                comparison.stop()
                self._running.pop(tab, None)

    async def on_end(self, request: gr.Request) -> Updates:
        """The buttons at rest, and what can be taken along."""
        comparison = self._running.pop(_tab(request), None)
        updates: Updates = {self.go: gr.update(visible=True, interactive=True),
                            self.stop: gr.update(visible=False)}
        if comparison is None:
            return updates
        kept = comparison.plan.together and any(pane.side.load for pane in comparison.panes)
        made = compare_view.record(comparison, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
        return {**updates, self.free: gr.update(visible=kept and bool(self.room.spare.loads)),
                self.exports: gr.update(visible=True), self.record: made}

    async def on_stop(self, request: gr.Request) -> None:
        # The event that draws the replies sees their end and shows it.
        if comparison := self._running.get(_tab(request)):
            comparison.stop()

    async def on_free(self, request: gr.Request) -> Updates:
        """End the engines of this tab's comparison."""
        await self.room.leave(_tab(request))
        return {self.free: gr.update(visible=False)}

    async def on_leave(self, request: gr.Request) -> None:
        """The browser tab was closed."""
        if comparison := self._running.pop(_tab(request), None):
            comparison.stop()
        await self.room.leave(_tab(request))

    async def on_markdown(self, made: Record | None, request: gr.Request) -> str:
        return self._file("md", compare_view.as_markdown(made, locale_of(request))) if made else ""

    async def on_json(self, made: Record | None) -> str:
        return self._file("json", compare_view.as_json(made)) if made else ""

    # A comparison

    def check_caller(self, form: Form, request: gr.Request) -> None:
        """Raises HostOnlyError if a student names more than what is served."""
        if not all(picker.is_served(form) for picker in self.pickers):
            require_host(caller(request))

    async def _begin(self, form: Form, request: gr.Request, force: bool) -> Frames:
        """Ask both; say what memory holds of them, or what has to be asked or mended before."""
        locale, tab, asker = locale_of(request), _tab(request), caller(request)
        classroom = self.services.classroom
        at_rest: Updates = {self.go: gr.update(interactive=True), self.note: ""}
        try:
            self.check_caller(form, request)
            if tab in self._running and not self._running[tab].ended:
                raise UserError(t("compare.busy", locale))
            messages, sampling = self._messages(form, locale), self._params(form)
            sides = [await picker.side(form, locale) for picker in self.pickers]
            yield {self.go: gr.update(interactive=False), self.question: gr.update(visible=False),
                   self.force: gr.update(visible=False), self.note: _preparing(sides, locale)}
            comparison = await self.room.start(
                sides, messages, sampling, tab, ask=partial(classroom.reply, asker), force=force,
                together=classroom.has_room(asker, len(sides)))
            self._remember(tab, comparison)
        except ServedModelLeavesError as error:
            words = t("compare.leaves", locale, count=error.count)
            yield {**at_rest, self.force: gr.update(visible=True), self.question: gr.update(
                value=f'<p class="lmd-ask">{escape(words)}</p>', visible=True)}
            raise no_success() from error
        except Exception as error:
            warn(error, locale)
            yield at_rest
            raise no_success() from error
        else:
            yield {
                self.go: gr.update(visible=False), self.stop: gr.update(visible=True),
                self.free: gr.update(visible=False), self.exports: gr.update(visible=False),
                self.note: compare_view.note_html(comparison, locale), self.record: None,
                **self._panes(comparison, locale),
            }

    def _remember(self, tab: str, comparison: Comparison) -> None:
        """The page fetches the end of what it has begun; others need not."""
        ended = [tab for tab, made in self._running.items() if made.ended]
        for unseen in ended[:-MAX_UNSEEN]:
            del self._running[unseen]
        self._running[tab] = comparison

    def _panes(self, comparison: Comparison, locale: str) -> Updates:
        updates: Updates = {}
        for pane, head, reply, foot in zip(
                comparison.panes, self.heads, self.replies, self.feet, strict=True):
            updates[head] = compare_view.head_html(pane, locale)
            updates[reply] = compare_view.reply_markdown(pane)
            updates[foot] = compare_view.foot_html(pane, locale)
        return updates

    def _messages(self, form: Form, locale: str) -> list[Message]:
        texts = [form[self.system_prompt] or "", form[self.prompt] or ""]
        if not all(isinstance(text, str) and len(text) <= MAX_PROMPT for text in texts):
            raise UserError(t("compare.long_prompt", locale, most=MAX_PROMPT))
        if not texts[1].strip():
            raise UserError(t("error.empty_message", locale))
        roles = zip(("system", "user"), texts)
        return [{"role": role, "content": text} for role, text in roles if text.strip()]

    def _params(self, form: Form) -> SamplingParams:
        return forms.sampling_params({name: form[field] for name, field in self.sampling.items()})

    def _file(self, ending: str, text: str) -> str:
        return json.dumps({"name": f"comparison.{ending}", "text": text})

    # For other tabs

    async def preset(
        self, left: str, right: str, right_kv: int | None, request: gr.Request
    ) -> Updates:
        """The fields with these two; folders of models, or `SERVED`."""
        updates: Updates = {}
        for picker, chosen, kv in zip(self.pickers, (left, right), (None, right_kv)):
            updates[picker.target] = await picker.on_choices(chosen, request)
            updates[picker.kv] = gr.update(
                value="default" if kv is None else str(kv), visible=chosen != SERVED)
            updates[picker.server] = gr.update(visible=False)
            updates[picker.model] = gr.update(visible=self.services.remote and chosen == SERVED)
        return updates


def _tab(request: gr.Request) -> str:
    """A browser tab: its name is its own to give, and nobody gets at another's by taking that."""
    return f"{caller(request).id} {request.session_hash or ''}"


def _state(comparison: Comparison) -> list[Any]:
    """What is another when there is something to draw."""
    return [(pane.state, len(pane.live.text) if pane.live else 0) for pane in comparison.panes]


def _preparing(sides: Sequence[Side], locale: str) -> str:
    """While it is found out what memory holds."""
    if not any(side.load for side in sides):
        return ""
    words = escape(t("compare.preparing", locale))
    return f'<p class="lmd-quiet lmd-busy" role="status">{words}</p>'
