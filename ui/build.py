"""Puts the page together and mounts it on the web server."""

from __future__ import annotations

import secrets

import gradio as gr
from fastapi import FastAPI

from backend.services import Services
from ui import forms, theme
from ui.chat_tab import ChatTab
from ui.conversations import ConversationStore
from ui.i18n import gradio_i18n, t
from ui.status_bar import build_status_bar


def build_ui(services: Services) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title=t("page.title"), fill_width=True, analytics_enabled=False) as page:
        build_status_bar()
        chat = ChatTab(services, ConversationStore())
        chat.wire_load(page)
    # Gradio's own default is one event at a time, one student at a time.
    return page.queue(default_concurrency_limit=None, max_size=None, api_open=False)


def mount_page(app: FastAPI, services: Services, root_path: str = "") -> FastAPI:
    """Serve the page at "/" of `app`, after (under) the routes that `app` has already.

    Args:
        root_path: prefix that a proxy in front of us adds, such as "/user/me/proxy/6006".
    """
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
        head=theme.head(instance=secrets.token_hex(4)),
    )
