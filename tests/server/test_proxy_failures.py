"""`serve proxy` with nodes that fail, hang, lie, or say too much."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend import remote
from backend.server.proxy import upstream, watch
from tests.app_process import BOUND_S, until
from tests.server.proxy_support import (
    ADMIN,
    CHAT,
    RunningProxy,
    asked,
    broken_off,
    hang_up,
    stand_ins,
    stream_of,
    whole,
)
from tests.stand_in import StandIn, failure, send, send_json

EVENTS = b'data: {"a":1}\n\ndata: {"b":"\xe4\xbd\xa0"}\r\n\r\n: note\ndata: [DONE]\n\n'


@pytest.mark.parametrize("answer", [
    hang_up, failure(500, "broken"), failure(503, "full"), failure(429, "too many"),
    failure(404, "no such model"), send(200, "text/html", b"<html>"), stream_of(b""),
    broken_off(b""), send(302, "application/json", b"{}", Location="http://127.0.0.1:9/"),
    send(200, "application/json", b"{}", Content_Encoding="gzip"),
    send(200, "application/json", b"x" * 3000),
], ids=range(11))
@pytest.mark.parametrize("stream", [False, True])
def test_another_node_takes_over_before_the_first_token(pair, monkeypatch, answer, stream: bool):
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", 2000)
    proxy, first, second = pair
    proxy.add(first.url)  # with the bound above
    proxy.prefer(first.url)
    first.chat(answer)
    second.chat(stream_of(EVENTS) if stream else whole("fine"))
    reply = proxy.ask(stream=stream)
    assert reply.status_code == 200
    assert reply.content == EVENTS if stream else "fine" in reply.text
    assert len(asked(first)) == len(asked(second)) == 1


@pytest.mark.parametrize("answer", [
    send(200, "application/json", b"x" * 3000), send(413, "text/html", b"<html>"),
    failure(403, "by a firewall"),
], ids=range(3))
def test_a_client_cannot_take_a_node_from_the_others(pair, monkeypatch, answer):
    """An answer that its own request brought about does not count against the node."""
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", 2000)
    monkeypatch.setattr(watch, "CHECK_INTERVAL_SECONDS", 1000.0)
    proxy, first, _ = pair
    proxy.add(first.url)
    proxy.prefer(first.url)
    first.chat(answer)
    assert proxy.ask().status_code == 200  # by the other
    assert proxy.node(first.url).healthy


def test_a_node_that_is_gone_is_left_alone(proxy: RunningProxy):
    with stand_ins(1) as (second,):
        first = StandIn()
        proxy.add(first.url)
        proxy.add(second.url)
        proxy.prefer(first.url)
        port = first.server.server_port
        first.close()
        assert proxy.ask().status_code == 200 and len(asked(second)) == 1
        # A check that was on its way may find the connection broken, or nobody there.
        until(lambda: not proxy.node(first.url).healthy, "its end is not noticed")
        assert first.url in proxy.node(first.url).detail
        with socket.create_server(("127.0.0.1", port)):  # accepts, and says nothing
            assert proxy.ask().status_code == 200
    with proxy.http() as http:
        until(lambda: http.get("/health").status_code == 503, "nobody is left")
        assert http.get("/v1/models").json()["data"] == []
    reply = proxy.ask()
    assert reply.status_code == 503 and reply.headers["retry-after"] == "5"


@pytest.mark.parametrize("stream", [False, True])
def test_a_node_that_is_started_again_is_waited_for(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    """Requests that come while the only node is away are answered by it."""
    monkeypatch.setattr(watch, "RETURN_SECONDS", BOUND_S)
    first = StandIn()
    proxy.add(first.url)
    first.close()
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(proxy.ask, stream=stream) for _ in range(4)]
        until(lambda: not proxy.node(first.url).healthy, "its end is not noticed")
        until(lambda: proxy.proxy.admission.total.open == 4, "they do not wait")
        again = StandIn(first.server.server_port, stream_of(EVENTS) if stream else whole("fine"))
        try:
            assert [reply.result().status_code for reply in replies] == [200] * 4
        finally:
            again.close()


def test_a_request_that_a_lost_node_had_is_sent_to_it_again(proxy: RunningProxy,
                                                           monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "RETURN_SECONDS", BOUND_S)
    with stand_ins(1) as (node,):
        proxy.add(node.url)

        def dies(handler) -> None:
            node.chat(whole("fine"))
            hang_up(handler)

        node.chat(dies)
        assert "fine" in proxy.ask().text and len(asked(node)) == 2
        node.chat(hang_up)
        assert proxy.ask().status_code == 502 and len(asked(node)) == 5  # but not for ever


def test_a_server_that_joins_an_empty_proxy_is_waited_for(proxy: RunningProxy,
                                                          monkeypatch: pytest.MonkeyPatch):
    """As one does that is started again with --proxy-url: it leaves before it stops."""
    monkeypatch.setattr(watch, "RETURN_SECONDS", BOUND_S)
    with stand_ins(1) as (node,), ThreadPoolExecutor(1) as pool:
        reply = pool.submit(proxy.ask)
        until(lambda: proxy.proxy.admission.total.open == 1, "it does not wait")
        proxy.add(node.url)
        assert "fine" in reply.result().text


def test_a_node_that_hangs_does_not_hide_what_the_others_do(pair, monkeypatch):
    monkeypatch.setattr(upstream, "CHECK_SECONDS", 10 * BOUND_S)
    monkeypatch.setattr(remote, "GET_SECONDS", 10 * BOUND_S)
    proxy, first, second = pair
    over = threading.Event()
    first.answers["/health"] = lambda handler: over.wait(10 * BOUND_S)
    try:
        asked_before = len(first.seen)
        until(lambda: len(first.seen) > asked_before, "it is not asked")
        second.answers["/health"] = failure(503, "no")
        until(lambda: not proxy.node(second.url).healthy, "its trouble is not noticed")
        second.answers["/health"] = send_json(200, {})
        until(lambda: proxy.node(second.url).healthy, "its end is not noticed")
    finally:
        over.set()


def test_no_more_nodes_than_three_are_bothered(proxy: RunningProxy):
    with stand_ins(5) as nodes:
        for node in nodes:
            node.chat(failure(500, "broken here", "engine_died"))
            proxy.add(node.url)
        reply = proxy.ask()
        assert reply.status_code == 500 and reply.json()["error"]["code"] == "engine_died"
        assert sum(len(asked(node)) for node in nodes) == 3


@pytest.mark.parametrize("sent", [b'data: {"a": 1}\n\n', b'data: {"a": 1}\n\ndata: {"b'])
def test_after_the_first_token_nobody_takes_over(pair, sent: bytes):
    proxy, first, second = pair
    first.chat(broken_off(sent))
    reply = proxy.ask(stream=True)
    assert reply.status_code == 200 and reply.content.startswith(sent)
    last = reply.text.strip().split("\n\n")[-1]
    assert "lost" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "[DONE]" not in reply.text and not asked(second)
    assert not proxy.node(first.url).latencies


def test_refusals_go_back_as_they_are(pair):
    proxy, first, second = pair
    first.chat(failure(400, "temperature is wrong"))
    reply = proxy.ask()
    assert reply.status_code == 400 and "temperature is wrong" in reply.text
    assert not asked(second)


def test_a_stream_is_passed_on_byte_by_byte(pair):
    proxy, first, _ = pair
    first.chat(stream_of(EVENTS))
    with proxy.http() as http:
        body = b'{ "model":"m1",  "stream":true, "odd": [1.0, "\\u00e9"] }'
        reply = http.post(CHAT, content=body)
    assert reply.content == EVENTS
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"


def test_pieces_are_not_gathered(pair):
    """The first piece arrives while the node still holds the second back."""
    proxy, first, _ = pair
    seen: list[bool] = []

    def slowly(handler) -> None:
        stream_of(b"data: 1\n\n")(handler)
        handler.wfile.flush()
        until(lambda: bool(seen), "the client does not see the first piece")
        handler.wfile.write(b"data: 2\n\n")

    first.chat(slowly)
    body = {"model": "m1", "stream": True}
    with proxy.http() as http, http.stream("POST", CHAT, json=body) as reply:
        pieces = reply.iter_raw()
        assert next(pieces) == b"data: 1\n\n"
        seen.append(True)
        assert b"".join(pieces) == b"data: 2\n\n"


def test_an_endless_event_ends_the_stream(pair):
    proxy, first, _ = pair

    def endless(handler) -> None:
        stream_of(b"data: ")(handler)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            handler.wfile.write(b"x" * 65536)

    first.chat(endless)
    reply = proxy.ask(stream=True)
    assert len(reply.content) < 3 << 20 and b'"error"' in reply.content


@pytest.mark.parametrize(("content", "status"), [
    (b"", 400), (b"[]", 400), (b'{"model": 5}', 400), (b'{"model": NaN}', 400),
    (b" " * 2_000_001, 413),
])
def test_bad_bodies_bother_no_node(pair, content: bytes, status: int):
    proxy, first, second = pair
    with proxy.http() as http:
        assert http.post(CHAT, content=content).status_code == status
    assert not asked(first) and not asked(second)


def test_models_that_a_node_gains_and_loses(pair):
    proxy, first, second = pair
    first.answers["/v1/models"] = send_json(200, {"data": [{"id": "new"}]})
    until(lambda: proxy.ask(model="new").status_code == 200, "the new model is not seen")
    first.answers["/v1/models"] = send_json(200, {"data": []})
    until(lambda: not proxy.node(first.url).healthy, "it serves nothing")
    with proxy.http() as http:
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["m1", "m2"]
        assert http.get("/v1/models/m1").status_code == 200
        assert http.get("/v1/models/m3").status_code == 404


def test_health_of_nodes_that_hang(pair):
    proxy, first, _ = pair
    first.answers["/health"] = failure(503, "The engine makes no progress.")
    until(lambda: not proxy.node(first.url).healthy, "it is not noticed")
    assert "no progress" in proxy.admin("GET", "/nodes/status").json()[first.url]["detail"]
    assert ADMIN not in proxy.admin("GET", "/nodes/status").text
