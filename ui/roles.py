"""What a student may call: handlers and routes of Gradio's, which are open to all whom the guard
lets in.

Hiding a tab protects nothing, for its handlers are HTTP endpoints. So in a class everything is the
host's, unless it is wired inside `Page.open_to_students` or named here; what is added tomorrow is
guarded without knowing of it. A tab that is for both keeps parts of it back in `only_for_hosts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.context import Context
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from backend.classroom import Caller, HostOnlyError, Role, caller_of, require_host
from ui.i18n import locale_of, t

# Of Gradio's routes, what a student's browser needs: the page, its files, its events.
STUDENT_ROUTES = frozenset((
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt",
    "/gradio_api/startup-events", "/gradio_api/queue/join", "/gradio_api/queue/data",
    "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/run/predict"))
STUDENT_FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")

# What every page sends, whoever opens it: for students these do nothing, instead of complaining.
UNASKED = frozenset(("load", "unload"))


def caller(request: gr.Request) -> Caller:
    """Who sent an event."""
    return caller_of(request.request.scope)


class Page(gr.Blocks):
    """gr.Blocks whose events a student may call only if they were wired in `open_to_students`.

    Attributes:
        routes: path -> endpoint of what the page asks for otherwise, by GET; students may, too.
    """

    def __init__(self, **options: Any) -> None:
        self.student_events: set[int] = set()
        self.host_events: set[int] = set()  # of them, what is kept back
        self.routes: dict[str, Callable[..., Any]] = {}
        super().__init__(**options)

    @contextmanager
    def open_to_students(self) -> Iterator[None]:
        """What is wired inside is for students, too."""
        before = set(self.fns)
        yield
        self.student_events |= set(self.fns) - before - self.host_events

    async def process_api(
        self, block_fn: Any, inputs: Any, state: Any = None, request: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Gradio's one way to a handler, whatever the route was and whatever step of it it is."""
        if block_fn._id not in self.student_events:
            try:
                require_host(caller(request))
            except HostOnlyError as error:
                if not UNASKED.isdisjoint(trigger for _, trigger in block_fn.targets):
                    nothing = [gr.skip() for _ in block_fn.outputs]
                    return {"data": nothing, "is_generating": False, "iterator": None}
                raise gr.Error(t("error.code.host_only", locale_of(request)),
                               print_exception=False) from error
        return await super().process_api(block_fn, inputs, state, request, **options)


@contextmanager
def only_for_hosts() -> Iterator[None]:
    """What is wired inside stays the host's, though the rest of its tab is open to students."""
    page = Context.root_block
    before = set(page.fns) if isinstance(page, Page) else set()
    yield
    if isinstance(page, Page):
        page.host_events |= set(page.fns) - before


class StudentRoutes:
    """ASGI middleware of Gradio's application: students get no route of it that is not theirs.

    Others take uploads, hand out files that events have made for somebody, fetch URLs, or tell of
    the server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and caller_of(scope).role is Role.STUDENT:
            path = get_route_path(scope)
            if path not in STUDENT_ROUTES and not path.startswith(STUDENT_FOLDERS):
                sentence = t("error.code.host_only", locale_of(Request(scope)))
                app = JSONResponse({"detail": sentence}, HostOnlyError.status)
        await app(scope, receive, send)
