"""The desk with only the page: a model downloaded, quantized, judged, loaded, and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app_process import ROOT, AppProcess
from tests.e2e.chat_page import ChatPage
from tests.stand_in_hub import StandInHub

DEMO = ROOT / "assets" / "demo_model"
LONG_MS = 120_000


@pytest.fixture
def app(tmp_path: Path) -> Iterator[AppProcess]:
    app = AppProcess(tmp_path, "--server-port", "0")
    try:
        app.announcement()
        yield app
    finally:
        app.kill()


def test_download_quantize_load_chat(
    app: AppProcess, new_page: Callable[..., ChatPage], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in DEMO.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    with StandInHub({"org/small": source}) as hub:
        chat = new_page(app.url)
        page = chat.page
        page.get_by_role("tab", name="Download").click()
        page.locator("#download-id input, #download-id textarea").fill("org/absent")
        page.locator("#download-endpoint input, #download-endpoint textarea").fill(hub.url)
        page.locator("button#download-plan").click()
        expect(page.locator("#download-planned")).to_contain_text("has no such model")
        page.locator("#download-id input, #download-id textarea").fill("org/small")
        page.locator("button#download-plan").click()
        expect(page.locator("#download-planned")).to_contain_text("model.safetensors")
        page.locator("button#download-start").click()
        expect(page.locator("#job-download-view")).to_contain_text("Finished", timeout=LONG_MS)

    page.get_by_role("tab", name="Quantize").click()
    for name, value in (("samples", "2"), ("seqlen", "64"), ("tokens", "512")):
        page.locator(f"#quantize-{name} input").fill(value)
        page.locator(f"#quantize-{name} input").press("Tab")
    expect(page.locator("#quantize-command")).to_contain_text("--eval-tokens 512")
    page.locator("button#quantize-start").click()
    expect(page.locator("#job-quantize-view .lmd-verdict")).to_be_visible(timeout=LONG_MS)
    expect(page.locator("#job-quantize-view .lmd-plot")).to_be_visible()
    page.locator("button#job-quantize-load").click()
    bar = page.locator("#status-bar")
    expect(bar).to_contain_text("demo_model-awq", timeout=LONG_MS)
    expect(bar).to_contain_text("Ready", timeout=LONG_MS)
    chat.send("What is the KV cache?")
    assert chat.wait_reply(1, timeout_s=120)

    page.get_by_role("tab", name="Jobs").click()
    page.locator("button#jobs-refresh").click()
    expect(page.locator("#jobs-choice")).to_be_visible()
    assert chat.foreign_requests() == []
