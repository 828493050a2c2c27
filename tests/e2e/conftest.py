"""A real Chromium, and pages of it. Without one these tests skip, saying so; on CI they fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Error, expect, sync_playwright

from tests.browser import find_browser
from tests.e2e.chat_page import ChatPage

QUIET = [  # the browser's own traffic; --no-sandbox because CI runs as root
    "--no-sandbox", "--disable-background-networking", "--disable-quic", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One a module: while it is open, this thread has an event loop that others would trip over."""
    expect.set_options(timeout=60_000)  # a busy machine draws slowly
    with sync_playwright() as playwright:
        try:  # without a path, the browser that `playwright install` fetched
            browser = playwright.chromium.launch(executable_path=find_browser(), args=QUIET)
        except Error as error:
            if os.environ.get("CI"):
                pytest.fail(f"CI needs a browser: {error}")
            pytest.skip("No Chromium: install it, or run `playwright install chromium`.")
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., ChatPage]]:
    """A function that opens a page of its own browser context; all are closed at the end."""
    contexts = []

    def make(url: str, **options: object) -> ChatPage:
        contexts.append(browser.new_context(**{"locale": "en-US", **options}))
        return ChatPage(contexts[-1].new_page(), url).open()

    yield make
    for context in contexts:
        context.close()
