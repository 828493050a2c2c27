"""How an api_server is reached: its URL as people write it, and a wary HTTP client."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import httpx2

from backend.errors import RemoteError, UserError

MAX_EVENT_BYTES = 1 << 20  # of one event of a stream, and of any other answer
# What ends an event, by the kind of stream: OpenAI's, and LMDeploy's lines of JSON.
EVENT_ENDS = {
    "text/event-stream": (b"\n\n", b"\r\n\r\n", b"\r\r"),
    "application/x-ndjson": (b"\n",),
}
# What the environment has OpenAI's client send besides (keys, organisation) is not for this server.
HEADERS = {"host", "accept", "accept-encoding", "connection", "content-type", "content-length",
           "transfer-encoding", "user-agent"}
CONNECT_SECONDS, IDLE_SECONDS = 5.0, 60.0
HINT = "Write it like http://127.0.0.1:23333."
# Where clouds keep their machines' credentials. 169.254.0.0/16 is refused as a whole.
METADATA = {"metadata.google.internal", "100.100.100.200", "fd00:ec2::254"}

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_PATH = re.compile(r"(/[\w.~-]+)*")


def normalise_url(text: str) -> str:
    """`scheme://host[:port][/prefix]`, without a final /v1.

    "127.0.0.1:23333" gets http://. A target of 0.0.0.0, as the tutorials write it, becomes this
    machine's loopback address.

    Raises:
        UserError: not such a URL; or an address that is no server's.
    """
    text = text.strip()
    if "@" in text:  # before all else: no other error may repeat the password
        raise UserError("The URL must not have a user name or password in it.",
                        "Give the API key in its own field.", field="url")
    if not text or not text.isascii() or not text.isprintable() or re.search(r"[\s\\%]", text):
        raise _nonsense(text)
    try:
        parts = urlsplit(text if "://" in text else "http://" + text)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:  # a port that is none, brackets that do not match
        raise _nonsense(text) from None
    if parts.scheme not in ("http", "https"):
        raise UserError(f"The URL {text!r:.200} must begin with http:// or https://.", HINT,
                        field="url")
    path = re.sub(r"(/v1)?/*$", "", parts.path)
    if parts.query or parts.fragment or port == 0 or not _PATH.fullmatch(path) or ".." in path:
        raise _nonsense(text)
    host = _checked_host(host, text)
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "") + path


def is_loopback_url(url: str) -> bool:
    """Whether a normalised URL leads to this very machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bounded_client(
    url: str, key: Callable[[], str | None], max_bytes: int = MAX_EVENT_BYTES
) -> httpx2.AsyncClient:
    """A client for the server at a normalised URL, which sends what `key` returns, and no other
    credentials. It keeps no connections, so that it may be dropped without closing it. Answers
    over `max_bytes` raise RemoteError, as events over `MAX_EVENT_BYTES` do."""
    async def authorize(request: httpx2.Request) -> None:
        for name in request.headers.keys() - HEADERS:
            del request.headers[name]
        if (value := key()) is not None:
            request.headers["Authorization"] = f"Bearer {value}"

    async def bound(response: httpx2.Response) -> None:
        _bound(response, max_bytes)

    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(IDLE_SECONDS, connect=CONNECT_SECONDS),
        follow_redirects=False,
        trust_env=False,  # a proxy would break servers on this machine
        verify=url.startswith("https:"),  # reading the certificates takes a while
        limits=httpx2.Limits(max_keepalive_connections=0),
        headers={"Accept-Encoding": "identity"},  # 1 MiB of gzip may be 1 GiB
        event_hooks={"request": [authorize], "response": [bound]},
    )


class _BoundedStream(httpx2.AsyncByteStream):
    """Refuses more than `limit` bytes without one of `ends`, which end an event.

    Where there are none, in answers that are no streams, it bounds the whole.
    """

    def __init__(
        self, inner: httpx2.AsyncByteStream, ends: tuple[bytes, ...], limit: int
    ) -> None:
        self._inner, self._ends, self._limit = inner, ends, limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pending, tail = 0, b""
        async for chunk in self._inner:
            seen = tail + chunk  # a blank line may lie across chunks
            ends = [at for mark in self._ends if (at := seen.rfind(mark)) >= 0]
            pending += len(chunk)
            if ends:
                pending = len(seen) - max(ends)
            if pending > self._limit:
                raise RemoteError("The api_server sent too much at once.", "Check the URL.")
            tail = seen[-3:]
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()


def _bound(response: httpx2.Response, max_bytes: int) -> None:
    """Called with every answer, before its body is read."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RemoteError("The api_server sent a compressed answer, which it was told not to.")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Only replies are read piece by piece; all else is held in memory as a whole.
    is_reply = response.request.method == "POST" and response.status_code == 200
    ends = EVENT_ENDS.get(kind, ()) if is_reply else ()
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    limit = MAX_EVENT_BYTES if ends else max_bytes
    response.stream = _BoundedStream(response.stream, ends, limit)


def _checked_host(host: str, text: str) -> str:
    try:
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
    except ValueError:
        address = None
    if address is None:
        if not _NAME.fullmatch(host) or _is_odd_address(host):
            raise _nonsense(text)
        refused = host.rstrip(".") in METADATA
    else:
        if address.is_unspecified:  # it means "here", and not every system connects to it
            return "127.0.0.1" if address.version == 4 else "[::1]"
        refused = address.is_link_local or address.is_multicast or str(address) in METADATA
        host = f"[{address.compressed}]" if address.version == 6 else str(address)
    if refused:
        raise UserError(f"{host} is not an address of an api_server.",
                        "Link-local and metadata addresses are never contacted.", field="url")
    return host


def _is_odd_address(host: str) -> bool:
    """Whether a resolver takes the name for an address: 2852039166, 0x7f.1, 127.1."""
    try:
        socket.inet_aton(host.rstrip("."))
    except OSError:
        return False
    return True


def _nonsense(text: str) -> UserError:
    return UserError(f"{text!r:.200} is not the URL of a server.", HINT, field="url")
