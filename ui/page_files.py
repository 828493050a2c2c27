"""What a browser gets when it opens the page, sent with less work and fewer bytes.

Gradio reads and compresses each of the page's seventy files anew for every browser that asks, 2 to
8 ms each; the page itself, half a megabyte, it sends uncompressed. See docs/desk-performance.md.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ASSET = re.compile("/assets/[^/]+")  # in one folder; the names have a hash of what is in them
PAGES = ("/", "/config")
ENCODINGS = ("br", "gzip")  # those that Gradio knows, the better one first


class PageFiles:
    """ASGI middleware: keeps Gradio's assets as they were first sent, and compresses the page.

    It answers whoever asks, so it stands behind what lets people in.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.page = GZipMiddleware(app, compresslevel=4)
        self.kept: dict[tuple[str, str], list[Message]] = {}  # (path, encoding) -> the response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope) if scope["type"] == "http" else ""
        if path in PAGES:
            await self.page(scope, receive, send)
        elif ASSET.fullmatch(path) and scope["method"] == "GET":
            await self._asset(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _asset(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        accepted = headers.get("accept-encoding", "")
        key = path, next((name for name in ENCODINGS if name in accepted), "")
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                MutableHeaders(scope=message)["cache-control"] = (
                    "private, max-age=31536000, immutable")
            sent.append(message)
            await send(message)

        if key in self.kept:
            for message in self.kept[key]:
                await send(message)
            return
        await self.app(scope, receive, keep)
        whole = sent and sent[0].get("status") == 200 and not sent[-1].get("more_body")
        if whole:  # not a part of it, nor that the browser has it already
            self.kept[key] = sent
