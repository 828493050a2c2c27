"""Clients that go away, read slowly or come too early; engines that fail on the way."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import httpx
import openai
import pytest

from backend.admission import Limits
from backend.server import body as body_module, sse
from tests.server.support import NAME, Served, serve

CHAT = "/v1/chat/completions"


def body(text: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], **fields}


def events(text: str) -> list[dict | str]:
    found = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [json.loads(event) if event.startswith("{") else event for event in found]


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_ends_the_work(served: Served, n: int):
    with served.http() as http:
        with http.stream("POST", CHAT, json=body("endless", stream=True, n=n)) as reply:
            pieces = reply.iter_raw()  # kept: its end would close the connection
            next(pieces)
            assert len(served.engine._streams) == n
        served.assert_all_ended()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_leaving_before_the_first_token_ends_the_work(served: Served, path: str, stream: bool):
    fields = {"stream": stream, "n": 2}
    raw = json.dumps(body("slow", **fields) if path == CHAT else {"prompt": "slow", **fields})
    with served.script.held():
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
                f"{raw}".encode())
            served.eventually(lambda: len(served.engine._streams) == 2)
            admission = served.classroom.admission
            assert admission.total.waiting == 2 and admission.waiting_tokens == 8
        served.eventually(lambda: not served.engine._streams)
    served.assert_all_ended()


def test_bodies_that_do_not_arrive(served: Served, monkeypatch, caplog):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{".encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head)  # and leave
    monkeypatch.setattr(body_module, "READ_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head)  # and wait
        connection.settimeout(60)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert "Internal error" not in caplog.text
    served.assert_all_ended()


def test_leaving_a_reply_that_is_not_streamed_ends_the_work(served: Served):
    with served.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=body("endless", ignore_eos=True), timeout=httpx.Timeout(60, read=0.2))
    served.assert_all_ended()


def test_who_does_not_read_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch):
    class Impatient(sse.EventStream):
        def __init__(self, *args) -> None:
            super().__init__(*args, stall_seconds=0.3)

    monkeypatch.setattr(sse, "EventStream", Impatient)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw = json.dumps(body("endless", stream=True, n=8, logprobs=True, top_logprobs=20))
    with connection:
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n{raw}"
            .encode())
        served.eventually(lambda: len(served.engine._streams) > 0)
        with served.http() as http:  # meanwhile others are served
            assert http.post(CHAT, json=body("hi")).status_code == 200
        served.assert_all_ended()  # although the connection is still open


def test_an_engine_that_dies_on_the_way_ends_the_stream_with_an_error():
    with serve() as served:
        with served.http() as http:
            reply = http.post(CHAT, json=body("crash", stream=True))
            *pieces, last = events(reply.text)
            assert reply.status_code == 200 and len(pieces) == 4  # the role and three tokens
            assert last["error"]["code"] == "engine_died"
            assert last["error"]["type"] == "server_error"
            served.eventually(served.engine.healthy)
            whole = http.post(CHAT, json=body("crash"))
            assert whole.status_code == 500
            assert whole.json()["error"]["code"] == "engine_died"
            served.eventually(served.engine.healthy)
            with pytest.raises(openai.APIError, match="stopped while it worked"):
                list(served.client().chat.completions.create(
                    model=NAME, stream=True, **body("crash")))
            served.eventually(served.engine.healthy)
            assert http.post(CHAT, json=body("hi")).status_code == 200
        served.assert_all_ended()


def test_a_model_that_draws_no_number_is_the_servers_fault(served: Served):
    with served.http() as http:
        answer = http.post(CHAT, json=body("damaged"))
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["code"] == "engine_error" and error["type"] == "server_error"
        assert "--dtype bfloat16" in error["message"]
        assert http.post(CHAT, json=body("hi")).status_code == 200
    served.assert_all_ended()


def test_a_bug_is_told_by_a_number_and_logged(served: Served, monkeypatch, caplog):
    async def broken(*args, **options):
        yield (await anext(stream_ids(*args, **options)))
        raise RuntimeError("secret detail")

    stream_ids = served.chat.stream_ids
    monkeypatch.setattr(served.chat, "stream_ids", broken)
    with served.http() as http:
        whole = http.post(CHAT, json=body("hello"))
        streamed = http.post(CHAT, json=body("hello", stream=True))
    error = whole.json()["error"]
    assert whole.status_code == 500 and error["code"] == "internal_error"
    assert "secret" not in whole.text + streamed.text
    assert "[DONE]" not in streamed.text
    for told in (error, events(streamed.text)[-1]["error"]):
        number = told["message"].rstrip(".").rsplit(" ", 1)[-1]
        assert number in caplog.text and "secret detail" in caplog.text


def test_an_engine_that_is_not_ready_is_a_503(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.engine, "state", "restarting")
    monkeypatch.setattr(served.engine, "detail", "It is being started again.")
    with served.http() as http:
        for stream in (False, True):
            reply = http.post(CHAT, json=body("hi", stream=stream))
            assert reply.status_code == 503 and reply.headers["retry-after"] == "5"
            assert reply.json()["error"]["code"] == "engine_not_ready"
            assert "It is being started again." in reply.json()["error"]["message"]
        health = http.get("/health")
        assert health.status_code == 503 and health.headers["retry-after"] == "5"
        assert "started again" in health.json()["error"]["message"]
    with pytest.raises(openai.InternalServerError):
        served.client().chat.completions.create(model=NAME, **body("hi"))


def test_a_full_queue_is_a_503_and_a_used_up_key_a_429():
    keys = ("key-number-one", "key-number-two")
    limits = Limits(max_waiting=3, max_waiting_tokens=20, max_per_caller=2)
    with serve(limits, api_keys=keys) as served:
        with served.http() as http:
            def ask(text: str, key: int = 0, **fields) -> httpx.Response:
                return http.post(CHAT, json=body(text, **fields),
                                 headers={"Authorization": f"Bearer {keys[key]}"})

            with ThreadPoolExecutor(1) as pool, served.script.held():
                work = pool.submit(ask, "slow", n=2)
                served.eventually(lambda: served.classroom.admission.waiting_tokens == 8)
                refused = ask("hi")
                assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
                assert refused.json()["error"]["code"] == "rate_limit_exceeded"
                assert refused.json()["error"]["type"] == "rate_limit_error"
                full = ask("hi", 1, n=2)
                assert full.status_code == 503 and full.headers["retry-after"] == "2"
                assert full.json()["error"]["code"] == "overloaded"
                full = ask("x" * 13, 1)
                assert full.status_code == 503 and "8 prompt tokens" in full.text
            assert work.result().status_code == 200
            served.assert_all_ended()
            assert ask("hi", n=2).status_code == 200
            assert ask("hi", n=3).status_code == 400  # it could never be taken
            assert ask("x" * 21).status_code == 400
        served.assert_all_ended()


def test_interleave_closes_all_streams_and_hands_on_the_first_error():
    closed: list[int] = []

    async def numbers(name: int, fail_at: int = 99):
        try:
            for i in range(3):
                if i == fail_at:
                    raise ValueError(f"from {name}")
                yield i
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    async def test() -> None:
        async with aclosing(sse.interleave([numbers(0), numbers(1)])) as merged:
            items = [item async for item in merged]
        assert sorted(items) == [(s, i) for s in range(2) for i in range(3)]
        assert [i for s, i in items if s == 0] == [0, 1, 2] and closed == [0, 1]
        closed.clear()
        with pytest.raises(ValueError, match="from 1"):
            async with aclosing(sse.interleave([numbers(0), numbers(1, 1)])) as merged:
                async for _ in merged:
                    pass
        assert sorted(closed) == [0, 1]
        closed.clear()
        async with aclosing(sse.interleave([numbers(0), numbers(1)])) as merged:
            await anext(merged)
            await anext(merged)
        assert sorted(closed) == [0, 1]

    asyncio.run(test())
