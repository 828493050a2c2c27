"""The client of remote servers, against a server that says whatever a test tells it to."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from backend import keyfile, remote, remote_http
from backend.chat import Delta
from backend.config import SamplingParams
from backend.errors import (
    AuthError,
    ContextLengthError,
    ModelNotFoundError,
    OverloadedError,
    RemoteError,
    UserError,
)
from backend.remote import RemoteChat
from tests.stand_in import Answer, StandIn, events, failure, piece, send, send_json

HI = [{"role": "user", "content": "hi"}]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # no real key file
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


def reply(chat: RemoteChat, sampling: SamplingParams = GREEDY, **options: Any) -> list[Delta]:
    async def collect() -> list[Delta]:
        return [delta async for delta in chat.stream(HI, sampling, **options)]
    return asyncio.run(collect())


def test_a_reply(server: StandIn) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12,
             "prompt_tokens_details": {"cached_tokens": 4}}
    server.chat(events(piece(""), piece("你"), piece("好"), piece(None, "length"),
                       {"choices": [], "usage": usage}, "[DONE]"))
    ticks = iter(range(100))
    deltas = reply(RemoteChat(server.url, clock=lambda: float(next(ticks))))
    assert [d.text for d in deltas] == ["你", "好", ""]
    last = deltas[-1]
    assert last.finish_reason == "length" and last.stats is not None
    assert (last.stats.prompt_tokens, last.stats.completion_tokens) == (9, 3)
    assert (last.stats.cached_tokens, last.stats.ttft_s, last.stats.tokens_per_s) == (4, 1.0, 2.0)
    path, headers, body = server.seen[-1]
    assert path == "/v1/chat/completions" and "authorization" not in headers
    assert body == {"model": "m1", "messages": HI, "temperature": 0.0, "top_p": 0.8,
                    "stream": True, "stream_options": {"include_usage": True}}


def test_a_begun_reply_is_sent_as_vllm_has_it(server: StandIn) -> None:
    server.chat(events(piece(" there", "stop"), "[DONE]"))
    begun = {"role": "assistant", "content": "Hello", "prefix": True}

    async def ask() -> list[Delta]:
        return [d async for d in RemoteChat(server.url).stream([*HI, begun], GREEDY, model="m1")]

    assert "".join(delta.text for delta in asyncio.run(ask())) == " there"
    body = server.seen[-1][2]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["messages"][-1] == {"role": "assistant", "content": "Hello"}


def test_parameters_that_differ_are_sent(server: StandIn) -> None:
    server.chat(events(piece("x", "stop")))
    sampling = SamplingParams(
        top_k=5, min_p=0.1, repetition_penalty=1.1, seed=3, max_tokens=7, presence_penalty=0.5,
        logit_bias={4: 1.0}, stop_token_ids=(8,), ignore_eos=True)
    reply(RemoteChat(server.url, "sk-secret"), sampling, stop=["END"], model="m2")
    _, headers, body = server.seen[-1]
    assert headers["authorization"] == "Bearer sk-secret"
    wanted = {"model": "m2", "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3,
              "max_tokens": 7, "presence_penalty": 0.5, "logit_bias": {"4": 1.0},
              "stop_token_ids": [8], "ignore_eos": True, "stop": ["END"]}
    assert {name: body.get(name) for name in wanted} == wanted
    assert "frequency_penalty" not in body and "min_tokens" not in body


def test_without_usage(server: StandIn) -> None:
    """Old servers refuse stream_options; then pieces are counted, and it is not asked again."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if "stream_options" in server.seen[-1][2]:
            return failure(400, "stream_options: extra fields not permitted")(handler)
        return events(piece("a"), piece("b"), piece("c", "stop"), "[DONE]")(handler)

    server.chat(answer)
    chat = RemoteChat(server.url)
    for _ in range(2):
        deltas = reply(chat, model="m")
        assert "".join(d.text for d in deltas) == "abc"
        assert deltas[-1].stats.completion_tokens == 3
    assert len(server.seen) == 3


def refused(server: StandIn, kind: type[UserError], match: str, key: str = "") -> UserError:
    with pytest.raises(kind, match=match) as caught:
        reply(RemoteChat(server.url, key), model="m")
    assert type(caught.value) is kind
    return caught.value


