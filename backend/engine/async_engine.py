"""The engine as the web process sees it: asyncio streams over a pipe, and a restart when it dies.

Conversations live on this side as token lists; the engine's KV is only a cache. So a dead engine
costs its open requests (each ends in `EngineDeadError`) and a prefill, never a conversation.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

from backend.config import EngineConfig
from backend.engine import messages
from backend.engine.launcher import Handle, ProcessHandle
from backend.engine.types import EngineStats, ModelInfo, Request, StepOutput
from backend.errors import EngineDeadError, EngineNotReadyError, UserError

log = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # after so many deaths within the window: give up
DEATH_WINDOW_S = 600.0


class AsyncEngine:
    """One served model. All methods belong to the event loop that called `start`.

    Args:
        config: what to load.
        launch: starts an engine; a process of its own by default.
        clock: seconds, monotonic.
        stall_limit_s: with requests open, so long without a step means that the engine hangs.
    """

    def __init__(
        self,
        config: EngineConfig,
        launch: Callable[[], Handle] = ProcessHandle,
        *,
        clock: Callable[[], float] = time.monotonic,
        stall_limit_s: float = 30.0,
    ) -> None:
        self.config = config
        self.state: Literal["loading", "ready", "restarting", "failed"] = "loading"
        self.detail = "The model is being loaded."
        self.info: ModelInfo | None = None
        self.stats: EngineStats | None = None
        self.epoch = 0
        self._launch = launch
        self._clock = clock
        self._stall_limit_s = stall_limit_s
        self._handle: Handle | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[StepOutput | UserError]] = {}
        self._abort_unanswered = False
        self._last_step = 0.0
        self._longest_step_s = 0.0
        self._deaths: deque[float] = deque(maxlen=len(RESTART_DELAYS_S))
        self._settled = asyncio.Event()  # ready or failed
        self._stopping = False
        self._restart: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._handle.pid if self._handle else None

    async def start(self) -> None:
        """Start the engine; returns at once, `wait_ready` waits."""
        self._loop = asyncio.get_running_loop()
        self._begin()

    async def wait_ready(self) -> ModelInfo:
        """Wait until the model is loaded.

        Raises:
            UserError: it cannot be loaded; says why.
        """
        await self._settled.wait()
        if self.state == "failed" or self.info is None:
            raise UserError(self.detail)
        return self.info

    @property
    def num_open(self) -> int:
        """Requests that wait for more of their reply."""
        return len(self._streams)

    async def stop(self, reason: str = "The engine was stopped.") -> None:
        """End the engine; open requests end in an error, and new ones are refused.

        Args:
            reason: the error's sentence.
        """
        self._stopping = True
        self.state, self.detail = "failed", reason
        self._settled.set()
        if self._restart:
            self._restart.cancel()
        self._fail_streams(EngineDeadError(reason, "Send the request again when a model is ready."))
        if self._handle is not None:
            self._send(messages.Shutdown())
            handle = self._handle
            if not await asyncio.to_thread(handle.wait, 5.0):
                handle.kill()
            self._outbox.put(None)

    def require_ready(self) -> ModelInfo:
        """What is served.

        Raises:
            EngineNotReadyError: nothing yet, or not at the moment.
        """
        if self.state != "ready" or self.info is None:
            # What has failed stays so.
            hint = "Start the server again." if self.state == "failed" else "Try again in a moment."
            raise EngineNotReadyError(self.detail, hint)
        return self.info

    def healthy(self) -> bool:
        """True while ready and idle, or while steps progress. Who has gone away is still waited
        for: an engine that hangs is no better once its clients have given up."""
        if self.state != "ready":
            return False
        if not self._streams and not self._abort_unanswered:
            return True
        limit = self._stall_limit_s + 3 * self._longest_step_s
        return self._clock() - self._last_step < limit

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Outputs of a request until its last one. Closing the generator aborts the request.

        Raises:
            EngineNotReadyError: the model is not loaded.
            EngineDeadError: the engine died meanwhile.
        """
        self.require_ready()
        stream: asyncio.Queue[StepOutput | UserError] = asyncio.Queue()
        if not self._streams and not self._abort_unanswered:
            self._last_step = self._clock()
        self._streams[request.request_id] = stream
        self._send(messages.AddRequest(request))
        try:
            while True:
                item = await stream.get()
                if isinstance(item, UserError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            # Still listed: it was not the engine that ended it.
            if self._streams.pop(request.request_id, None) is not None:
                self._abort_unanswered = True
                self._send(messages.AbortRequest(request.request_id))

    def _begin(self) -> None:
        """Launch an engine of the next epoch and the two threads that serve its pipe."""
        self.epoch += 1
        self._handle = self._launch()
        self._outbox = queue.SimpleQueue()
        connection, epoch = self._handle.connection, self.epoch
        for work, args in ((self._read, (connection, epoch)), (_write, (connection, self._outbox))):
            threading.Thread(target=work, args=args, name="engine-pipe", daemon=True).start()
        self._send(messages.Start(epoch, self.config))

    def _send(self, command: messages.Command) -> None:
        """By a thread, because a pipe's writer waits while a busy engine does not read."""
        self._outbox.put(messages.encode(command))

    def _read(self, connection: Connection, epoch: int) -> None:
        """Thread: hand every event to the loop, then tell of the engine's end."""
        try:
            while True:
                self._tell(self._on_event, messages.decode_event(connection.recv_bytes()))
        except (EOFError, OSError):
            self._tell(self._on_death, epoch)

    def _tell(self, listener: Callable[[Any], None], what: Any) -> None:
        """From a thread: have the loop call `listener`."""
        try:
            self._loop.call_soon_threadsafe(listener, what)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to tell

    def _on_event(self, event: messages.Event) -> None:
        if event.epoch != self.epoch or self._stopping:
            return
        if isinstance(event, messages.Outputs):
            self._on_outputs(event)
        elif isinstance(event, messages.Ready):
            self.info, self.stats, self.state, self.detail = event.info, event.stats, "ready", ""
            self._longest_step_s = 0.0
            self._abort_unanswered = False
            self._settled.set()
        elif self.info is not None:
            # It was loaded before: what is lacking now, such as memory, may come back. The engine
            # ends itself, and `_on_death` counts that.
            log.error("The model cannot be loaded again: %s %s", event.message, event.hint)
        else:
            self.state, self.detail = "failed", f"{event.message} {event.hint}".strip()
            self._settled.set()

    def _on_outputs(self, event: messages.Outputs) -> None:
        now = self._clock()
        self._longest_step_s = max(self._longest_step_s, now - self._last_step)
        self._last_step = now
        self._abort_unanswered = False
        self.stats = event.stats
        for output in event.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # aborted meanwhile
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            stream.put_nowait(output)

    def _fail_streams(self, error: EngineDeadError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put_nowait(error)

    def _on_death(self, epoch: int) -> None:
        if epoch != self.epoch or self._stopping or self.state == "failed":
            return
        assert self._handle is not None
        self._handle.kill()
        self._outbox.put(None)
        self.stats = None
        self._fail_streams(
            EngineDeadError(
                "The engine stopped while it worked on this request.",
                "Send it again; the model is being loaded anew.",
            )
        )
        now = self._clock()
        recent = sum(1 for death in self._deaths if now - death < DEATH_WINDOW_S)
        self._deaths.append(now)
        if recent >= len(RESTART_DELAYS_S):
            self.state = "failed"
            self.detail = (
                f"The engine died {recent + 1} times within "
                f"{DEATH_WINDOW_S / 60:.0f} minutes; see its log."
            )
            self._settled.set()
            return
        log.error("The engine (process %s) died; starting it again.", self._handle.pid)
        self.state, self.detail = "restarting", "The engine died and is being started again."
        self._settled.clear()
        self._restart = self._loop.create_task(self._begin_later(RESTART_DELAYS_S[recent]))

    async def _begin_later(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        try:
            self._begin()
        except OSError:  # no memory or no descriptor for a process: as if it had died at once
            log.exception("The engine's process cannot be started")
            self._on_death(self.epoch)


def _write(connection: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
    """Thread: write what is put into the outbox, until None."""
    while (data := outbox.get()) is not None:
        try:
            connection.send_bytes(data)
        except OSError:
            return  # it died; the reading thread tells
