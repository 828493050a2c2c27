"""The page over a remote api_server: its fields, and servers that are none."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from backend.services import Services
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import FakeChat, serve

REMOTE = "http://127.0.0.1:23333"  # nothing is asked there: the scripted model stands in for it


@pytest.fixture(scope="module")
def model() -> FakeChat:
    return FakeChat()


@pytest.fixture(scope="module")
def url(model: FakeChat) -> Iterator[str]:
    with serve(Services(model, default_url=REMOTE)) as url:
        yield url


@pytest.fixture
def chat(new_page: Callable[..., ChatPage], url: str) -> Iterator[ChatPage]:
    page = new_page(url)
    yield page
    assert page.foreign_requests() == []
    assert page.problems == []


@pytest.fixture
def dead_url() -> Iterator[str]:
    """An address where nobody listens: bound, so that nobody else takes it, but no more."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_models_come_from_the_server(chat: ChatPage, model: FakeChat) -> None:
    expect(chat.page.locator("#remote-model input")).to_have_value("fake-model")
    chat.send("over the wire")
    assert "over the wire" in chat.wait_reply(1)
    assert model.models_asked[-1] == "fake-model"


def test_dead_server_is_a_sentence_and_the_page_goes_on(chat: ChatPage, dead_url: str) -> None:
    chat.send("first")
    chat.wait_reply(1)
    chat.set_remote(dead_url)
    expect(chat.toast).to_contain_text(dead_url)
    expect(chat.page.locator("#status-bar")).to_contain_text("Unreachable")
    chat.send("unanswered")
    expect(chat.box).to_have_value("unanswered")
    assert [user for user, _ in chat.turns()] == ["first"]
    chat.set_remote(REMOTE)
    expect(chat.page.locator("#remote-model input")).to_have_value("fake-model")
    expect(chat.page.locator("#status-bar")).to_contain_text("Ready")
    chat.box.press("Enter")
    assert "unanswered" in chat.wait_reply(2)


@pytest.mark.parametrize("address", ["not a url", "ftp://127.0.0.1:1", "http://example.org:80"])
def test_addresses_that_are_none_or_not_allowed(chat: ChatPage, address: str) -> None:
    chat.set_remote(address)
    expect(chat.toast).to_be_visible()
    chat.send("kept")
    chat.wait_idle()
    expect(chat.box).to_have_value("kept")
    chat.new_chat()


def test_key_is_hidden_and_not_stored(chat: ChatPage) -> None:
    key = chat.page.locator("#remote-key input")
    expect(key).to_have_attribute("type", "password")
    key.fill("sk-very-secret")
    chat.send("hello")
    chat.wait_idle()
    stored = json.dumps(chat.page.evaluate("[{...localStorage}, {...sessionStorage}]"))
    assert "sk-very-secret" not in stored
    chat.reload()
    expect(key).to_have_value("")
