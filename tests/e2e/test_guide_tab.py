"""The guide tab in a real browser: a step of the bundled model measured, and what follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.app_process import AppProcess
from tests.e2e.chat_page import ChatPage

SLOW = 180_000  # ms, of a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppProcess]:
    started = AppProcess(tmp_path_factory.mktemp("home"), "--server-port", "0")
    started.announcement()
    yield started
    started.kill()


def open_guide(page: Page) -> None:
    page.locator("#tab-guide-button").click()
    expect(page.locator("#guide-about p")).to_be_visible(timeout=SLOW)


def test_a_step_is_measured_and_judged(
    new_page: Callable[..., ChatPage], server: AppProcess
) -> None:
    chat = new_page(server.url, viewport={"width": 1280, "height": 800})
    page = chat.page
    open_guide(page)
    expect(page.locator("button#guide-good")).to_be_disabled()
    page.locator("button#guide-measure").click()
    expect(page.locator("#guide-progress")).to_contain_text("guide measure", timeout=SLOW)
    # Another tab is attached to the same job, in another language and on a phone.
    phone = new_page(server.url, viewport={"width": 390, "height": 844}, locale="zh-CN")
    open_guide(phone.page)
    for shown, words in ((page, "First token"), (phone.page, "首 token 时间")):
        expect(shown.locator("#guide-figures")).to_contain_text(words, timeout=SLOW)
        expect(shown.locator("#guide-replies")).to_contain_text("12 + 30 = ?")
        expect(shown.locator("#guide-result")).to_contain_text("serve api_server")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    if folder := os.environ.get("LMDESK_GUIDE_PICTURES"):
        page.screenshot(path=f"{folder}/guide.png")
        phone.page.screenshot(path=f"{folder}/guide-phone.png")
    page.locator("button#guide-good").click()
    expect(page.locator("#guide-about")).to_contain_text("int8", timeout=SLOW)
    expect(page.locator("#guide-step input:checked")).to_have_value("kv8")
    page.locator("#guide-step label").first.click()
    page.locator("button#guide-bad").click()
    expect(page.locator("#guide-result")).to_contain_text("No step is good enough", timeout=SLOW)
    assert chat.foreign_requests() == [] and chat.problems == [] == phone.problems
