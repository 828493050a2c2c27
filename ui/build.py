"""Puts the page together and mounts it on the web server.

A tab is a file with a class: `XTab(services)` builds its components inside the current layout and
wires them, `wire_load(page)` adds what happens when the page is opened. `TABS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gradio as gr
from fastapi import FastAPI

from backend.services import Services
from ui import forms, theme
from ui.chat_tab import ChatTab
from ui.compare_tab import CompareTab
from ui.config_tab import ConfigTab
from ui.download_tab import DownloadTab
from ui.guide_tab import GuideTab
from ui.i18n import gradio_i18n, label, t
from ui.jobs_tab import JobsTab
from ui.language import ChosenLanguage
from ui.owner import OwnerCookie
from ui.quantize_tab import QuantizeTab
from ui.status_bar import build_status_bar


class Tab(Protocol):
    """What every tab's class is."""

    def wire_load(self, page: gr.Blocks) -> None:
        """Add the tab's part of opening or reloading the page."""


class TabEntry(NamedTuple):
    """A tab of the page.

    Attributes:
        id: its name for code; its words are the i18n key "tab.<id>".
        build: the tab's class.
        restful: whether a page without jobs of its own has it, too, such as one over somebody's
            api_server.
    """

    id: str
    build: Callable[[Services], Tab]
    restful: bool = False


TABS: tuple[TabEntry, ...] = (  # in the order in which they stand
    TabEntry("guide", GuideTab),
    TabEntry("download", DownloadTab),
    TabEntry("quantize", QuantizeTab),
    TabEntry("config", ConfigTab),
    TabEntry("chat", ChatTab, restful=True),
    TabEntry("compare", CompareTab, restful=True),
    TabEntry("jobs", JobsTab),
)
FIRST = "chat"  # shown first
FIRST_WITHOUT_MODEL = "download"  # whoever has no model yet, gets one there
# At a time, of all open pages together: a reply in the making takes one. Gradio's 40 would let a
# class of forty that all wait for replies do nothing else.
MAX_EVENTS = 1000


def build_ui(services: Services) -> gr.Blocks:
    """The page, not yet served."""
    entries = [entry for entry in TABS if entry.restful or services.jobs]
    with gr.Blocks(title=t("page.title"), fill_width=True, analytics_enabled=False) as page:
        build_status_bar(services)
        if len(entries) == 1:
            tabs = [entries[0].build(services)]
        else:
            tabs = _build_tabs(entries, services, page)
        for tab in tabs:
            tab.wire_load(page)
    page.max_threads = MAX_EVENTS
    # Gradio's own default is one event at a time, one student at a time.
    return page.queue(default_concurrency_limit=None, max_size=None, api_open=False)


def _build_tabs(entries: list[TabEntry], services: Services, page: gr.Blocks) -> list[Tab]:
    tabs: list[Tab] = []
    with gr.Tabs(selected=FIRST, elem_id="tabs") as place:
        if any(entry.id == FIRST_WITHOUT_MODEL for entry in entries):
            page.load(lambda: _first(services), None, place, show_progress="hidden", queue=False,
                      api_visibility="private")
        for entry in entries:
            # All are drawn at once, so that nothing is lost by looking at another.
            layout: dict[str, Any] = {"elem_id": f"tab-{entry.id}", "render_children": True}
            with gr.Tab(label(f"tab.{entry.id}"), id=entry.id, **layout) as tab:
                tabs.append(entry.build(services))
            if hasattr(tabs[-1], "wire_select"):  # what it does only when somebody opens it
                tabs[-1].wire_select(tab)
        for built in tabs:
            if hasattr(built, "wire_tabs"):  # what it does when something is pressed in another
                built.wire_tabs(tabs)
    return tabs


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
    app.add_middleware(OwnerCookie, instance=instance)
    app.add_middleware(ChosenLanguage)
    return gr.mount_gradio_app(
        app,
        build_ui(services),
        path="/",
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
