"""512 streams at once through the real server and a real engine process, 30 % of them abandoned:
no reply is mixed up with another, and everything comes home."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import httpx
import pytest

from backend.admission import Limits
from backend.config import EngineConfig
from backend.engine.launcher import ProcessHandle
from tests.server.support import Served, serve

STREAMS = 512
ABORTED = 0.3
FILES = 4 * STREAMS  # both ends of every connection are in this process
# At a real model's pace, so that there is something to abort. Few and small KV blocks, so that
# sequences share beginnings and are preempted.
LAUNCH = partial(ProcessHandle, (sys.executable, "-m", "tests.fake_worker", "0.01"))
ENGINE = EngineConfig("fake", max_batch_size=96, cache_block_seq_len=8, max_prefill_token_num=512)
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789éß中文汉字😀🇨🇳"


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for all connections, where the usual limit of 1024 open files stands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class Stream:
    """One client. It leaves before the first token, or when `at` characters have come, or when
    `at` others have finished; or it stays."""

    text: str
    leaves: str = ""  # "" | "early" | "characters" | "others"
    at: int = 0
    received: str = ""
    finished: bool = False


def plan(seed: int) -> list[Stream]:
    draw = random.Random(seed)
    streams = []
    for number in range(STREAMS):
        nonce = "".join(draw.choices(ALPHABET, k=draw.randrange(20, 60)))
        shared = "The same beginning. " * draw.randrange(3)
        streams.append(Stream(f"{shared}{number}:{nonce}"))
    for stream in draw.sample(streams, round(STREAMS * ABORTED)):
        stream.leaves = draw.choice(["early", "characters", "others"])
        most = {"early": 1, "characters": len(stream.text), "others": STREAMS // 2}[stream.leaves]
        stream.at = draw.randrange(most)
    return streams


async def listen(stream: Stream, client: httpx.AsyncClient) -> None:
    """Ask for an echo, and read it to its end or to where this client leaves."""
    body = {
        "messages": [{"role": "user", "content": stream.text}], "stream": True,
        "ignore_eos": bool(stream.leaves),  # nothing but its leaving ends it
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                stream.finished = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                for choice in event["choices"]:
                    stream.received += choice["delta"].get("content") or ""
            if stream.leaves == "characters" and len(stream.received) > stream.at:
                return


async def everybody(served: Served, streams: list[Stream]) -> None:
    pid = served.engine.pid
    assert pid is not None
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
        os.kill(pid, signal.SIGSTOP)  # until all have asked
        tasks = {asyncio.create_task(listen(s, client)): s for s in streams}
        while len(served.engine._streams) < STREAMS:
            assert not any(task.done() for task in tasks), "a request was refused"
            await asyncio.sleep(0.01)
        for task, stream in tasks.items():
            if stream.leaves == "early":
                task.cancel()
        os.kill(pid, signal.SIGCONT)
        left = set(tasks)
        while left:
            _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            ended = STREAMS - len(left)
            for task in left:
                leaves = tasks[task].leaves == "others" and tasks[task].at <= ended
                if leaves and not task.cancelling():
                    task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError | None):
                raise outcome


def test_no_reply_is_mixed_up_and_no_block_is_lost(many_files):
    streams = plan(seed=20)
    limits = Limits(max_waiting=STREAMS)
    with serve(limits, LAUNCH, ENGINE) as served:
        asyncio.run(asyncio.wait_for(everybody(served, streams), 120))
        served.assert_all_ended()  # nothing runs or waits; free + cached = all blocks
        for stream in streams:
            if stream.leaves:
                assert stream.text.startswith(stream.received) and not stream.finished
            else:
                assert stream.finished and stream.received == stream.text
        left = [s for s in streams if not s.finished]
        assert len(left) == round(STREAMS * ABORTED)
        assert any(s.received for s in left) and not all(s.received for s in left)
        stats = served.engine.stats
        assert stats is not None and stats.num_preemptions and stats.num_cached_tokens
        metrics = served.http().get("/metrics").text
        for line in ("lmdesk_requests_running 0.0", "lmdesk_requests_waiting 0.0"):
            assert line in metrics