@pytest.mark.parametrize(("answer", "kind", "match"), [
    (failure(401, "no"), AuthError, "needs an API key"),
    (failure(404, "The model `m` does not exist.", "model_not_found"), ModelNotFoundError, "`m`"),
    (send_json(404, {"object": "error", "message": "The model m does not exist"}),
     ModelNotFoundError, "does not exist"),
    (send_json(404, {"detail": "Not Found"}), RemoteError, "not an OpenAI-compatible"),
    (send(404, "text/html", b"<h1>no</h1>"), RemoteError, "not an OpenAI-compatible"),
    (send(200, "text/html", b"<h1>hello</h1>"), RemoteError, "not an OpenAI-compatible"),
    (send_json(200, piece("x")), RemoteError, "not an OpenAI-compatible"),
    (failure(503, "The queue is full."), OverloadedError, "The queue is full. Try again later"),
    (failure(429, "slow down"), OverloadedError, "slow down"),
    (failure(400, "too long", "context_length_exceeded"), ContextLengthError, "too long"),
    (failure(400, "bad\n\x1b[31m\u2028 top_p"), UserError, "refuses the request: bad .31m top_p"),
    (failure(400, "stream_options are bad, always"), UserError, "are bad, always"),
    (failure(500, "oh no"), RemoteError, "failed: oh no"),
    (send(302, "text/plain", b"", Location="http://169.254.169.254/"), RemoteError, "redirects"),
    (send(500, "application/json", b"[" * 100_000), RemoteError, "not an OpenAI-compatible"),
    (events(piece("a"), {"error": {"message": "engine died", "code": "x"}}), RemoteError,
     "failed: engine died"),
    (events(piece("a")), RemoteError, "ended the reply half-way"),
    (events(piece("a"), "[DONE]"), RemoteError, "ended the reply half-way"),
    (events(), RemoteError, "ended the reply half-way"),
    (events("{not json"), RemoteError, "no reply"),
    (events("[" * 100_000), RemoteError, "no reply"),
    (events("NaN", "5", '"text"', "[]", "null", {}, {"choices": None}, {"choices": 3},
            {"choices": [None]}, {"choices": [{"delta": 5}]}, piece(7, 8), piece(["x"], {})),
     RemoteError, "half-way|no reply"),
    (send(200, "text/event-stream", b"data: \xff\xfe\n\n"), RemoteError, "no reply"),
    (send(200, "text/event-stream", b"data: " + b"x" * (1 << 21)), RemoteError, "too much"),
    (send(200, "text/event-stream", b"data: x\n" * (1 << 18)), RemoteError, "too much"),
    (send(500, "application/json", b" " * (1 << 21)), RemoteError, "too much"),
    (send(200, "text/event-stream", gzip.compress(b"x" * 1000), Content_Encoding="gzip"),
     RemoteError, "compressed"),
    (send(200, "text/event-stream", b'data: {}\n\n', Content_Length="1000"), RemoteError,
     "connection to the api_server .* was lost"),
    (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), RemoteError, "was lost"),
    (lambda handler: handler.wfile.write(b"\x00\x01garbage\r\n\r\n"), RemoteError, "was lost"),
])
def test_every_failure_is_a_sentence(
    answer: Answer, kind: type[UserError], match: str, server: StandIn
) -> None:
    server.chat(answer)
    error = refused(server, kind, match)
    assert len(str(error)) < 1000 and str(error).isprintable()
    assert server.url in str(error) or "too much" in match or "compressed" in match


def test_wrong_key(server: StandIn) -> None:
    server.chat(failure(401, "wrong key sk-secret"))
    error = refused(server, AuthError, "does not accept the API key", "sk-secret")
    assert "sk-secret" not in str(error)


def test_dead_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        chat = RemoteChat(url)
        for call in (lambda: reply(chat), lambda: asyncio.run(chat.models())):
            with pytest.raises(RemoteError, match=f"No api_server answers at {url}"):
                call()
        status = asyncio.run(chat.status())
        assert status.state == "unreachable" and url in status.detail


