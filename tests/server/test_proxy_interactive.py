"""/v1/chat/interactive and /v1/encode through the proxy, which keeps the conversations itself."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import httpx
import pytest

from backend.config import SamplingParams
from backend.console import chat
from backend.remote import RemoteChat
from backend.remote_session import PATH, RemoteSession
from tests.app_process import until
from tests.server.proxy_support import ADMIN, CLIENT, RunningProxy, hang_up, stand_ins
from tests.server.support import NAME, Served, serve
from tests.server.test_interactive import Recorded
from tests.stand_in import StandIn, failure, send, send_json

REPLY = [{"text": "fi", "tokens": 1, "finish_reason": None},
         {"text": "ne", "tokens": 2, "finish_reason": "stop"}]


def lines(*pieces: dict[str, Any], kind: str = "application/x-ndjson"):
    return send(200, kind, b"".join(json.dumps(piece).encode() + b"\n" for piece in pieces))


def say(proxy: RunningProxy, prompt: Any, key: str = CLIENT, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "session_id": 1, "interactive_mode": True} | fields
    with proxy.http(key) as http:
        return http.post(PATH, json=body)


def add(proxy: RunningProxy, node: StandIn) -> None:
    """A node with one model, so that nobody must name it."""
    node.answers |= {"/v1/models": send_json(200, {"data": [{"id": "m1"}]}), PATH: lines(*REPLY)}
    proxy.add(node.url)


def told(node: StandIn) -> list[Any]:
    """The conversations that a node was sent, each as a list of texts."""
    return [[m["content"] for m in body["prompt"]] for path, _, body in node.seen if path == PATH]


def test_a_session_goes_on_with_a_real_node(proxy: RunningProxy):
    with serve() as node:
        template = node.chat.template = Recorded()
        proxy.add(node.url)
        assert say(proxy, "one").json() == {"text": "one", "tokens": 4, "finish_reason": "stop"}
        with proxy.http() as http, http.stream(
            "POST", PATH, json=dict(prompt="two", session_id=1, interactive_mode=True, stream=True)
        ) as reply:
            assert reply.headers["content-type"] == "application/x-ndjson"
            pieces = [json.loads(line) for line in reply.iter_lines()]
        assert "".join(piece["text"] for piece in pieces) == "two"
        assert [m["content"] for m in template.seen[-1]] == ["one", "one", "two"]
        assert say(proxy, "mine", key=ADMIN).json()["text"] == "mine"
        assert len(template.seen[-1]) == 1  # of another key, another session
        with proxy.http() as http:
            said = http.get(PATH, params={"session_id": 1}).json()["messages"]
            assert [m["content"] for m in said] == ["one", "one", "two", "two"]
        say(proxy, "", interactive_mode=False)
        say(proxy, "new")
        assert len(template.seen[-1]) == 1
        bad = say(proxy, "x", temperature=9)
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "temperature"
        long = say(proxy, "x" * (1 << 18))
        assert long.json()["error"]["code"] == "context_length_exceeded"
        assert "End the session" in long.json()["error"]["message"]
        assert say(proxy, "y").json()["text"] == "y"


def test_cancel_ends_the_work_of_the_node_and_keeps_what_was_said(proxy: RunningProxy,
                                                                  served: Served):
    proxy.add(served.url)
    body = dict(prompt="endless", session_id=1, interactive_mode=True, stream=True)
    with proxy.http() as http, http.stream("POST", PATH, json=body) as reply:
        rest = reply.iter_lines()
        next(rest)
        assert say(proxy, "x").status_code == 409
        assert say(proxy, "", cancel=True).status_code == 200
        assert json.loads(list(rest)[-1])["finish_reason"] == "stop"
    served.assert_all_ended()
    with proxy.http() as http:
        said = http.get(PATH, params={"session_id": 1}).json()["messages"]
    assert said[0]["content"] == "endless" and said[1]["content"].startswith("abc")


def test_the_terminal_client_through_the_proxy(proxy: RunningProxy, served: Served):
    proxy.add(served.url)
    out = io.StringIO()
    session = RemoteSession(RemoteChat(proxy.url, CLIENT), 3)
    script = io.StringIO("one\n\ntwo\n\nend\n\nthree\n\n")
    asyncio.run(chat(session, SamplingParams(max_tokens=9), stdin=script, stdout=out))
    assert [out.getvalue().count(text) for text in ("one\n[", "two\n[", "three\n[")] == [1, 1, 1]


def test_a_session_stays_on_its_node_and_leaves_it_when_that_is_lost(proxy: RunningProxy):
    with stand_ins(3) as nodes:
        for node in nodes:
            add(proxy, node)
        for i in range(6):
            assert say(proxy, f"{i}").json()["text"] == "fine"
        [home] = [node for node in nodes if told(node)]
        assert told(home)[-1] == ["0", "fine", "1", "fine", "2", "fine", "3", "fine", "4", "fine",
                                  "5"]
        assert all(body["session_id"] == -1 for path, _, body in home.seen if path == PATH)
        home.answers[PATH] = hang_up
        assert say(proxy, "more").json() == {"text": "fine", "tokens": 2, "finish_reason": "stop"}
        [other] = [node for node in nodes if node is not home and told(node)]
        assert told(other) == [[*told(home)[5], "fine", "more"]]  # nothing was lost
        home.answers[PATH] = lines(*REPLY)
        until(lambda: proxy.node(home.url).healthy, "does not come back")
        say(proxy, "again")
        assert len(told(other)) == 2  # it stays where it is now


@pytest.mark.parametrize("answer", [
    lines({"text": "fi", "tokens": 1, "finish_reason": None}),
    lines(REPLY[0], {"text": "", "tokens": 1, "finish_reason": "error", "error": "broke"}),
    lines(REPLY[0], {"text": 1, "tokens": 2, "finish_reason": "stop"}),
])
def test_a_reply_that_breaks_off_is_told_and_not_remembered(proxy: RunningProxy, answer):
    with stand_ins(1) as [node]:
        add(proxy, node)
        node.answers[PATH] = answer
        reply = say(proxy, "hi", stream=True)
        last = json.loads(reply.text.splitlines()[-1])
        assert last["finish_reason"] == "error" and last["error"]["message"]
        node.answers[PATH] = lines(*REPLY, kind="text/event-stream")  # as LMDeploy's
        assert say(proxy, "again").json()["text"] == "fine"
        assert told(node) == [["hi"], ["again"]]


def test_refusals_and_no_node(proxy: RunningProxy):
    assert say(proxy, "hi").status_code == 503
    with stand_ins(1) as [node]:
        add(proxy, node)
        node.answers[PATH] = failure(422, "not so")
        reply = say(proxy, "hi")
        assert reply.status_code == 422 and "not so" in reply.json()["error"]["message"]
        node.answers[PATH] = hang_up
        assert say(proxy, "hi").status_code == 502
        assert say(proxy, "hi", session_id=-1, interactive_mode=False).status_code in (502, 503)


def test_encode_and_models(proxy: RunningProxy, served: Served):
    proxy.add(served.url)
    with proxy.http() as http:
        assert http.post("/v1/encode", json={"input": "ab"}).json()["input_ids"][-2:] == [97, 98]
        with serve() as other:
            other.chat.model_name = "other-model"
            proxy.add(other.url)
            refused = http.post("/v1/encode", json={"input": "ab"}).json()["error"]["message"]
            assert "Name one" in refused and "other-model" in refused
            assert "Name one" in say(proxy, "hi").json()["error"]["message"]
            for name in (NAME, "other-model"):
                body = {"input": "ab", "model": name}
                assert http.post("/v1/encode", json=body).json()["length"] > 1
                assert say(proxy, "hi", model=name).json()["text"] == "hi"
            assert say(proxy, "hi", model="no").status_code == 404
            proxy.admin("POST", "/nodes/remove", json={"url": other.url})
