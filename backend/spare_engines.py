"""Engines beside the served one, for a while: those of a comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from backend.chat import ChatService
from backend.config import SamplingParams
from backend.engine.launcher import Handle, ProcessHandle
from backend.engine_manager import LoadRequest, open_chat

IDLE_S = 120.0  # they stay so long with nothing to do
WARM_UP = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


class SpareEngines:
    """Ready engines by what was asked to be loaded. Belongs to one event loop.

    Args:
        launch: starts an engine.
        sleep: waits for seconds; tests give their own.
    """

    def __init__(
        self,
        launch: Callable[[], Handle] = ProcessHandle,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._launch = launch
        self._sleep = sleep
        self._open: list[tuple[LoadRequest, ChatService]] = []
        self._idle: asyncio.Task[None] | None = None

    @property
    def loads(self) -> list[LoadRequest]:
        """Of the engines that are there, or on their way."""
        return [load for load, _ in self._open]

    def get(self, load: LoadRequest) -> ChatService | None:
        """The engine of a model, if it is there."""
        return next((service for known, service in self._open if known == load), None)

    async def open(self, load: LoadRequest) -> None:
        """Start a model's engine, and return when it is ready.

        Raises:
            UserError: it cannot be loaded; says why.
        """
        service = await asyncio.to_thread(open_chat, load, self._launch)
        self._open.append((load, service))
        await service.engine.start()
        await service.engine.wait_ready()
        # The first steps of an engine are slow, and no figures are to have them.
        hello = service.stream([{"role": "user", "content": "Hello"}], WARM_UP)
        async with aclosing(hello):
            async for _ in hello:
                pass

    async def keep_only(self, loads: Sequence[LoadRequest]) -> None:
        """End the engines of all others, and those that are not ready."""
        self.in_use()
        kept = [(load, s) for load, s in self._open if load in loads and s.engine.state == "ready"]
        ended = [s for _, s in self._open if all(s is not other for _, other in kept)]
        self._open = kept
        for service in ended:
            await service.engine.stop("The comparison is over.")
            service.template.close()

    def in_use(self) -> None:
        """They have something to do."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def idle(self) -> None:
        """They have nothing to do: after a while all end."""
        if self._open and self._idle is None:
            self._idle = asyncio.create_task(self._close_later())

    async def _close_later(self) -> None:
        await self._sleep(IDLE_S)
        self._idle = None  # this task, which is not to end itself
        await self.keep_only([])
