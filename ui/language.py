"""The language that somebody chose on the page, before Gradio asks the browser for one."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from typing import Any

from ui.i18n import LANGUAGE_COOKIE, catalogs

# Gradio runs the page's own script too late for that. The language is one of ours, so it needs no
# quoting.
SCRIPT = """<head><script>
Object.defineProperty(navigator, "language", {{ get: () => "{0}" }});
Object.defineProperty(navigator, "languages", {{ get: () => ["{0}"] }});
</script>"""


class ChosenLanguage:
    """ASGI middleware that makes the chosen language that of the browser, on the page."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        chosen = _chosen(headers.get(b"cookie", b"").decode("latin-1"))
        if (scope["type"] != "http" or scope["method"] != "GET" or chosen is None
                or b"text/html" not in headers.get(b"accept", b"")):
            await self.app(scope, receive, send)
            return
        plain = [header for header in scope["headers"] if header[0] != b"accept-encoding"]
        start: dict[str, Any] = {}
        body = bytearray()

        async def changed(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            page = bytes(body).replace(b"<head>", SCRIPT.format(chosen).encode(), 1)
            kept = [h for h in start.get("headers", ()) if h[0].lower() != b"content-length"]
            await send({**start, "headers": [
                *kept, (b"content-length", str(len(page)).encode())]})
            await send({"type": "http.response.body", "body": page})

        await self.app({**scope, "headers": plain}, receive, changed)


def _chosen(cookies: str) -> str | None:
    try:
        value = SimpleCookie(cookies).get(LANGUAGE_COOKIE)
    except CookieError:
        return None
    return value.value if value and value.value in catalogs() else None
