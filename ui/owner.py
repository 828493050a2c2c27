"""Whose chats a browser may see: its person's in a class, else those of the random secret that it
holds as a cookie."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Any

import gradio as gr

from ui.roles import caller

SECONDS = 400 * 24 * 3600  # the longest that browsers keep a cookie


def cookie_name(instance: str) -> str:
    """The cookie's name. Servers behind tunnels share an origin, their `instance` differs."""
    return f"lmdesk_owner_{instance}"


def owner_of(request: gr.Request, instance: str, chat_id: str) -> str:
    """The owner's name in the history, by a digest: whoever reads that file gets no cookie.

    A browser that takes no cookies owns the one chat that its tab knows the random id of.
    """
    person = caller(request)
    if person.name:  # logged in to a class
        return f"person:{person.id}"
    secret = request.cookies.get(cookie_name(instance), "")
    kind, secret = ("browser", secret) if _is_secret(secret) else ("tab", chat_id or "")
    return f"{kind}:{hashlib.sha256(secret.encode()).hexdigest()}"


class OwnerCookie:
    """ASGI middleware that gives a browser its secret with the first page that it gets."""

    def __init__(self, app: Any, instance: str) -> None:
        self.app = app
        self.name = cookie_name(instance)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if (scope["type"] != "http" or scope["method"] != "GET"
                or b"text/html" not in headers.get(b"accept", b"")
                or f"{self.name}=".encode() in headers.get(b"cookie", b"")):
            await self.app(scope, receive, send)
            return

        async def with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                secure = "; Secure" if scope["scheme"] == "https" else ""
                cookie = (f"{self.name}={secrets.token_hex(16)}; Max-Age={SECONDS}; Path=/; "
                          f"HttpOnly; SameSite=Lax{secure}")
                message = {**message, "headers": [
                    *message.get("headers", ()), (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, with_cookie)


def _is_secret(value: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", value) is not None
