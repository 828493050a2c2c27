"""The product as a newcomer meets it: `python app.py`, the bundled model, a real browser.

With the engine as a child process, inline, and behind an api_server.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import expect

from tests.app_process import AppProcess, until
from tests.e2e.chat_page import ChatPage

Open = Callable[..., ChatPage]
SCREEN = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
STOP_BOUND_S = 10.0  # ten times the aim: the machine may be busy
# Room for replies that would go on for minutes if nobody stopped them, and how to get one: what
# was said becomes likelier and likelier.
LONG = ("--session-len", "65536", "--cache-max-entry-count", "2048")
BABBLE = {"temperature": "0", "frequency_penalty": "-2", "max_tokens": "60000"}
NORMAL = {"temperature": "0.7", "frequency_penalty": "0", "max_tokens": "512"}


@dataclass
class Desk:
    """A running product: the page, and the process with the API and the engine behind it."""

    page: AppProcess
    api: AppProcess

    def running(self) -> int:
        """Replies that the engine works on."""
        status = httpx.get(f"{self.api.url}/api/status", timeout=30).json()
        stats = status["stats"] or {}
        return int(stats.get("num_running", 0) + stats.get("num_waiting", 0))


@pytest.fixture(scope="module", params=["child", "inline", "restful"])
def desk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    home = tmp_path_factory.mktemp("home")
    with ExitStack() as stack:
        def start(*argv: str) -> AppProcess:
            started = AppProcess(home, *argv, "--server-port", "0")
            stack.callback(started.kill)
            started.announcement()
            return started

        match request.param:
            case "child":
                page = api = start(*LONG)
            case "inline":
                page = api = start("--inline", *LONG)
            case _:
                api = start("serve", "api_server", *LONG)
                page = start("serve", "gradio", api.url)
        yield Desk(page, api)


@pytest.fixture
def chat(new_page: Open, desk: Desk) -> Iterator[ChatPage]:
    page = new_page(desk.page.url, **SCREEN)
    yield page
    assert page.foreign_requests() == []
    assert page.problems == []


def ask(chat: ChatPage, message: str) -> str:
    """Send a message and wait for its whole reply."""
    number = len(chat.turns()) + 1
    chat.send(message)
    return chat.wait_reply(number, timeout_s=60)


def ask_for_ever(chat: ChatPage) -> str:
    """Begin a reply that does not end by itself; returns its beginning, seen to grow."""
    chat.page.get_by_role("button", name="More sampling settings").click()
    for name, value in BABBLE.items():
        chat.set_sampling(name, value)
    number = len(chat.turns())
    chat.send("la " * 50)
    beginning = written(chat, longer_than=0)
    written(chat, longer_than=len(beginning))
    assert len(chat.turns()) == number  # it is being written still
    return beginning


def written(chat: ChatPage, longer_than: int) -> str:
    """The reply in the making, once it is longer than so many characters."""
    script = """shown => {
        const text = document.querySelector("#live .prose:not(:has(.lmd-waiting))")?.innerText;
        return text && text.trim().length > shown ? text.trim() : null;
    }"""
    handle = chat.page.wait_for_function(script, arg=longer_than, timeout=60_000)
    return str(handle.json_value())


def take_back(chat: ChatPage) -> None:
    """Undo the babble, which is no context to go on from, and its settings."""
    left = len(chat.turns()) - 1
    chat.undo()
    expect(chat.page.locator("#chat .bot-row")).to_have_count(left)
    for name in BABBLE:
        chat.set_sampling(name, NORMAL[name])


def test_a_conversation_and_a_reload(chat: ChatPage, desk: Desk) -> None:
    reply = ask(chat, "what is the KV cache?")
    assert re.search("keys?", reply) and re.search("values?", reply)
    assert "quant_policy" in ask(chat, "When should I set quant_policy?")
    assert all("first token" in line and "complete" in line for line in chat.stats())
    ask(chat, "My name is Anna.")
    assert "Anna" in ask(chat, "What is my name?")

    turns, lines = chat.turns(), chat.stats()
    chat.reload()
    assert chat.turns() == turns and chat.stats() == lines
    assert "Anna" in ask(chat, "What is my name?")
    assert len(chat.turns()) == 5


def test_stop_ends_the_work(chat: ChatPage, desk: Desk) -> None:
    beginning = ask_for_ever(chat)
    until(lambda: desk.running() == 1, "the status does not tell of the reply")
    pressed = time.monotonic()
    chat.stop()
    reply = chat.wait_reply(1)
    seen = time.monotonic() - pressed
    until(lambda: desk.running() == 0, "the engine goes on", STOP_BOUND_S)
    idle = time.monotonic() - pressed
    print(f"stopped on the page after {seen:.2f} s, engine seen idle after {idle:.2f} s")
    assert idle < STOP_BOUND_S
    assert reply.startswith(beginning[:10]) and chat.stats() == ["stopped"]
    take_back(chat)
    ask(chat, "What is the KV cache?")
    assert len(chat.stats()) == 1 and "complete" in chat.stats()[0]


@pytest.mark.parametrize("desk", ["child", "restful"], indirect=True)
def test_the_page_survives_its_engine(chat: ChatPage, desk: Desk) -> None:
    ask(chat, "My name is Anna.")
    ask_for_ever(chat)
    engine = desk.api.engine()
    engine.send_signal(signal.SIGKILL)
    expect(chat.toast).to_contain_text("stopped while it worked on this request")
    chat.wait_reply(2)
    assert chat.stats()[1] == "interrupted by an error"
    until(lambda: httpx.get(f"{desk.api.url}/health").status_code == 200, "it does not come back")
    take_back(chat)
    assert "Anna" in ask(chat, "What is my name?")
    assert desk.api.engine() != engine and psutil.pid_exists(desk.page.pid)


def test_a_newcomers_first_sight(new_page: Open, tmp_path: Path) -> None:
    """`python app.py` and nothing else; the whole of a short conversation is in sight."""
    app = AppProcess(tmp_path)
    try:
        started = time.monotonic()
        app.announcement()
        chat = new_page(app.url, **SCREEN)
        ask(chat, "What is the KV cache?")
        print(f"first reply {time.monotonic() - started:.1f} s after the start")
        ask(chat, "When should I set quant_policy?")
        bar = chat.page.locator("#status-bar")
        for words in ("demo_model", "Ready", "0 running"):
            expect(bar).to_contain_text(words)
        for row in chat.page.locator("#chat .message-row").all():
            expect(row).to_be_in_viewport(ratio=1)
        expect(chat.box).to_be_in_viewport(ratio=1)
        assert chat.foreign_requests() == [] and chat.problems == []
    finally:
        app.kill()
