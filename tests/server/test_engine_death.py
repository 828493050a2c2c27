"""The engine process is killed under load: every open request ends in a typed error, the server
says so, and goes on by itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import APIError, AsyncOpenAI, InternalServerError

from backend.config import EngineConfig
from backend.engine.launcher import ProcessHandle
from tests.server.support import NAME, Served, serve

CHAT = "/v1/chat/completions"
COMMAND = (sys.executable, "-m", "tests.fake_worker", "0.005")
# 96 of 144 requests run, the others wait for a place.
ENGINE = EngineConfig("fake", max_batch_size=96, session_len=1 << 20, cache_max_entry_count=1 << 16)
STREAMED, WHOLE, OFFICIAL = 96, 32, 16
BOUND_S = 60.0  # far above the aim of 1 s: the machine may be busy


class Launcher:
    """Starts engine processes; those after the first stand still until `let_go`."""

    def __init__(self) -> None:
        self.started: list[ProcessHandle] = []

    def __call__(self) -> ProcessHandle:
        handle = ProcessHandle(COMMAND)
        if self.started:
            os.kill(handle.pid, signal.SIGSTOP)
        self.started.append(handle)
        return handle

    def kill(self) -> None:
        os.kill(self.started[-1].pid, signal.SIGKILL)

    def let_go(self) -> None:
        os.kill(self.started[-1].pid, signal.SIGCONT)


@pytest.fixture
def launcher() -> Launcher:
    return Launcher()


@pytest.fixture
def served(launcher: Launcher) -> Iterator[Served]:
    with serve(None, launcher, ENGINE) as running:
        yield running
        launcher.let_go()


def body(text: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], **fields}


def endless(number: int, **fields) -> dict:
    """A request that only an end of the engine ends: its echo is silent after its text."""
    return body(f"number {number}", ignore_eos=True, **fields)


async def streamed(client: httpx.AsyncClient, number: int) -> dict:
    """The error that ends a stream, whether it had begun or not."""
    async with client.stream("POST", CHAT, json=endless(number, stream=True)) as reply:
        lines = [line async for line in reply.aiter_lines() if line]
    if reply.status_code == 200:
        assert "[DONE]" not in lines[-1]
        return json.loads(lines[-1].removeprefix("data: "))["error"]
    assert reply.status_code == 500
    return json.loads(lines[0])["error"]


async def whole(client: httpx.AsyncClient, number: int) -> dict:
    """The error that a request without streaming gets."""
    reply = await client.post(CHAT, json=endless(number))
    assert reply.status_code == 500
    return reply.json()["error"]


async def official(client: AsyncOpenAI, number: int) -> dict:
    """The same, as OpenAI's client sees it."""
    with pytest.raises(APIError) as caught:
        fields = endless(number, stream=number % 2 == 0)
        extra = {"ignore_eos": fields.pop("ignore_eos")}
        reply = await client.chat.completions.create(model=NAME, extra_body=extra, **fields)
        async for _ in reply:
            pass
    return caught.value.body


async def kill_under_load(served: Served, launcher: Launcher) -> tuple[list[dict], float]:
    """(the error of each request, seconds from the kill to the last of them)."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as http,
        AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as openai,
    ):
        tasks = [asyncio.create_task(work) for work in (
            *(streamed(http, i) for i in range(STREAMED)),
            *(whole(http, i) for i in range(WHOLE)),
            *(official(openai, i) for i in range(OFFICIAL)))]
        while not (served.engine.stats and len(tasks) == (
                served.engine.stats.num_running + served.engine.stats.num_waiting)):
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(0.01)
        assert served.engine.stats.num_running and served.engine.stats.num_waiting
        started = time.monotonic()
        launcher.kill()
        async with asyncio.timeout(BOUND_S):
            errors = await asyncio.gather(*tasks)
        return errors, time.monotonic() - started


def test_every_open_request_ends_and_the_model_comes_back(served, launcher):
    with served.http() as http:
        assert http.get("/health").status_code == 200
        errors, seconds = asyncio.run(kill_under_load(served, launcher))
        print(f"last error {seconds:.2f} s after the death")
        assert len(errors) == STREAMED + WHOLE + OFFICIAL
        for error in errors:
            assert error["code"] == "engine_died" and error["type"] == "server_error"
            assert "stopped while it worked" in error["message"]

        # Until the new engine is there: sentences, and when to come again.
        total = served.classroom.admission.total
        assert not total.waiting and not total.open
        for reply in (
            http.get("/health"),
            http.post(CHAT, json=body("hi")),
            http.post(CHAT, json=body("hi", stream=True)),
            http.post("/v1/completions", json={"prompt": "hi"}),
        ):
            assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
            assert "started again" in reply.json()["error"]["message"]
        with pytest.raises(InternalServerError):
            served.client().chat.completions.create(model=NAME, **body("hi"))
        assert http.get("/api/status").json()["state"] == "restarting"
        assert http.get("/v1/models").status_code == http.get("/metrics").status_code == 200

        launcher.let_go()
        served.eventually(served.engine.healthy)
        assert http.get("/health").status_code == 200
        reply = http.post(CHAT, json=body("back again")).json()
        assert reply["choices"][0]["message"]["content"] == "back again"
        assert len(launcher.started) == 2
    served.assert_all_ended()


def test_death_while_idle_and_again_while_it_comes_back(served, launcher):
    with served.http() as http:
        launcher.kill()
        served.eventually(lambda: len(launcher.started) == 2)
        assert http.get("/health").status_code == 503
        launcher.kill()
        served.eventually(lambda: len(launcher.started) == 3)
        launcher.let_go()
        served.eventually(served.engine.healthy)
        assert http.get("/health").status_code == 200
        reply = http.post(CHAT, json=body("still here")).json()
        assert reply["choices"][0]["message"]["content"] == "still here"
    served.assert_all_ended()
