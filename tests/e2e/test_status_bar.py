"""The device's memory in the status bar: a strip of whose it is, and a list, at both widths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from backend.chat import ServiceStatus
from backend.services import Services
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import FakeChat, serve

ENGLISH = ("Weights 2.0 GB, KV cache, in use 512 MB, KV cache, reserved 1.5 GB, Engine, other "
           "1.0 GB, Other processes 1.0 GB, Free 10.0 GB")
ON_TOP = """row => {
    const { left, top, height } = row.getBoundingClientRect();
    return [4, 40, 80].every(
        x => row.contains(document.elementFromPoint(left + x, top + height / 2)));
}"""
CHINESE = "权重 2.0 GB, KV Cache 使用中 512 MB"


class Failed(FakeChat):
    """A model that could not be loaded."""

    async def status(self) -> ServiceStatus:
        return ServiceStatus("failed", "m", "The weights are damaged. Download the model again.")


def test_why_a_model_failed_is_said_in_the_readers_language(
    new_page: Callable[..., ChatPage]
) -> None:
    with serve(Services(Failed())) as url:
        chat = new_page(url, locale="zh-CN")
        detail = chat.page.locator("#status-bar .lmd-detail")
        expect(detail).to_have_text("权重已损坏。请重新下载模型。", timeout=60_000)
        assert chat.problems == [] == chat.foreign_requests()


@pytest.mark.parametrize(("name", "screen", "words"), [
    ("desk", dict(viewport={"width": 1280, "height": 800}), ENGLISH),
    ("phone", dict(viewport={"width": 390, "height": 844}, locale="zh-CN", color_scheme="dark"),
     CHINESE),
])
def test_whose_the_memory_is(
    new_page: Callable[..., ChatPage], name: str, screen: dict, words: str
) -> None:
    with serve(Services(FakeChat())) as url:
        chat = new_page(url, **screen)
        memory = chat.page.locator("#status-bar .lmd-memory-of")
        strip, rows = memory.get_by_role("img"), memory.locator("li")
        expect(strip).to_have_attribute("aria-label", re.compile(f"^{re.escape(words)}"))
        shares = strip.evaluate("s => [...s.children].map(c => c.offsetWidth / s.offsetWidth)")
        for share, gigabytes in zip(shares, (2, 0.5, 1.5, 1, 1, 10), strict=True):
            assert share == pytest.approx(gigabytes / 16, abs=0.03)
        expect(rows.first).to_be_hidden()
        memory.locator("summary").press("Enter")  # no mouse needed
        expect(rows).to_have_count(6)
        for row in rows.all():
            expect(row).to_be_in_viewport(ratio=1)
            assert row.evaluate(ON_TOP), "the page shows through the list"
        width = chat.page.evaluate("document.documentElement.scrollWidth")
        assert width <= screen["viewport"]["width"]
        if folder := os.environ.get("LMDESK_STATUS_PICTURES"):
            chat.page.screenshot(path=f"{folder}/status-{name}.png")
        assert chat.problems == [] == chat.foreign_requests()
