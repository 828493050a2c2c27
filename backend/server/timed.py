"""One reply of the model, timed for the metrics and counted by its ticket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from backend.config import SamplingParams
from backend.server.limits import Ticket
from backend.server.metrics import Metrics

if TYPE_CHECKING:
    from backend.chat import ChatService, Delta


async def timed_reply(
    chat: ChatService,
    metrics: Metrics,
    ticket: Ticket,
    prompt: list[int],
    sampling: SamplingParams,
    *,
    stop: Sequence[str],
    salt: str,
    skip_special_tokens: bool,
) -> AsyncGenerator[Delta, None]:
    """`ChatService.stream_ids`; `salt` keeps one caller's prefixes from another's."""
    started = last = metrics.clock()
    waiting = True
    stream = chat.stream_ids(
        prompt, sampling, stop=stop, cache_salt=salt, skip_special_tokens=skip_special_tokens)
    async with aclosing(stream):
        async for delta in stream:
            now = metrics.clock()
            if waiting:
                waiting = False
                ticket.started(len(prompt))
                metrics.first_token.observe(now - started)
            else:
                metrics.between.observe(now - last)
            last = now
            yield delta
    metrics.whole.observe(last - started)
