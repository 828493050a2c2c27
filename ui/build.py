"""Puts the page together and mounts it on the web server.

A tab is a file with a class: `XTab(services)` builds its components inside the current layout and
wires them, `wire_opening(page, tab)` adds what happens when they are opened. `TABS` names them all.
Whoever opens the page waits for all that happens then, so a tab does its part when it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from backend.services import Services
from ui import forms, theme
from ui.chat_tab import ChatTab
from ui.class_tab import ClassTab
from ui.compare_tab import CompareTab
from ui.config_tab import ConfigTab
from ui.download_tab import DownloadTab
from ui.guide_tab import GuideTab
from ui.i18n import gradio_i18n, label, t
from ui.jobs_tab import JobsTab
from ui.language import ChosenLanguage
from ui.owner import OwnerCookie
from ui.page_files import PageFiles
from ui.quantize_tab import QuantizeTab
from ui.roles import Page, StudentRoutes
from ui.sentences import SENTENCE, in_words
from ui.status_bar import StatusBar


class Tab(Protocol):
    """What every tab's class is."""

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """Add what happens when the page, or this tab of it, is opened."""


class TabEntry(NamedTuple):
    """A tab of the page.

    Attributes:
        id: its name for code; its words are the i18n key "tab.<id>".
        build: the tab's class.
        restful: whether a page without jobs of its own has it, too, such as one over somebody's
            api_server.
        student: whether it is for students, too; what is in others, Gradio's page hides from them
            and `Page` refuses them.
        for_class: whether there is it only where there is a class.
        side: of the bar of tabs: at the left what makes models ready, at the right what uses them.
    """

    id: str
    build: Callable[[Services], Tab]
    restful: bool = False
    student: bool = False
    for_class: bool = False
    side: Literal["left", "right"] = "left"


# On each side in the order in which they stand. At each step of an event, Gradio's script looks for
# each component that it concerns from the first on; so what many use all the time is built first.
TABS: tuple[TabEntry, ...] = (
    TabEntry("chat", ChatTab, restful=True, student=True, side="right"),
    TabEntry("compare", CompareTab, restful=True, student=True, side="right"),
    TabEntry("jobs", JobsTab, side="right"),
    TabEntry("class", ClassTab, restful=True, for_class=True, side="right"),
    TabEntry("guide", GuideTab),
    TabEntry("download", DownloadTab),
    TabEntry("quantize", QuantizeTab),
    TabEntry("config", ConfigTab),
)
FIRST = "chat"  # shown first
FIRST_WITHOUT_MODEL = "download"  # whoever has no model yet, gets one there
# At a time, of all open pages together: a reply in the making takes one. Gradio's 40 would let a
# class of forty that all wait for replies do nothing else.
MAX_EVENTS = 1000


def build_ui(services: Services) -> Page:
    """The page, not yet served."""
    in_class = services.classroom.has_hosts
    entries = [entry for entry in TABS
               if (entry.restful or services.jobs) and (in_class or not entry.for_class)]
    with Page(title=t("page.title"), fill_width=True, analytics_enabled=False) as page:
        bar = StatusBar(services)
        with page.open_to_students():
            bar.wire_load(page)
        for_hosts = _build_tabs(page, entries, services)
        if in_class:
            _show_to_hosts(page, [*bar.for_hosts, *for_hosts])
    page.max_threads = MAX_EVENTS
    # No event of ours shows Gradio's progress. Unless told so, its script tells every output of
    # every event that has run of each step of any event: 0.6 s of a browser's time a reply.
    for event in page.fns.values():
        event.show_progress_on = []
    # Gradio's own default is one event at a time, one student at a time.
    page.queue(default_concurrency_limit=None, max_size=None, api_open=False)
    return page


def _build_tabs(page: Page, entries: list[TabEntry], services: Services) -> list[Any]:
    """The tabs; returns what of them is for hosts only."""
    tabs, for_hosts = [], []
    with gr.Tabs(selected=FIRST, elem_id="tabs") as all_tabs:
        if any(entry.id == FIRST_WITHOUT_MODEL for entry in entries):
            page.load(lambda: _first(services), None, all_tabs, show_progress="hidden",
                      queue=False, api_visibility="private")
        for entry in entries:
            with page.open_to_students() if entry.student else nullcontext():
                with gr.Tab(label(f"tab.{entry.id}"), id=entry.id,
                            elem_id=f"tab-{entry.id}", alignment=entry.side) as place:
                    tab = entry.build(services)
                tab.wire_opening(page, place)
            tabs.append(tab)
            for_hosts += tab.for_hosts if entry.student else [place]
        for tab in tabs:
            if hasattr(tab, "wire_tabs"):  # what it does when something is pressed in another
                tab.wire_tabs(tabs)
    return for_hosts


def _show_to_hosts(page: Page, parts: list[Any]) -> None:
    """Hide parts of the page until somebody opens it who is a host."""
    for part in parts:
        part.visible = False

    def show() -> list[Any]:  # refused to students, as all that is not wired for them
        return [gr.update(visible=True) for _ in parts]

    page.load(show, [], parts, show_progress="hidden", api_visibility="private")


def _first(services: Services) -> Any:
    """The tab that a page shows when it is opened, if it is another than FIRST."""
    if services.engines and services.engines.current is None:
        return gr.Tabs(selected=FIRST_WITHOUT_MODEL)
    return gr.skip()


def mount_page(app: FastAPI, services: Services, root_path: str = "") -> FastAPI:
    """Serve the page at "/" of `app`, after (under) the routes that `app` has already.

    Args:
        root_path: prefix that a proxy in front of us adds, such as "/user/me/proxy/6006".
    """
    instance = services.history.instance
    app.user_middleware.append(Middleware(PageFiles))  # the innermost: behind the guard
    app.add_middleware(OwnerCookie, instance=instance)
    app.add_middleware(ChosenLanguage)
    page = build_ui(services)
    for path, endpoint in {SENTENCE: in_words, **page.routes}.items():
        app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False,
                          response_model=None)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"middleware": [Middleware(StudentRoutes)]},
        root_path=root_path or None,
        run_history=False,  # would keep API keys in the browser's storage, readable
        show_error=False,
        max_file_size=1,  # the page takes no files, but Gradio's upload route is there all the same
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        favicon_path=str(theme.LOGO),
        i18n=gradio_i18n(forms.help_texts()),
        theme=theme.theme(),
        css=theme.css(),
        head=theme.head(instance),
    )
