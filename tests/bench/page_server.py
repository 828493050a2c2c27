"""The page over a chat that stamps its tokens, in a process of its own: what tests.bench.page asks.

    python -m tests.bench.page_server DIR     prints its URL, then a JSON object for each event

A message "COUNT tokens at RATE" gets so many, so many a second, each a word "tINDEX:STAMP" with the
milliseconds of its making (modulo `DAY_MS`); "nothing" gets none until the request is aborted.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from backend.chat import Delta, Message, ReplyStats
from backend.config import SamplingParams
from backend.engine_manager import EngineManager
from backend.history import History
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.services import Services
from backend.target import BUNDLED_MODEL
from tests.e2e.fake_chat import FakeChat, serve

DAY_MS = 100_000_000
# What a reply is made of besides words; each piece stands in place of a token, by its index.
SHAPES = {
    60: "\n\n### A heading\n\n", 90: "\n\n- a list\n- with **bold**\n- and `code`\n\n",
    150: "\n\n```python\nfor i in range(10):\n    print(i)  # ", 190: "\n```\n\n",
    230: " \\(e^{i\\pi} + 1 = 0\\) ", 260: "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    299: "\n\n",
}


def say(event: str, message: str) -> None:
    print(json.dumps({"event": event, "message": message, "at": time.time()}), flush=True)


def words(index: int) -> str:
    """Token `index` of a reply."""
    shape = SHAPES.get(index % 300, "")
    return f"{shape}t{index}:{int(time.time() * 1000) % DAY_MS:08d} "


class StampedChat(FakeChat):
    """Tokens at the asked speed, whatever the page does with them; a context without end."""

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        return 0

    async def stream(
        self, messages: Sequence[Message], sampling: SamplingParams, *,
        stop: Sequence[str] = (), model: str | None = None, owner: str = "",
    ) -> AsyncGenerator[Delta, None]:
        user = messages[-1]["content"]
        say("asked", user)
        found = re.match(r"(\d+) tokens at (\d+)", user)
        count, rate = map(int, found.groups()) if found else (0, 1)
        began = time.monotonic()
        try:
            for index in range(count):
                await asyncio.sleep(began + index / rate - time.monotonic())
                if index == 0:
                    say("first", user)
                yield Delta(words(index))
            if not found:
                await asyncio.Event().wait()
            yield Delta(finish_reason="stop", stats=ReplyStats(10, count, 0, 0.0, rate))
        finally:
            say("closed", user)


def main() -> None:
    folder = Path(sys.argv[1])
    services = Services(
        StampedChat(), engines=EngineManager(None), jobs=JobStore(folder / "jobs"),
        library=ModelLibrary(BUNDLED_MODEL), history=History(folder / "chats.sqlite"))
    with serve(services) as url:
        print(url, flush=True)
        sys.stdin.read()  # until the benchmark is over


if __name__ == "__main__":
    main()
