"""The page under the path prefix of a proxy, as Jupyter and course platforms have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from backend.services import Services
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import FakeChat, serve

PREFIX = "/user/me/proxy/6006"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = FakeChat()
    with serve(Services(model), PREFIX) as url:
        yield url


def test_page_works_under_the_prefix(new_page: Callable[..., ChatPage], url: str) -> None:
    chat = new_page(url + PREFIX.lstrip("/") + "/")
    expect(chat.page.locator("#status-bar")).to_contain_text("Ready")
    chat.send("through the proxy")
    assert "through the proxy" in chat.wait_reply(1)
    outside = [r for r in chat.requests if r.startswith(url) and PREFIX not in r]
    assert outside == []
    assert chat.foreign_requests() == [] and chat.problems == []


def test_page_works_without_it_too(new_page: Callable[..., ChatPage], url: str) -> None:
    chat = new_page(url)
    chat.send("through a tunnel")
    assert "through a tunnel" in chat.wait_reply(1)
