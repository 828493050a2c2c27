"""A class over HTTP: who logs in as what, and what OpenAI's client meets as host and student."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

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
    config = resolve_keys(ServerConfig(host_keys=("new", HOST), api_keys=(CLASS,)))
    assert len(config.host_keys[0]) >= 32 and config.host_keys[1:] == (HOST,)
    assert len(written) == 1  # the host's key is in no file
    with pytest.raises(UserError, match="for hosts and for students") as refused:
        resolve_keys(ServerConfig(host_keys=(HOST, CLASS), api_keys=(CLASS,)))
    assert refused.value.field == "host_keys"
    with pytest.raises(UserError, match="too short") as refused:
        resolve_keys(ServerConfig(host_keys=("short",)))
    assert refused.value.field == "host_keys"


def test_a_host_without_the_page(room: Served):
    def ask(key: str, **change):
        with room.http(headers={"Authorization": f"Bearer {key}"}) as http:
            return http.post("/api/class", json=change) if change else http.get("/api/class")

    assert say(room, CLASS).usage.completion_tokens
    seen = ask(HOST).json()
    [row] = [row for row in seen["people"] if row["role"] == "student"]
    assert row["replies"] == 1 and row["tokens"] == seen["tokens"] == 3 and row["running"] == 0
    assert seen["limits"] == {"max_replies": 4, "max_tokens": None} and not seen["paused"]
    changed = ask(HOST, paused=True, max_tokens=9).json()
    assert changed["paused"] and changed["limits"] == {"max_replies": 4, "max_tokens": 9}
    changed = ask(HOST, paused=False, max_tokens=None, max_replies=2).json()
    assert not changed["paused"] and changed["limits"] == {"max_replies": 2, "max_tokens": None}
    for wrong in ({"paused": "yes"}, {"max_replies": 0}, {"max_replies": None}, {"max_tokens": 1.5},
                  {"max_replies": 257}, {"max": 1}):
        reply = ask(HOST, **wrong)
        assert reply.status_code == 400 and reply.json()["error"]["param"] in wrong
    for refused in (ask(CLASS), ask(CLASS, paused=True), ask(CLASS, nonsense=1)):
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_only"
    assert not room.classroom.paused


def test_without_a_class_nobody_has_a_name(served: Served):
    with served.http() as http:
        assert http.get("/api/class").status_code == 404
        assert http.get("/metrics").status_code == 200
    with serve(api_keys=(CLASS,)) as keyed, keyed.http() as http:
        assert 'name="name"' not in http.get("/login").text
        http.post("/login", data={"key": CLASS, "name": "Anna"})
        assert http.get("/metrics").status_code == 200
        assert 'value="' not in http.get("/login").text
        [row] = keyed.classroom.snapshot(TEACHER).people
        assert (row.name, row.role, row.id) == ("", Role.HOST, key_id(CLASS))


def test_students_take_turns(room: Served, monkeypatch: pytest.MonkeyPatch):
    """Anna sends many more requests than run at a time; Bert's, which comes last, is not last."""
    room.classroom.set_limits(TEACHER, StudentLimits(max_replies=64))
    keys: dict[str, str] = {}
    for name in ("Anna", "Bert"):
        with room.http() as http:
            http.post("/login", data={"key": CLASS, "name": name})
            [value] = http.cookies.values()
            assert value in http.get("/login").text  # for their programs
            keys[name] = value
    ended: list[str] = []  # owners of replies, as the engine finishes them
    generate = room.engine.generate

    async def noted(request):
        async with aclosing(generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason:
                    ended.append(request.owner)
                yield output

    monkeypatch.setattr(room.engine, "generate", noted)

    def ask(name: str) -> None:
        assert say(room, keys[name], "slow").choices[0].message.content == "slow"

    total = room.classroom.admission.total
    with ThreadPoolExecutor(50) as pool:
        with room.script.held():
            annas = [pool.submit(ask, "Anna") for _ in range(48)]  # sixteen run at a time
            room.eventually(lambda: len(room.engine._streams) == 48)
            bert = pool.submit(ask, "Bert")
            room.eventually(lambda: len(room.engine._streams) == 49)
            assert total.waiting == 49
        for asked in (bert, *annas):
            asked.result(60)
    rows = {row.name: row for row in room.classroom.snapshot(TEACHER).people}
    assert len(ended) == 49 and ended.index(rows["Bert"].id) < 32  # with the next sixteen
    assert (rows["Anna"].replies, rows["Bert"].replies) == (48, 1)
    assert rows["Anna"].tokens == 48 * 5
