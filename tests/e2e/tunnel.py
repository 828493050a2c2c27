"""A tunnel to a server on this machine, as `ssh -L` makes one, that can be cut."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Tunnel:
    """Passes bytes between a port of its own and the server's; lives in a thread of its own."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._idle = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        both = {writer, to_server}
        self._open |= both
        await asyncio.gather(self._pass(reader, to_server), self._pass(there, writer))
        self._open -= both
        if not self._open:
            self._idle.set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _cut(self) -> None:
        while self._open:
            self._idle.clear()
            for writer in list(self._open):
                writer.transport.abort()
            await self._idle.wait()

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        self._call(self._cut())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)


@contextmanager
def tunnel_to(url: str) -> Iterator[Tunnel]:
    tunnel = Tunnel(url)
    try:
        yield tunnel
    finally:
        tunnel.close()
