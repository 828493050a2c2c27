"""The field of the API page, in a real browser: what is sent, streamed, refused, stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.support import NAME, Served, serve

KEY = "key-number-one"


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(api_keys=(KEY,)) as running:
        yield running
        running.assert_all_ended()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The API page, for somebody who has logged in."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{served.url}/docs")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button").click()
    expect(page.get_by_role("heading", name="Try it")).to_be_visible()
    yield page
    context.close()


def test_a_body_is_sent_and_the_answer_shown(page: Page) -> None:
    answer = page.get_by_role("log")
    sample = json.loads(page.get_by_role("textbox").input_value())
    assert sample["model"] == NAME
    page.get_by_role("button", name="Send").click()
    expect(answer).to_contain_text("200 OK")
    expect(answer).to_contain_text('"content":"Hello!"')
    page.get_by_role("textbox").fill(json.dumps({**sample, "stream": True}))
    page.get_by_role("button", name="Send").click()
    expect(answer).to_contain_text("data: [DONE]")
    page.get_by_role("textbox").fill('{"messages": "hi <b>", "temperature": 9}')
    page.get_by_role("button", name="Send").click()
    expect(answer).to_contain_text("400 Bad Request")
    expect(answer).to_contain_text("temperature")
    page.get_by_role("combobox").select_option("/v1/encode")
    page.get_by_role("button", name="Send").click()
    expect(answer).to_contain_text("input_ids")


def test_an_answer_is_stopped(page: Page, served: Served) -> None:
    page.get_by_role("textbox").fill('{"messages": "slow"}')
    with served.script.held():
        page.get_by_role("button", name="Send").click()
        served.eventually(lambda: bool(served.engine._streams))
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    served.assert_all_ended()
