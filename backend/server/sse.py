"""Streams to clients: server-sent events, and the end of the work when the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from backend.server.failures import ClientGoneError

T = TypeVar("T")

STALL_SECONDS = 30.0
DONE = b"data: [DONE]\n\n"


def line(data: dict[str, Any]) -> bytes:
    """`data` as a line of JSON.

    ASCII only: many clients split lines as Python's `str.splitlines` does, at U+2028 and others
    that are no line ends in this protocol.
    """
    return json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n"


def event(data: dict[str, Any]) -> bytes:
    """`data` as one server-sent event."""
    return b"data: " + line(data) + b"\n"


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection. Belongs after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled (and waited for) if the client goes first.

    Raises:
        ClientGoneError: it went.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def interleave(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """(index of the stream, item) of all `streams` as they come; the first error ends all.

    Every stream is closed when this generator is.
    """
    if len(streams) == 1:  # the usual case, without a task and a queue in between
        async with aclosing(streams[0]):
            async for item in streams[0]:
                yield 0, item
        return
    # One slot: who reads slowly holds the streams back, instead of gathering their items here.
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((index, item))
        except Exception as error:  # not for this task: who reads the items raises it
            await items.put(error)
        else:
            await items.put(None)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            received = await items.get()
            if received is None:
                running -= 1
            elif isinstance(received, Exception):
                raise received
            else:
                yield received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends `first`, then `events`, and closes `resources` whatever happens.

    Nothing is buffered here: `send` waits while the client does not read, and after
    `stall_seconds` of that the request is aborted. A client that goes away ends it at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        resources: AsyncExitStack,
        stall_seconds: float = STALL_SECONDS,
        media_type: str | None = None,
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._resources = resources
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            try:
                await until_gone(receive, self._send_all(send))
            except (ClientGoneError, TimeoutError):
                pass  # leaving closes `resources`, and the server the connection

    async def _send_all(self, send: Send) -> None:
        async def deliver(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self._stall_seconds):
                await send(message)

        await deliver(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await deliver({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in self._events:
            await deliver({"type": "http.response.body", "body": chunk, "more_body": True})
            # With tokens queued up and room in the socket nothing above would ever wait: others
            # must get their turn, and a disconnect be seen.
            await asyncio.sleep(0)
        await deliver({"type": "http.response.body", "body": b"", "more_body": False})


