"""A scripted ChatBackend, and a server that shows the real page over it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from backend.chat import Delta, Message, ReplyStats, ServiceStatus
from backend.config import SamplingParams, ServerConfig
from backend.engine.types import EngineStats, ModelInfo
from backend.errors import UserError
from backend.memory import MemoryStatus, memory_parts
from backend.server.api import base_app
from backend.server.listen import invitation
from backend.services import Services
from ui.build import mount_page

GB = 1 << 30
PARTS = memory_parts(
    5 * GB, used=6 * GB, total=16 * GB, weights=2 * GB, kv_cache=2 * GB, kv_used=GB // 2)
INFO = ModelInfo(
    "LlamaForCausalLM", "cpu", "float32", 8000, 200, 8, 100, 64, 32, "", 12_000_000, 4096, 1
)


@dataclass
class Script:
    """What the model does with one message."""

    pieces: list[str]
    hold_at: int | None = None  # before this piece, wait for `go`
    go: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None  # raised after the pieces
    finish: str = "stop"


class FakeChat:
    """Answers from `scripts` by the last message, else with an echo; remembers calls."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.seen: list[list[Message]] = []
        self.sampling: list[SamplingParams] = []
        self.models_asked: list[str | None] = []
        self.aborted: list[str] = []
        self.ended: list[str] = []
        self.state = "ready"

    async def models(self) -> list[str]:
        return ["fake-model"]

    async def status(self) -> ServiceStatus:
        return ServiceStatus(
            self.state, "fake-model", "", INFO, EngineStats(num_running=1, num_blocks_free=75),
            MemoryStatus(6 * GB, 16 * GB, 500 << 20, 12_000_000, 26_214_400, PARTS))

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(message["content"].split()) + 4 for message in messages)

    async def stream(
        self, messages: Sequence[Message], sampling: SamplingParams, *,
        stop: Sequence[str] = (), model: str | None = None, owner: str = "",
    ) -> AsyncGenerator[Delta, None]:
        user = messages[-1]["content"]
        self.seen.append(list(messages))
        self.sampling.append(sampling)
        self.models_asked.append(model)
        script = self.scripts.get(user) or Script([f"You said **{user}**, ", "and that is all."])
        stats = ReplyStats(await self.count_tokens(messages), len(script.pieces), 0, 0.12, 34.5)
        finished = False
        try:
            for number, piece in enumerate(script.pieces):
                while number == script.hold_at and not script.go.is_set():
                    await asyncio.sleep(0.01)
                yield Delta(piece)
                await asyncio.sleep(0)
            finished = True
            if script.error:
                raise script.error
            yield Delta(finish_reason=script.finish, stats=stats)
        finally:
            if not finished:
                self.aborted.append(user)
            self.ended.append(user)


@contextmanager
def serve(services: Services, prefix: str = "", **keys: tuple[str, ...]) -> Iterator[str]:
    """The page over `services` on a free port of this machine; yields its URL.

    With a `prefix` it can be reached under that too, as through a proxy that takes it off.

    Args:
        keys: of ServerConfig's, where not everybody may come in.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServerConfig(server_port=port, **keys)
    services.invitation = invitation(config)
    app = base_app(services.chat, config, services.classroom, lambda: "")
    mount_page(app, services, prefix)

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if prefix and scope.get("path", "").startswith(prefix):
            scope = {**scope, "path": scope["path"].removeprefix(prefix)}
        await app(scope, receive, send)

    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await services.__aenter__()
            await super().startup(sockets)
            ready.set()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            await services.stop()

    server = Server(uvicorn.Config(proxy, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    if not ready.wait(60):
        raise UserError("The test server did not start.")
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(30)
