"""A new user with only the page: a model downloaded, quantized, judged, configured, loaded, asked,
compared and exported; and every tab in Chinese on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.app_process import AppProcess
from tests.e2e.chat_page import ChatPage
from tests.e2e.new_user import MODEL, NewUser, repository, untranslated
from tests.stand_in_hub import StandInHub
from ui.build import TABS

Open = Callable[..., ChatPage]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., AppProcess]]:
    """Starts the product, with flags."""
    with ExitStack() as stack:
        def started(*flags: str) -> AppProcess:
            app = AppProcess(tmp_path, "--server-port", "0", *flags)
            stack.callback(app.kill)
            app.announcement()
            return app

        yield started


def test_from_download_to_export(
    start: Callable[..., AppProcess], new_page: Open, tmp_path: Path
) -> None:
    app = start("--no-model")
    with StandInHub({MODEL: repository(tmp_path / "repository")}) as hub:
        chat = new_page(app.url, viewport={"width": 1280, "height": 800})
        user = NewUser(chat)
        expect(user.at("#tab-download")).to_be_visible()  # there is no model to chat with
        user.plan_download(hub.url, "org/absent")
        expect(user.at("#download-planned")).to_contain_text("has no such model")
        hub.bytes_per_s = 2_000_000
        user.plan_download(hub.url)
        user.download()
        user.at("button#job-download-pause").click()
        user.job_is("download", "paused")
        hub.bytes_per_s = 0
        user.at("button#job-download-resume").click()
        user.downloaded()

    user.prepare_quantization()
    user.fill("quantize-samples", "0")
    expect(user.at("#quantize-data-note")).to_contain_text("Samples must be a whole number")
    expect(user.at("button#quantize-start")).to_be_disabled()
    user.prepare_quantization()
    user.quantize()
    user.configure()
    user.save_and_load()
    info = httpx.get(f"{app.url}/api/status", timeout=30).json()["info"]
    assert (info["kv_bits"], info["max_batch_size"]) == (8, 8)
    reply = user.ask("What is the KV cache?")
    assert reply
    user.compare("What is the KV cache?")
    for side in ("left", "right"):
        assert user.at(f"#pane-{side}-reply").inner_text().strip()
    exported = user.export()
    assert "What is the KV cache?" in exported and reply.split()[0] in exported
    assert chat.foreign_requests() == [] and chat.problems == []


def test_every_tab_in_chinese_on_a_phone(
    start: Callable[..., AppProcess], new_page: Open
) -> None:
    phone = new_page(start().url, viewport={"width": 390, "height": 844}, locale="zh-CN")
    reader = NewUser(phone)
    for entry in (tab for tab in TABS if not tab.for_class):
        reader.open(entry.id)
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390, entry.id
        assert untranslated(phone.page) == [], entry.id
    reader.is_served("demo_model")
    assert reader.ask("什么是 KV cache？")
    assert phone.foreign_requests() == [] and phone.problems == []
