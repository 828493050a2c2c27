"""Open pages without a browser: what forty browsers say to the page's process, and what it costs.

They speak as the page's scripts do: an event is posted, and the reply's lines are read beside it;
what is wired after the event is posted when it has ended; /api/status is polled every two seconds.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

POLL_S = 2.0


@dataclass
class PageSession:
    """One open page; `updates` are the times of what it was sent."""

    http: httpx.AsyncClient
    config: dict[str, Any]
    updates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hash = secrets.token_hex(6)
        self.values = {c["id"]: c["props"].get("value") for c in self.config["components"]}
        self.chat_id = secrets.token_hex(16)
        self.values[self.component("conversation-id")] = self.chat_id

    def component(self, elem_id: str) -> int:
        return next(c["id"] for c in self.config["components"]
                    if c["props"].get("elem_id") == elem_id)

    async def ask(self, message: str) -> None:
        """Type a message, press Enter, and read until the reply has ended."""
        box = self.component("message")
        self.values[box] = message
        events = self.config["dependencies"]
        submit = next(e for e in events if [box, "submit"] in e["targets"])
        await asyncio.gather(self._run(submit), self._read_reply())

    async def _read_reply(self) -> None:
        where = f"/page/reply/{self.chat_id}?wait=true"
        async with self.http.stream("GET", where) as lines:
            async for line in lines.aiter_lines():
                self.updates.append(time.monotonic())
                ended = "ended" in json.loads(line)
        assert ended

    async def _run(self, event: dict[str, Any]) -> None:
        if event["backend_fn"]:
            body = {"fn_index": event["id"], "session_hash": self.hash, "event_data": None,
                    "data": [self.values.get(number) for number in event["inputs"]]}
            answer = await self.http.post("/gradio_api/queue/join", json=body)
            answer.raise_for_status()
            await self._read()
        for following in self.config["dependencies"]:
            if following.get("trigger_after") == event["id"]:
                await self._run(following)

    async def _read(self) -> None:
        where = f"/gradio_api/queue/data?session_hash={self.hash}"
        async with self.http.stream("GET", where) as lines:
            async for line in lines.aiter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                assert message.get("success", True), message
                if message["msg"] == "close_stream":
                    return

    async def poll(self) -> None:
        """The status bar's questions."""
        while True:
            (await self.http.get("/api/status")).raise_for_status()
            await asyncio.sleep(POLL_S)


async def cost_of_sessions(
    url: str, pid: int, sessions: int, rate: int, seconds: float
) -> tuple[float, float]:
    """(cores that process `pid` uses, updates a second that each session gets), while so many
    replies of `rate` tokens a second are being written."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=sessions)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        config = (await http.get("/config")).json()
        pages = [PageSession(http, config) for _ in range(sessions)]
        tokens = int(rate * (seconds + 20))
        work = [asyncio.create_task(page.ask(f"{tokens} tokens at {rate}")) for page in pages]
        polls = [asyncio.create_task(page.poll()) for page in pages]
        while any(len(page.updates) < 10 for page in pages):  # all of them are under way
            await asyncio.sleep(0.1)
            for task in work:
                assert not task.done(), task.result()
        process = psutil.Process(pid)
        began, used = time.monotonic(), sum(process.cpu_times()[:2])
        await asyncio.sleep(seconds)
        ended, used = time.monotonic(), sum(process.cpu_times()[:2]) - used
        seen = [sum(began <= at < ended for at in page.updates) for page in pages]
        for task in (*work, *polls):
            task.cancel()
        await asyncio.gather(*work, *polls, return_exceptions=True)
    return used / (ended - began), min(seen) / (ended - began)
