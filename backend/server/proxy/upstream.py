"""How the proxy talks to a node: bounded, without redirects, with the node's own key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

import httpx2

from backend.errors import RemoteError, UserError
from backend.remote import RemoteChat
from backend.remote_http import CONNECT_SECONDS, EVENT_ENDS, bounded_client

MAX_ANSWER_BYTES = 16 << 20  # of an answer that is no stream: log-probabilities are long
CHECK_SECONDS = 10.0
SILENT_SECONDS = 300.0  # a node may have a queue; whether it lives at all is checked beside this
WHOLE_SECONDS = 1800.0  # an answer that is no stream shows nothing before it is finished

# All that goes back to a client. Cookies, server names and what concerns one connection stay here.
PASSED_ON = ("content-type", "retry-after")


class NodeError(RemoteError):
    """A node did not answer, or not as an api_server does."""


class NodeLostError(NodeError):
    """A node cannot be reached, or hung up: no request would fare better. Any other failure may
    be this request's own doing, and says nothing about the next."""


@dataclass
class Answer:
    """What a node answered. A stream has `chunks`, the first of which is `body`; anything else is
    whole."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunks: AsyncGenerator[bytes, None] | None = None


class Upstream:
    """One node's connections.

    Args:
        url: normalised.
        api_key: the node's; "" takes the key file of a server of ours on this machine.
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url
        self._remote = RemoteChat(url, api_key)
        self._http = bounded_client(url, self._remote.key, MAX_ANSWER_BYTES)

    async def check(self) -> list[str]:
        """Models that the node can answer with now.

        Raises:
            UserError: it cannot; says why.
        """
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                names = await self._remote.ready_models()
        except TimeoutError:
            raise NodeError(f"{self.url} does not answer within {CHECK_SECONDS:.0f} seconds."
                            ) from None
        if not names:
            raise NodeError(f"{self.url} serves no model.")
        return names

    async def post(self, path: str, body: bytes, stream: bool, stack: AsyncExitStack) -> Answer:
        """Send a request. What must be closed after a stream is left to `stack`.

        Raises:
            NodeError: no answer, or none that an api_server gives.
        """
        seconds = SILENT_SECONDS if stream else WHOLE_SECONDS
        request = self._http.build_request(
            "POST", self.url + path, content=body,
            headers={"Content-Type": "application/json",
                     "Accept": ", ".join(EVENT_ENDS) if stream else "application/json"},
            timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS))
        try:
            reply = await self._http.send(request, stream=True)
            stack.push_async_callback(reply.aclose)
            kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
            headers = {name: reply.headers[name] for name in PASSED_ON if name in reply.headers}
            if reply.status_code == 200 and stream and kind in EVENT_ENDS:
                chunks = await stack.enter_async_context(aclosing(self._chunks(reply)))
                return Answer(200, headers, await anext(chunks), chunks)
            if kind != "application/json" or 300 <= reply.status_code < 400:
                raise NodeError(f"{self.url} answers as no api_server does.")
            return Answer(reply.status_code, headers, await reply.aread())
        except StopAsyncIteration:
            raise NodeError(f"{self.url} ended the reply before it began.") from None
        except (httpx2.HTTPError, UserError) as error:
            raise self._failure(error) from error

    async def _chunks(self, reply: httpx2.Response) -> AsyncGenerator[bytes, None]:
        """The body as it comes."""
        try:
            async for chunk in reply.aiter_raw():
                if chunk:
                    yield chunk
        except (httpx2.HTTPError, UserError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> NodeError:
        if isinstance(error, NodeError):
            return error
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return NodeLostError(f"Nothing answers at {self.url}.")
        if isinstance(error, httpx2.TimeoutException):
            return NodeError(f"{self.url} has gone silent.")
        if isinstance(error, UserError):
            return NodeError(f"{self.url}: {error.message}")
        return NodeLostError(f"The connection to {self.url} was lost.")
