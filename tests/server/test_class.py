"""A class over HTTP: who logs in as what, and what OpenAI's client meets as host and student."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from backend import keyfile
from backend.classroom import Caller, Role, StudentLimits
from backend.config import ServerConfig
from backend.errors import UserError
from backend.server.auth import resolve_keys
from backend.server.keys import key_id
from tests.server.support import NAME, Served, serve

CLASS, HOST = "class-key-1234", "host-key-5678"
HTML = {"Accept": "text/html"}
TEACHER = Caller("teacher", "", Role.HOST)


@pytest.fixture
def room() -> Iterator[Served]:
    with serve(api_keys=(CLASS,), host_keys=(HOST,)) as running:
        yield running
        running.classroom.resume(TEACHER)
        running.assert_all_ended()


def say(served: Served, key: str, text: str = "hi", **options):
    return served.client(key).chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": text}], **options)


def people(served: Served) -> dict[str, Role]:
    return {row.name: row.role for row in served.classroom.snapshot(TEACHER).people}


def test_a_class_asks_for_a_name(room: Served):
    with room.http() as http:
        form = http.get("/", headers=HTML)
        assert form.status_code == 401 and 'name="name"' in form.text
        chinese = http.get("/login", headers={"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.5"}).text
        assert "你的名字" in chinese and '<html lang="zh">' in chinese
        for name in ("", " ", "x" * 41, "a\x00b", "a\u202eb", "\u200b"):
            refused = http.post("/login", data={"key": CLASS, "name": name})
            assert refused.status_code == 400 and "letters, digits" in refused.text
        assert http.post("/login", data={"name": "Anna"}).status_code == 401
        assert http.post("/login", data={"key": "wrong", "name": "Anna"}).status_code == 401
        assert not http.cookies and people(room) == {}
        assert http.post("/login", data={"key": CLASS, "name": " 小明  Li "}).status_code == 303
        assert http.get("/v1/models").status_code == 200
        assert people(room) == {"小明 Li": Role.STUDENT}
        assert 'value="小明 Li"' in http.get("/login").text  # to be changed, without the key
        odd = {"name": '"><script>x</script>'}
        assert http.post("/login", data=odd).status_code == 303
        assert "<script" not in http.get("/login").text and "&lt;script" in http.get("/login").text
        http.get("/v1/models")
        assert people(room) == {odd["name"]: Role.STUDENT}  # the same person
        foreign = {"Origin": "https://evil.example"}
        assert http.post("/login", data={"name": "Eve"}, headers=foreign).status_code == 403


def test_a_link_makes_a_guest(room: Served):
    with room.http() as http:
        reply = http.get(f"/?key={CLASS}", headers=HTML)
        assert reply.status_code == 303 and CLASS not in reply.text + str(reply.headers)
        http.get("/v1/models")
        [name] = people(room)
        assert name.startswith("guest-") and people(room)[name] is Role.STUDENT


def test_logging_out(room: Served):
    with room.http() as http:
        http.post("/login", data={"key": HOST, "name": "Ms Li"})
        assert http.get("/metrics").status_code == 200
        assert http.get("/logout").status_code == 405
        foreign = {"Origin": "https://evil.example"}
        assert http.post("/logout", headers=foreign).status_code == 403
        assert http.get("/metrics").status_code == 200
        assert http.post("/logout").headers["location"] == "./login"
        assert not http.cookies and http.get("/metrics").status_code == 401


def test_a_cookie_says_who_and_cannot_be_changed(room: Served):
    with room.http() as http:
        http.post("/login", data={"key": CLASS, "name": "Anna"})
        [cookie] = http.cookies
        student = http.cookies[cookie]
        http.cookies.clear()
        http.post("/login", data={"key": HOST, "name": "Ms Li"})
        host = http.cookies[cookie]
        http.cookies.clear()
        (name, person, signature), (_, _, other) = student.split("."), host.split(".")
        for forged in (f"{host.split('.')[0]}.{person}.{signature}", f"{name}.{person}.{other}",
                       f"{name}.{'0' * 32}.{signature}", signature):
            header = {"Cookie": f"{cookie}={forged}"}
            assert http.get("/v1/models", headers=header).status_code == 401
    # The pass is a key of its own for programs: on page and API the same person.
    assert say(room, student).choices[0].message.content == "hi"
    assert people(room) == {"Anna": Role.STUDENT}


def test_metrics_are_the_hosts(room: Served):
    with room.http() as http:
        for key, status in ((CLASS, 403), (HOST, 200)):
            reply = http.get("/metrics", headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == status
        error = http.get("/metrics", headers={"Authorization": f"Bearer {CLASS}"}).json()["error"]
        assert error["code"] == "host_only" and "Only the host" in error["message"]
        for path in ("/docs", "/openapi.json", "/api/status"):
            assert http.get(path).status_code == 401
            reply = http.get(path, headers={"Authorization": f"Bearer {CLASS}"})
            assert reply.status_code == 200


def test_a_pause(room: Served):
    room.classroom.pause(TEACHER)
    with pytest.raises(openai.InternalServerError, match="host has paused") as refused:
        say(room, CLASS)
    assert refused.value.status_code == 503 and refused.value.code == "class_paused"
    assert refused.value.response.headers["retry-after"]
    assert say(room, HOST).choices[0].message.content == "hi"
    room.classroom.resume(TEACHER)
    with ThreadPoolExecutor() as pool:
        with room.script.held():
            reply = pool.submit(say, room, CLASS, "slow reply that is open")
            room.eventually(lambda: room.classroom.admission.total.open == 1)
            room.classroom.pause(TEACHER)
        assert reply.result(60).choices[0].message.content == "slow reply that is open"
    with room.http(headers={"Authorization": f"Bearer {CLASS}"}) as http:
        turn = {"prompt": "hi", "session_id": 3}
        assert http.post("/v1/chat/interactive", json=turn).json()["error"]["code"] == (
            "class_paused")
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_limits(room: Served):
    room.classroom.set_limits(TEACHER, StudentLimits(max_replies=2, max_tokens=5))
    reply = say(room, CLASS, "endless", max_tokens=50)
    assert reply.usage.completion_tokens == 5 and reply.choices[0].finish_reason == "length"
    assert say(room, HOST, "endless", max_tokens=50).usage.completion_tokens == 50
    with room.http(headers={"Authorization": f"Bearer {CLASS}"}) as http:
        turn = {"prompt": "endless", "session_id": 3, "request_output_len": 50}
        assert http.post("/v1/chat/interactive", json=turn).json()["tokens"] == 5
    with pytest.raises(openai.BadRequestError, match="asks for 3 replies, but at most 2"):
        say(room, CLASS, n=3)
    assert len(say(room, HOST, n=3).choices) == 3
    everybody = Caller(key_id(CLASS), "", Role.STUDENT)
    with room.classroom.admit(everybody), room.classroom.admit(everybody):
        with pytest.raises(openai.RateLimitError, match="You have 2 replies open; at most 2"):
            say(room, CLASS)
        with room.http() as http:  # Anna has the same key, but is somebody of her own
            http.post("/login", data={"key": CLASS, "name": "Anna"})
            messages = [{"role": "user", "content": "hi"}]
            assert http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert say(room, CLASS).choices[0].message.content == "hi"


def test_a_class_has_two_kinds_of_keys(monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[int, str]] = []
    monkeypatch.setattr(keyfile, "write_key", lambda port, key: written.append((port, key)))
    config = resolve_keys(ServerConfig(host_keys=(HOST,), server_port=7007))
    [made] = config.api_keys
    assert written == [(7007, made)] and config.host_keys == (HOST,) and len(made) >= 32
    with pytest.raises(UserError, match="for hosts and for students") as refused:
        resolve_keys(ServerConfig(host_keys=(HOST, CLASS), api_keys=(CLASS,)))
    assert refused.value.field == "host_keys"
    with pytest.raises(UserError, match="too short") as refused:
        resolve_keys(ServerConfig(host_keys=("short",)))
    assert refused.value.field == "host_keys"