def test_silence_and_a_server_that_does_not_take_connections(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_http, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(remote_http, "CONNECT_SECONDS", 0.1)
    never = threading.Event()
    server.chat(lambda handler: bool(never.wait(20)))
    refused(server, RemoteError, f"{server.url} has gone silent")
    never.set()
    with socket.socket() as deaf, ExitStack() as queue:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # nobody takes these, so that there is no place for one more
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        with pytest.raises(RemoteError, match="No api_server answers"):
            asyncio.run(RemoteChat(f"http://127.0.0.1:{deaf.getsockname()[1]}").models())


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
def test_endless_answers_end(
    path: str, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events without end: of a reply, as long as it is one; and where no events belong."""
    monkeypatch.setattr(remote, "MAX_REPLY_CHARS", 1 << 21)
    event = b"data: " + json.dumps(piece("x" * 1000)).encode() + b"\n\n"
    hung_up = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        try:
            send(200, "text/event-stream", b"")(handler)
            while True:
                handler.wfile.write(event)
        except OSError:
            hung_up.set()

    server.answers[path] = answer
    with pytest.raises(RemoteError, match="does not end. Set max_tokens|too much at once"):
        reply(RemoteChat(server.url))
    assert hung_up.wait(20)


def test_many_events_in_small_pieces_are_no_flood(server: StandIn) -> None:
    """The bound is for one event: a long reply passes, wherever its chunks are cut."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        send(200, "text/event-stream", b"")(handler)
        line = b"data: " + json.dumps(piece("x" * 60_000)).encode()
        for _ in range(30):
            for part in (line, b"\r\n", b"\r\n"):
                handler.wfile.write(part)
        handler.wfile.write(b"data: " + json.dumps(piece("", "stop")).encode() + b"\n\n")

    server.chat(answer)
    assert sum(len(d.text) for d in reply(RemoteChat(server.url))) == 30 * 60_000


def test_half_a_surrogate_pair_becomes_printable(server: StandIn) -> None:
    server.chat(events(piece("a\ud800b", "stop")))
    assert reply(RemoteChat(server.url))[0].text.encode() == b"a?b"


def test_strange_usage_is_not_believed(server: StandIn) -> None:
    usage = {"prompt_tokens": -1, "completion_tokens": "many", "prompt_tokens_details": [1]}
    server.chat(events({**piece("a", "stop"), "usage": usage}))
    stats = reply(RemoteChat(server.url))[-1].stats
    assert (stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens) == (0, 1, 0)


def test_closing_the_iterator_hangs_up(server: StandIn) -> None:
    gone = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        events(piece("a"))(handler)
        handler.connection.settimeout(20)
        if handler.connection.recv(1) == b"":
            gone.set()

    async def stop_early() -> None:
        deltas = RemoteChat(server.url).stream(HI, GREEDY)
        assert (await anext(deltas)).text == "a"
        await deltas.aclose()
        assert await asyncio.to_thread(gone.wait, 20)

    server.chat(answer)
    asyncio.run(stop_early())


def test_environment_stays_here(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "secret-of-mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: secret-of-mine")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    server.chat(events(piece("a", "stop")))
    reply(RemoteChat(server.url))
    assert len(server.seen) == 2 and "secret-of-mine" not in str(server.seen)


def test_bad_requests_are_refused_before_they_are_sent(server: StandIn) -> None:
    chat = RemoteChat(server.url)
    for messages, sampling in (([], GREEDY), (HI, SamplingParams(logprobs=1))):
        async def first(messages=messages, sampling=sampling) -> None:
            await anext(chat.stream(messages, sampling))

        with pytest.raises(UserError):
            asyncio.run(first())
    with pytest.raises(UserError, match="cannot be sent"):
        RemoteChat(server.url, "key\nX-Injected: 1")
    assert server.seen == []
    assert asyncio.run(chat.count_tokens(HI)) is None


@pytest.mark.parametrize("value", [[], {}, {"data": None}, {"data": {}}, 5, None])
def test_models_of_something_else(value: Any, server: StandIn) -> None:
    server.answers["/v1/models"] = send_json(200, value)
    with pytest.raises(RemoteError, match="not an OpenAI-compatible"):
        asyncio.run(RemoteChat(server.url).models())


def test_models_that_are_none_are_left_out(server: StandIn) -> None:
    data = [{"id": "good"}, {"id": 5}, {}, None, {"id": ""}, {"id": "x" * 1000}]
    server.answers["/v1/models"] = send_json(200, {"data": data})
    assert asyncio.run(RemoteChat(server.url).models()) == ["good"]
    server.answers["/v1/models"] = send_json(200, {"data": []})
    with pytest.raises(RemoteError, match="serves no model"):
        reply(RemoteChat(server.url))


def test_status(server: StandIn) -> None:
    now = [0.0]
    chat = RemoteChat(server.url, clock=lambda: now[0])

    def state() -> tuple[str, str, str]:
        status = asyncio.run(chat.status())
        return status.state, status.model, status.detail

    assert state() == ("ready", "m1", "")  # it has no /health
    asked = len(server.seen)
    now[0] = 1.9
    assert state() == ("ready", "m1", "") and len(server.seen) == asked
    server.answers["/health"] = failure(503, "The engine makes no progress.")
    now[0] = 2.1
    assert state()[0] == "unreachable" and "no progress" in state()[2]
    ours = {"state": "loading", "model": "mine", "detail": "The model is being loaded.",
            "info": None, "stats": {"num_running": 3}, "memory": None}
    server.answers["/api/status"] = send_json(200, ours)
    now[0] = 5
    assert state() == ("loading", "mine", "The model is being loaded.")
    assert asyncio.run(chat.status()).stats.num_running == 3
    server.answers["/api/status"] = send_json(200, {"state": "<b>", "stats": 7})
    server.answers["/health"] = send_json(200, {})
    now[0] = 8
    assert state() == ("ready", "m1", "")


def test_pages_that_poll_together_ask_once(server: StandIn) -> None:
    async def poll() -> None:
        chat = RemoteChat(server.url)
        first, *others = await asyncio.gather(*(chat.status() for _ in range(20)))
        assert all(status is first for status in others)

    asyncio.run(poll())
    assert [path for path, _, _ in server.seen] == ["/v1/models", "/api/status", "/health"]


def test_key_file_is_for_servers_on_this_machine(server: StandIn) -> None:
    port = server.server.server_port
    keyfile.write_key(port, "sk-from-file")
    asyncio.run(RemoteChat(server.url).models())
    asyncio.run(RemoteChat(server.url, "sk-given").models())
    sent = [headers["authorization"] for _, headers, _ in server.seen]
    assert sent == ["Bearer sk-from-file", "Bearer sk-given"]
    assert RemoteChat(f"http://192.0.2.1:{port}").key() is None
