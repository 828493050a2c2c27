"""/v1/chat/interactive: conversations that the server keeps, as LMDeploy's clients use them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import requests

from backend.chat import Message
from backend.chat_template import ChatTemplate, check_messages
from backend.server.sessions import SessionLimits, Sessions
from tests.app_process import until
from tests.server.support import Served, serve

PATH = "/v1/chat/interactive"
KEYS = ("key-number-one", "key-number-two")


class Recorded(ChatTemplate):
    """Shows what is asked first, for the script, then all of it; remembers the conversations."""

    def __init__(self) -> None:
        super().__init__("not used")
        self.seen: list[list[Message]] = []

    def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
        checked = check_messages(messages)
        self.seen.append([dict(message) for message in checked])
        return checked[-1]["content"]


class Talk:
    """A client of one server, and what its model was shown."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.template = served.chat.template = Recorded()

    def post(self, key: int = 0, **body: Any) -> httpx.Response:
        with self.served.http(headers={"Authorization": f"Bearer {KEYS[key]}"}) as http:
            return http.post(PATH, json=body)

    def say(self, prompt: Any, session_id: int = 1, key: int = 0, **fields: Any) -> dict[str, Any]:
        reply = self.post(
            key, prompt=prompt, session_id=session_id, **{"interactive_mode": True} | fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def shown(self) -> str:
        """The last conversation, as one line."""
        return " | ".join(f"{m['role'][0]}:{m['content']}" for m in self.template.seen[-1])

    def refused(self, status: int, key: int = 0, **body: Any) -> dict[str, Any]:
        reply = self.post(key, **body)
        assert reply.status_code == status, reply.text
        return reply.json()["error"]

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The lines of a reply, read as LMDeploy's client reads them."""
        body = {"session_id": 1, "interactive_mode": True, "stream": True} | body
        with requests.post(
            self.served.url + PATH, json=body, stream=True, timeout=60,
            headers={"Authorization": f"Bearer {KEYS[0]}", "User-Agent": "Test Client"},
        ) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines(chunk_size=1, decode_unicode=False, delimiter=b"\n")
            yield (json.loads(line.decode("utf-8")) for line in lines if line)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with serve(api_keys=KEYS) as served:
        yield served


@pytest.fixture
def talk(keyed: Served) -> Iterator[Talk]:
    yield Talk(keyed)
    for key in range(2):
        for number in (1, 2):
            with keyed.http(headers={"Authorization": f"Bearer {KEYS[key]}"}) as http:
                http.post(PATH, json={"session_id": number, "cancel": True})
                http.post(PATH, json={"session_id": number, "prompt": ""})
    keyed.assert_all_ended()


def test_history_is_kept_until_the_session_ends(talk: Talk):
    assert talk.say("one") == {"text": "one", "tokens": 4, "finish_reason": "stop"}
    talk.say("two")
    assert talk.shown() == "u:one | a:one | u:two"
    talk.say("three", interactive_mode=False)  # still answers with all of it, then forgets
    assert talk.shown() == "u:one | a:one | u:two | a:two | u:three"
    talk.say("four")
    assert talk.shown() == "u:four"


def test_history_comes_from_the_prefix_cache():
    class Whole(Recorded):
        def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
            super().render(messages)
            return "\n".join(message["content"] for message in messages) + "\n"

    with serve(api_keys=KEYS) as served:
        talk = Talk(served)
        talk.template = served.chat.template = Whole()
        text = talk.say("a long beginning of a conversation " * 4)["text"]
        before = served.engine.stats.num_cached_tokens
        talk.say("more", request_output_len=4)
        assert served.engine.stats.num_cached_tokens - before > len(text)


def test_an_empty_prompt_ends_it(talk: Talk):
    """As `APIClient.end_session` does; also when there is none."""
    for _ in range(2):
        talk.say("one")
        for _ in range(2):
            end = talk.say("", interactive_mode=False, request_output_len=0)
            assert end == {"text": "", "tokens": 0, "finish_reason": None}
        talk.say("two")
        assert talk.shown() == "u:two"
        talk.say("", interactive_mode=False)


def test_without_a_session_nothing_is_kept(talk: Talk):
    for prompt in ("one", "two"):
        reply = talk.post(prompt=prompt)
        assert reply.json()["text"] == prompt and talk.shown() == f"u:{prompt}"
    assert not talk.refused(400, prompt="")["message"].startswith("Internal")


def test_sessions_belong_to_their_key(talk: Talk):
    talk.say("mine")
    talk.say("theirs", key=1)
    assert talk.shown() == "u:theirs"
    talk.post(1, prompt="", session_id=1)  # ends only its own
    talk.say("again")
    assert talk.shown() == "u:mine | a:mine | u:again"


def test_a_stream_is_lines_of_json(talk: Talk):
    with talk.stream(prompt="Grüße, 世界") as lines:
        pieces = list(lines)
    assert "".join(piece["text"] for piece in pieces) == "Grüße, 世界"
    assert [set(piece) for piece in pieces] == [{"text", "tokens", "finish_reason"}] * len(pieces)
    tokens = [piece["tokens"] for piece in pieces]
    assert tokens == sorted(tokens) and tokens[-1] == len("Grüße, 世界".encode()) + 1
    reasons = [piece["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + ["stop"]
    reply = talk.post(prompt="a\u2028b\u0085c\nd", stream=True)
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert all(line.startswith("{") for line in reply.text.splitlines())
    with talk.stream(prompt="hello", request_output_len=3) as lines:
        assert list(lines)[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("cancel", [{"cancel": True}, {"stop": True, "prompt": ""}])
def test_cancel_is_one_step_and_keeps_what_was_said(talk: Talk, cancel: dict[str, Any]):
    with talk.stream(prompt="endless") as lines:
        said = [next(lines)["text"] for _ in range(5)]
        answer = talk.post(session_id=1, **cancel)
        assert answer.json() == {"text": "", "tokens": 0, "finish_reason": None}
        talk.say("go on")  # at once: nothing to wait for
        *rest, last = lines
    said += [piece["text"] for piece in rest]
    assert last["finish_reason"] == "stop" and last["tokens"] >= len(said)
    asked, replied, again = talk.template.seen[-1]
    assert asked["content"] == "endless" and again["content"] == "go on"
    # What the client was sent is a beginning of what was said until the moment of the cancel.
    assert replied["role"] == "assistant"
    assert "".join(said) == replied["content"]


def test_cancelled_before_the_first_token_a_prompt_may_be_sent_again(talk: Talk):
    talk.say("one")
    with ThreadPoolExecutor(1) as pool, talk.served.script.held():
        work = pool.submit(talk.say, "slow")
        talk.served.eventually(lambda: bool(talk.served.classroom.admission.waiting_tokens))
        talk.post(session_id=1, cancel=True)
        assert work.result(60) == {"text": "", "tokens": 0, "finish_reason": "stop"}
    talk.say("two")
    assert talk.shown() == "u:one | a:one | u:two"


def test_cancel_needs_the_key_of_the_session(talk: Talk):
    with talk.stream(prompt="endless") as lines:
        next(lines)
        talk.post(1, session_id=1, cancel=True)
        assert talk.refused(409, prompt="x", session_id=1)["code"] == "session_busy"
        talk.post(0, session_id=1, cancel=True)
        list(lines)


def test_a_busy_session_is_a_409(talk: Talk):
    with talk.stream(prompt="endless") as lines:
        next(lines)
        for body in ({"prompt": "x"}, {"prompt": ""}, {"prompt": "x", "request_output_len": 0},
                     {"prompt": "x", "request_output_len": 0, "interactive_mode": True}):
            error = talk.refused(409, session_id=1, **body)
            assert error["code"] == "session_busy" and error["param"] == "session_id"
            assert "cancel" in error["message"]
        assert talk.say("other", session_id=2)["text"] == "other"
        talk.post(session_id=1, cancel=True)
        list(lines)


def test_a_client_that_goes_leaves_what_was_said(talk: Talk):
    with talk.stream(prompt="endless") as lines:
        said = "".join(next(lines)["text"] for _ in range(5))
    until(lambda: talk.post(
        prompt="go on", session_id=1, interactive_mode=True).status_code == 200, "still busy")
    asked, replied, _ = talk.template.seen[-1]
    assert asked["content"] == "endless" and replied["content"].startswith(said)


def test_the_steps_of_lmdeploys_page(talk: Talk):
    """Its cancel button: cancel, end, then the history told anew without a reply."""
    with talk.stream(prompt="endless") as lines:
        said = next(lines)["text"]
        talk.post(prompt="", session_id=1, request_output_len=0, stream=True, cancel=True)
        list(lines)
    talk.post(prompt="", session_id=1, request_output_len=0, stream=True)
    history = [{"role": "user", "content": "endless"}, {"role": "assistant", "content": said}]
    told = talk.say(history, request_output_len=0, stream=True)
    assert told == {"text": "", "tokens": 0, "finish_reason": None}
    talk.say("go on")
    assert talk.shown() == f"u:endless | a:{said} | u:go on"


def test_a_reply_that_fails_is_not_remembered():
    with serve(api_keys=KEYS) as served:
        talk = Talk(served)
        talk.say("one")
        with talk.stream(prompt="crash") as lines:
            *pieces, last = lines
        assert len(pieces) == 3 and last["finish_reason"] == "error" and last["text"] == ""
        assert last["error"]["code"] == "engine_died"
        served.eventually(served.engine.healthy)
        error = talk.refused(500, prompt="crash", session_id=1, interactive_mode=False)
        assert error["code"] == "engine_died"
        served.eventually(served.engine.healthy)
        talk.say("two")
        assert talk.shown() == "u:one | a:one | u:two"


def test_a_session_that_is_too_long_says_what_to_do(talk: Talk, monkeypatch: pytest.MonkeyPatch):
    talk.say("one")
    error = talk.refused(400, prompt="x" * 140_000, session_id=1, interactive_mode=True)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert "End the session" in error["message"]
    half = {"session_id": 1, "interactive_mode": True, "request_output_len": 0}
    error = talk.refused(400, prompt="x" * 140_000, **half)  # nor can it grow without a reply
    assert error["code"] == "context_length_exceeded" and "End the session" in error["message"]
    error = talk.refused(400, prompt=[{"role": "user", "content": "x"}] * 1023, **half)
    assert "1024" in error["message"] and error["param"] == "prompt"
    talk.say("two")  # as if it had not been asked
    assert talk.shown() == "u:one | a:one | u:two"
    error = talk.refused(400, prompt="x" * 140_000)
    assert "--session-len" in error["message"]


def test_too_many_sessions_and_old_ones():
    now = [0.0]
    sessions = Sessions(SessionLimits(max_per_key=2, idle_s=60.0), lambda: now[0])
    with serve(api_keys=KEYS, sessions=sessions) as served:
        talk = Talk(served)
        talk.say("one", 1)
        talk.say("two", 2)
        error = talk.refused(429, prompt="x", session_id=3, interactive_mode=True)
        assert error["code"] == "too_many_sessions" and "1 minutes" in error["message"]
        talk.say("three", 3, key=1)
        now[0] = 59.0
        talk.say("still here", 1)
        assert talk.shown().startswith("u:one")
        now[0] = 60.0  # the second has been idle for a minute, the first for a second
        talk.say("new", 3)
        talk.say("here", 1)
        assert talk.shown().startswith("u:one")
        talk.post(prompt="", session_id=3)
        talk.say("anew", 2)
        assert talk.shown() == "u:anew"


def test_too_many_sessions_of_all_together():
    now = [0.0]
    sessions = Sessions(SessionLimits(max_in_all=2, idle_s=60.0), lambda: now[0])
    with serve(api_keys=KEYS, sessions=sessions) as served:
        talk = Talk(served)
        talk.say("one", 1)
        talk.say("two", 2, key=1)
        error = talk.refused(429, prompt="x", session_id=3, interactive_mode=True)
        assert error["code"] == "too_many_sessions" and "as many as it keeps" in error["message"]
        now[0] = 60.0
        talk.say("three", 3)
        assert talk.shown() == "u:three"


def test_special_tokens_show_if_asked(talk: Talk):
    assert talk.say("special")["text"] == "ab"
    assert talk.say("special", skip_special_tokens=False)["text"] == "a<s>b"
    with talk.served.http(headers={"Authorization": f"Bearer {KEYS[0]}"}) as http:
        body = {"messages": "special", "skip_special_tokens": False}
        reply = http.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == "a<s>b"


def test_stops_of_the_request_and_of_the_chat_format(talk: Talk, monkeypatch: pytest.MonkeyPatch):
    assert talk.say("hello world", stop="o w")["text"] == "hell"
    assert talk.say("hello world", stop=False, request_output_len=5)["text"] == "hello"
    monkeypatch.setattr(talk.served.chat, "stop", ("lo",))
    assert talk.say("hello")["text"] == "hel"
    with talk.served.http(headers={"Authorization": f"Bearer {KEYS[0]}"}) as http:
        reply = http.post("/v1/chat/completions", json={"messages": "hello"}).json()
        assert reply["choices"][0]["message"]["content"] == "hel"
        reply = http.post("/v1/completions", json={"prompt": "hello"}).json()
        assert reply["choices"][0]["text"] == "hello"  # no chat, no format


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({}, "prompt", "empty"),
    ({"prompt": "", "session_id": 1, "interactive_mode": True}, "prompt", "empty"),
    ({"prompt": 5}, "prompt", "text, or a list"),
    ({"prompt": [{"role": "wizard", "content": "x"}]}, "prompt[0].role", "wizard"),
    ({"prompt": [{"role": "user"}]}, "prompt[0].content", "missing"),
    ({"prompt": "x", "interactive_mode": True}, "session_id", "interactive_mode needs"),
    ({"cancel": True}, "session_id", "cancel needs"),
    ({"cancel": True, "session_id": 1, "prompt": "x"}, "prompt", "together with cancel"),
    ({"prompt": "x", "session_id": -2}, "session_id", "-1 or more"),
    ({"prompt": "x", "session_id": "1"}, "session_id", "a whole number"),
    ({"prompt": "x", "request_output_len": -1}, "request_output_len", "at least 0"),
    ({"prompt": "x", "temperature": 3}, "temperature", "from 0.0 to 2.0"),
    ({"prompt": "x", "stop": 1}, "stop", "a list of texts"),
    ({"prompt": "x", "image_url": "http://x/y.png"}, "image_url", "not supported"),
    ({"prompt": "x", "sequence_start": True}, "sequence_start", "Unknown field"),
]


@pytest.mark.parametrize(("body", "param", "words"), FIELDS)
def test_bad_fields(talk: Talk, body: dict[str, Any], param: str, words: str):
    error = talk.refused(400, **body)
    assert error["param"] == param and words in error["message"], error


def test_whole_bodies_of_lmdeploys_clients(talk: Talk):
    """The API page's sample, and `APIClient.chat_interactive_v1` with its leftover arguments."""
    sampling = {"top_p": 0.8, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1,
                "ignore_eos": False}
    for rest in (
        {"image_url": None, "session_id": -1, "stop": None, "request_output_len": None,
         "skip_special_tokens": True, "cancel": False, "adapter_name": None},
        {"session_id": 2, "stop": None, "request_output_len": 512, "kwargs": {}},
    ):
        reply = talk.post(prompt="你好", interactive_mode=False, stream=False, **sampling, **rest)
        assert reply.json() == {"text": "你好", "tokens": 7, "finish_reason": "stop"}, reply.text


def test_many_sessions_at_once_are_not_mixed(talk: Talk):
    barrier = threading.Barrier(16)

    def one(i: int) -> list[str]:
        barrier.wait(60)
        return [talk.say(f"client {i} turn {t}", 100 + i, interactive_mode=t < 3)["text"]
                for t in range(4)]

    with ThreadPoolExecutor(16) as pool:
        for i, texts in enumerate(pool.map(one, range(16))):
            assert texts == [f"client {i} turn {t}" for t in range(4)]
    for messages in talk.template.seen:
        owner = messages[0]["content"].split(" turn")[0]
        assert all(message["content"].startswith(owner + " turn") for message in messages)
