"""`serve proxy` between real clients and real nodes; who may change these, and what they see."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.app_process import until
from tests.server.proxy_support import (
    CHAT,
    CLIENT,
    RunningProxy,
    asked,
    stand_ins,
)
from tests.server.support import NAME, Served, serve
from tests.stand_in import failure, send

NODE_KEY = "key-of-the-node"


# Real nodes


def test_openai_client_through_the_proxy(proxy: RunningProxy, served: Served):
    assert proxy.add(served.url)["models"] == [NAME]
    client = proxy.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    ask: dict[str, Any] = dict(model=NAME, messages=[{"role": "user", "content": "Grüße, 世界"}])
    assert client.chat.completions.create(**ask).choices[0].message.content == "Grüße, 世界"
    chunks = list(client.chat.completions.create(**ask, stream=True,
                                                 stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Grüße, 世界"
    assert chunks[-1].usage.completion_tokens == len("Grüße, 世界".encode()) + 1
    assert client.completions.create(model=NAME, prompt="abc").choices[0].text == "abc"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**ask, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match=NAME):
        client.chat.completions.create(model="other", messages=ask["messages"])
    node = proxy.node(served.url)
    assert len(node.latencies) == 3  # those that were answered well


def test_several_models_find_their_nodes(proxy: RunningProxy, served: Served):
    with serve() as other:
        other.chat.model_name = "other-model"
        proxy.add(served.url)
        proxy.add(other.url)
        client = proxy.client()
        assert [model.id for model in client.models.list()] == [NAME, "other-model"]
        for name in (NAME, "other-model"):
            reply = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "x"}])
            assert reply.model == name
        reply = proxy.ask(model=None)
        assert reply.status_code == 400 and "other-model" in reply.json()["error"]["message"]


def test_a_client_that_goes_ends_the_work_of_the_node(proxy: RunningProxy, served: Served):
    proxy.add(served.url)
    body = {"model": NAME, "messages": "endless", "stream": True}
    with proxy.http() as http, http.stream("POST", CHAT, json=body) as reply:
        next(reply.iter_bytes())
        assert served.engine._streams and proxy.node(served.url).unfinished == 1
    served.assert_all_ended()
    patience = httpx.Timeout(60, read=0.5)
    with proxy.http(timeout=patience) as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=body | {"stream": False})
    served.assert_all_ended()
    assert not proxy.node(served.url).latencies


def test_many_at_once_over_two_nodes_are_not_mixed(proxy: RunningProxy, served: Served):
    with serve() as other:
        proxy.add(served.url)
        proxy.add(other.url)

        def one(i: int) -> None:
            text = f"message {i} " * 5
            chunks = proxy.client().chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": text}], stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == text

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(64)))
        assert all(len(node.latencies) == 15 for node in proxy.proxy.nodes)


def test_an_engine_that_dies_before_the_first_token_is_replaced(proxy: RunningProxy,
                                                                 served: Served):
    with serve() as dying:
        proxy.add(served.url)
        proxy.add(dying.url)
        proxy.prefer(dying.url)
        dying.engine.state = "restarting"
        assert proxy.ask(model=NAME).json()["choices"][0]["message"]["content"] == "hi"
        until(lambda: not proxy.node(dying.url).healthy, "its state is not noticed")
        dying.engine.state = "ready"
        until(lambda: proxy.node(dying.url).healthy, "it does not come back")


# Keys


def test_everything_but_health_needs_a_key(proxy: RunningProxy):
    with httpx.Client(base_url=proxy.url) as http:
        assert http.get("/health").status_code == 503
        for method, path in [
            ("GET", "/v1/models"), ("POST", CHAT), ("POST", "/v1/completions"),
            ("GET", "/nodes/status"), ("POST", "/nodes/add"), ("POST", "/nodes/remove"),
            ("GET", "/nothing"),
        ]:
            assert http.request(method, path).status_code == 401, path


def test_nodes_are_the_admins_business(proxy: RunningProxy):
    with stand_ins(1) as (node,):
        for method, path in [("GET", "/nodes/status"), ("POST", "/nodes/add"),
                             ("POST", "/nodes/remove")]:
            reply = proxy.admin(method, path, CLIENT, json={"url": node.url})
            assert reply.status_code == 403 and reply.json()["error"]["code"] == "admin_key_needed"
        assert not node.seen
        proxy.add(node.url)
        assert proxy.admin("POST", CHAT, json={"messages": "hi", "model": "m1"}).status_code == 200


def test_keys_stay_where_they_belong(proxy: RunningProxy):
    """The node gets its own key and nothing of the client's; nobody gets the node's."""
    with stand_ins(1) as (node,):
        node.chat(send(200, "application/json", b'{"ok": 1}', Set_Cookie="a=b", Server="secret/1",
                       X_Secret="s", Connection="X-Secret", Retry_After="7"))
        proxy.add(node.url, api_key=NODE_KEY)
        with proxy.http() as http:
            reply = http.post(CHAT, json={"model": "m1"}, headers={
                "Cookie": "c=d", "X-Client": "x", "Connection": "X-Client", "Proxy-Authorization":
                "Basic x", "TE": "trailers", "OpenAI-Organization": "o", "Forwarded": "for=me"})
        assert reply.status_code == 200 and reply.headers["retry-after"] == "7"
        assert not {"set-cookie", "x-secret"} & set(reply.headers)
        assert "secret" not in str(reply.headers)
        assert all(headers["authorization"] == f"Bearer {NODE_KEY}" for _, headers, _ in node.seen)
        [(_, headers, _)] = asked(node)
        assert set(headers) <= {"host", "accept", "accept-encoding", "connection", "content-type",
                                "content-length", "user-agent", "authorization"}
        assert headers["connection"].lower() in ("close", "keep-alive")
        status = proxy.admin("GET", "/nodes/status").text
        assert NODE_KEY not in status + reply.text + str(reply.headers)
        proxy.proxy.watch.mark_down(proxy.node(node.url), "for the test")


def test_a_real_node_with_a_key(proxy: RunningProxy):
    with serve(api_keys=(NODE_KEY,)) as served:
        refused = proxy.admin("POST", "/nodes/add", json={"url": served.url, "api_key": "wrong"})
        assert refused.status_code == 401 and "does not accept" in refused.text
        proxy.add(served.url, api_key=NODE_KEY)
        assert proxy.ask(model=NAME).status_code == 200


def test_a_node_that_changed_its_key_is_not_the_clients_fault(pair):
    proxy, first, second = pair
    first.chat(failure(401, "wrong key"))
    assert proxy.ask().json()["choices"][0]["message"]["content"] == "fine"
    second.chat(failure(403, "wrong key"))
    until(lambda: proxy.node(first.url).healthy, "it answers its checks")
    reply = proxy.ask()
    assert reply.status_code == 502 and "wrong key" not in reply.text
    assert first.url not in reply.text and second.url not in reply.text


# Adding and removing


@pytest.mark.parametrize(("url", "words"), [
    ("file:///etc/passwd", "http"), ("http://169.254.169.254", "metadata"),
    ("http://metadata.google.internal", "metadata"), ("http://2852039166/", "not the URL"),
    ("http://a:b@127.0.0.1", "password"), ("http://127.0.0.1:1/v1?x=1", "not the URL"),
    ("http://127.0.0.1\\@evil", "password"), ("", "not the URL"), ("http://127.0.0.1:9", "answers"),
])
def test_urls_that_are_no_nodes(proxy: RunningProxy, url: str, words: str):
    reply = proxy.admin("POST", "/nodes/add", json={"url": url})
    assert reply.status_code in (400, 502) and words in reply.json()["error"]["message"]
    assert proxy.admin("GET", "/nodes/status").json() == {}


def test_a_proxy_is_not_its_own_node(proxy: RunningProxy):
    assert proxy.admin("POST", "/nodes/add", json={"url": proxy.url}).status_code == 400


def test_status_and_removal(pair):
    proxy, first, second = pair
    proxy.add(first.url, status={"models": ["lie"], "speed": 3.5, "unfinished": 0, "latency": []})
    proxy.ask()
    status = proxy.admin("GET", "/nodes/status").json()
    assert set(status) == {first.url, second.url}
    assert status[first.url] | {"latency": len(status[first.url]["latency"])} == {
        "models": ["m1", "m2"], "unfinished": 0, "speed": 3.5, "latency": 1, "healthy": True,
        "detail": ""}
    for options in ({"json": {"url": first.url}}, {"params": {"node_url": second.url}}):
        assert proxy.admin("POST", "/nodes/remove", **options).status_code == 200
        assert proxy.admin("POST", "/nodes/remove", **options).status_code == 400
    assert proxy.admin("GET", "/nodes/status").json() == {}
    assert proxy.ask().status_code == proxy.ask(model=None).status_code == 503


@pytest.mark.parametrize(("body", "param"), [
    ({}, "url"), ({"url": 1}, "url"), ({"url": "http://x", "status": 1}, "status"),
    ({"url": "http://x", "status": {"speed": 0}}, "status.speed"),
    ({"url": "http://x", "status": {"unfinished": 3}}, "status.unfinished"),
    ({"url": "http://x", "apikey": "k"}, "apikey"),
])
def test_bad_fields(proxy: RunningProxy, body: dict[str, Any], param: str):
    reply = proxy.admin("POST", "/nodes/add", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_nodes_to_begin_with_are_asked_until_they_answer(often: None):
    running = RunningProxy(node_key=NODE_KEY)
    with stand_ins(1) as (node,):
        models = node.answers["/v1/models"]
        node.answers["/v1/models"] = failure(503, "loading")
        running.proxy.begin_with((node.url,))
        with running:
            until(lambda: bool(node.seen), "it is not asked")
            assert running.ask().status_code == 503
            node.answers["/v1/models"] = models
            until(lambda: running.node(node.url).healthy, "it is not taken in")
            assert running.ask().status_code == 200
            assert {h["authorization"] for _, h, _ in node.seen} == {f"Bearer {NODE_KEY}"}
