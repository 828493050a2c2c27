"""One reply of the model, timed for the metrics and counted by its ticket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from backend.admission import Ticket
from backend.classroom import counted
from backend.config import SamplingParams
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
    owner: str,
    skip_special_tokens: bool,
    continues: bool = False,
) -> AsyncGenerator[Delta, None]:
    """`ChatService.stream_ids`, as one of the replies of `ticket`."""
    started = last = metrics.clock()
    waiting = True
    stream = chat.stream_ids(
        prompt, sampling, stop=stop, owner=owner, skip_special_tokens=skip_special_tokens,
        continues=continues)
    async with aclosing(counted(stream, ticket, len(prompt))) as deltas:
        async for delta in deltas:
            now = metrics.clock()
            if waiting:
                waiting = False
                metrics.first_token.observe(now - started)
            else:
                metrics.between.observe(now - last)
            last = now
            yield delta
    metrics.whole.observe(last - started)
