"""A reply while it is being written: a task that collects deltas, looked at by the page.

The page looks ten times a second however fast tokens come, because drawing costs the browser more
than decoding costs the engine; and Stop only has to cancel the task, wherever the reply is (in the
queue, in prefill, in the middle of a word).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from backend.chat import Delta, ReplyStats


class LiveReply:
    """Collects a reply from now on; must be made inside a running event loop.

    Args:
        deltas: of the reply; see `Classroom.reply`. Closed when it ends here.
        begun: text that it goes on from.

    Attributes:
        text: `begun`, and what has come so far.
        finish_reason, stats: of the last delta, None until then and after a stop.
        started: by time.monotonic().
        stopped: someone pressed Stop, or nobody looked any more.
    """

    def __init__(self, deltas: AsyncGenerator[Delta, None], begun: str = "") -> None:
        self.begun = self.text = begun
        self.finish_reason: str | None = None
        self.stats: ReplyStats | None = None
        self.stopped = False
        self.started = time.monotonic()
        self._first = self._last = self.started  # when text came
        self._num_tokens = 0
        self._begun = asyncio.Event()  # there is text, or there never will be
        self._task = asyncio.create_task(self._collect(deltas))
        self._task.add_done_callback(lambda _: self._begun.set())

    async def _collect(self, deltas: AsyncGenerator[Delta, None]) -> None:
        # aclosing: a cancelled task must abort the engine's work now, not at garbage collection.
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.text:
                    self._last = time.monotonic()
                    self._first = self._first if self._num_tokens else self._last
                    # A server that tells no counts sends about a token a piece.
                    self._num_tokens = delta.num_tokens or self._num_tokens + 1
                    self.text += delta.text
                    self._begun.set()
                if delta.finish_reason:
                    self.finish_reason, self.stats = delta.finish_reason, delta.stats

    @property
    def so_far(self) -> ReplyStats | None:
        """`stats`; until then, and after a stop, what can be told of the text that has come. The
        prompt's tokens are 0 then; None before the first piece."""
        if self.stats is not None or not self._num_tokens:
            return self.stats
        stats = ReplyStats(0, self._num_tokens, ttft_s=self._first - self.started)
        if self._num_tokens > 1 and self._last > self._first:
            stats.tokens_per_s = (self._num_tokens - 1) / (self._last - self._first)
        return stats

    @property
    def done(self) -> bool:
        return self._task.done()

    def stop(self) -> None:
        """End the reply here; what has come is kept."""
        if not self.done:
            self.stopped = True
            self._task.cancel()

    async def wait(self, seconds: float | None = None) -> None:
        """Return when the reply is finished, at the latest after `seconds`, if any."""
        await asyncio.wait({self._task}, timeout=seconds)

    async def wait_begun(self, seconds: float) -> None:
        """Return when there is text, or never will be; at the latest after `seconds`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._begun.wait(), seconds)

    def error(self) -> BaseException | None:
        """What ended the reply early; None if nothing did, or a stop. Only when `done`."""
        return None if self._task.cancelled() else self._task.exception()
