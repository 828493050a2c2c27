"""`serve api_client --session-id`: a conversation that the server keeps, from several terminals."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import app
from backend import keyfile
from backend.config import SamplingParams
from backend.console import chat
from backend.errors import AuthError, RemoteError, UserError
from backend.remote import RemoteChat
from backend.remote_session import PATH, RemoteSession
from tests.server.support import Served, serve
from tests.server.test_interactive import Recorded
from tests.stand_in import Answer, StandIn, send, send_json

SAMPLING = SamplingParams(max_tokens=30)
KEY = "key-number-one"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # no real key file
    with serve(api_keys=(KEY, "key-number-two")) as running:
        keyfile.write_key(running.port, KEY)
        running.chat.template = Recorded()
        yield running
        running.assert_all_ended()


def talk(url: str, script: str, number: int = 5, system: str | None = None, key: str = "") -> str:
    """What a terminal shows."""
    out = io.StringIO()
    session = RemoteSession(RemoteChat(url, key), number, system)
    asyncio.run(chat(session, SAMPLING, stdin=io.StringIO(script), stdout=out))
    return out.getvalue()


def shown(served: Served) -> str:
    """The last conversation that the model saw."""
    template = served.chat.template
    assert isinstance(template, Recorded)
    return " | ".join(f"{m['role'][0]}:{m['content']}" for m in template.seen[-1])


def test_another_terminal_goes_on_with_the_session(served: Served) -> None:
    first = talk(served.url, "one\n\ntwo\n\nexit\n")
    assert first.startswith("one\n[reply 4 tokens, first after ")
    assert first.endswith("Session 5 stays at the server for whoever goes on with it; end would "
                          "have it forgotten.\n")
    assert shown(served) == "u:one | a:one | u:two"
    second = talk(served.url, "three\n\nend\n\nfour\n\n")
    assert second.startswith("Session 5 goes on after 4 messages, the last: two\nthree\n")
    assert "A new conversation." in second and shown(served) == "u:four"
    talk(served.url, "other\n\n", number=6)
    assert shown(served) == "u:other"
    talk(served.url, "mine\n\n", key="key-number-two")
    assert shown(served) == "u:mine"


def test_a_system_prompt_begins_a_new_session_only(served: Served) -> None:
    talk(served.url, "one\n\ntwo\n\n", system="Be brief.")
    assert shown(served) == "s:Be brief. | u:one | a:one | u:two"
    second = talk(served.url, "three\n\nend\n\nfour\n\n", system="Sing.")
    assert "--system is for new ones; end begins one." in second
    assert shown(served) == "s:Sing. | u:four"


def test_a_reply_that_is_left_frees_the_session_and_keeps_what_was_said(served: Served) -> None:
    async def leave() -> None:
        session = RemoteSession(RemoteChat(served.url), 5)
        reply = session.say("endless", SamplingParams())
        text = (await anext(reply)).text
        await reply.aclose()
        again = [delta async for delta in session.say("now", SAMPLING)]
        assert again[0].text and text.startswith("a")

    asyncio.run(leave())
    assert shown(served).startswith("u:endless | a:a") and shown(served).endswith("| u:now")


def test_two_at_once_are_told_and_nothing_is_lost(served: Served) -> None:
    body = dict(prompt="endless", session_id=5, interactive_mode=True, stream=True)
    with served.http(headers={"Authorization": f"Bearer {KEY}"}) as http, http.stream(
        "POST", PATH, json=body
    ) as first:
        lines = first.iter_lines()  # kept: the connection is closed with it
        next(lines)
        assert talk(served.url, "me\n\nend\n\n").count("Session 5 is still answering") == 2
        assert served.engine._streams  # the other's reply was not touched


def test_what_the_route_does_not_have_is_refused(served: Served) -> None:
    session = RemoteSession(RemoteChat(served.url), 5)
    with pytest.raises(UserError, match="--min-p does not go with --session-id"):
        asyncio.run(anext(session.say("hi", SamplingParams(min_p=0.5))))
    with pytest.raises(UserError, match="at least 0"):
        RemoteSession(RemoteChat(served.url), -1)
    with pytest.raises(AuthError):
        asyncio.run(RemoteSession(RemoteChat(served.url, "key-number-nil"), 5).begin())


def test_the_command(served: Served, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\nexit\n"))
    words = ["serve", "api_client", "--api_server_url", served.url, "--session_id", "7"]
    assert app.main(words) == 0
    assert capfd.readouterr().out.startswith("one\n[reply 4 tokens")
    assert app.main([*words[:-1], "seven"]) == 2
    assert app.main([*words[:-1], "-1"]) == 2
    assert "at least 0" in capfd.readouterr().err


def test_history_is_told_to_its_key_alone(served: Served) -> None:
    talk(served.url, "one\n\n")
    path = PATH + "?session_id=5"
    with served.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        assert http.get(path).json() == {"messages": [
            {"role": "user", "content": "one"}, {"role": "assistant", "content": "one"}]}
        for query in ("", "?session_id=x", "?session_id=-1", "?session_id=²"):
            assert http.get(PATH + query).json()["error"]["param"] == "session_id"
    with served.http(headers={"Authorization": "Bearer key-number-two"}) as http:
        assert http.get(path).json() == {"messages": []}
    with served.http() as http:
        assert http.get(path).status_code == 401


def lines(*pieces: str, kind: str = "text/event-stream") -> Answer:
    return send(200, kind, "".join(piece + "\n" for piece in pieces).encode())


@pytest.mark.parametrize(("answer", "told"), [
    (lines('{"text": "Hi", "tokens": 1, "finish_reason": null}',
           '{"text": "", "tokens": 2, "finish_reason": "length"}'), "Hi\n[reply 2 tokens"),
    (lines('{"text": "Hi", "tokens": 1, "finish_reason": null}'), "half-way"),
    (lines('{"text": "", "tokens": 1, "finish_reason": "error", "error": {"message": "Oh"}}'),
     "failed: Oh"),
    (lines("[" * 100_000), "no reply"),
    (lines('{"text": 1, "tokens": 1, "finish_reason": "stop"}'), "no reply"),
    (lines("x" * (2 << 20), kind="application/x-ndjson"), "too much at once"),
    (send_json(422, {"detail": "no"}), "refuses the request"),
])
def test_strange_servers(answer: Answer, told: str) -> None:
    """The first is LMDeploy's, which has no way to ask for the history."""
    with closing(StandIn()) as server:
        not_allowed = send_json(405, {"detail": "Method Not Allowed"})
        server.answers |= {f"{PATH}?session_id=5": not_allowed, PATH: answer}
        assert told in talk(server.url, "hello\n\n")


def test_servers_without_sessions() -> None:
    with closing(StandIn()) as server, pytest.raises(UserError, match="Leave out --session-id"):
        talk(server.url, "hello\n\n")
    with pytest.raises(RemoteError, match="No api_server answers"):
        talk(server.url, "hello\n\n")
