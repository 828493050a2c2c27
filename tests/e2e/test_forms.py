"""Forms of the desk in a real browser: a calibration text of one's own, a download given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from backend.engine_manager import EngineManager
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.quick_command import QuickCommands
from backend.services import Services
from tests.app_process import ROOT
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import FakeChat, serve
from tests.e2e.new_user import NewUser
from tests.stand_in_hub import StandInHub

SLOW_MS = 120_000  # a busy machine starts a job
Open = Callable[..., ChatPage]


async def planned(self: QuickCommands, argv: Sequence[str]) -> dict[str, Any]:
    """In place of a process that looks at model and text; tests/unit/test_quantize_form.py has
    the real one."""
    return {"plan": {"device": "cpu", "dtype": "float32", "memory": 1, "memory_free": 9,
                     "target": None}}


@dataclass
class Desk:
    url: str
    home: Path
    library: ModelLibrary


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The desk without an engine; a download is a job, a process of its own."""
    home = tmp_path_factory.mktemp("home")
    library = ModelLibrary(ROOT / "assets" / "demo_model", [home / "models"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMDESK_HOME", str(home))
        patch.setattr(QuickCommands, "ask", planned)
        services = Services(
            FakeChat(), engines=EngineManager(), jobs=JobStore(home / "jobs"), library=library)
        with serve(services) as url:
            yield Desk(url, home, library)


def pick(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("button#quantize-pick").click()
    chooser.value.set_files(file)


def test_an_own_text_is_read_by_the_browser(new_page: Open, desk: Desk, tmp_path: Path) -> None:
    chat = new_page(desk.url, locale="zh-CN")
    user, page = NewUser(chat), chat.page
    text, unread = user.at("#quantize-text textarea"), user.at("#quantize-unread")
    command = user.at("#quantize-command")
    own, old, long, lines = (tmp_path / n for n in ("own.txt", "old.txt", "long.txt", "own.jsonl"))
    own.write_text("KV 缓存 <b>\n", encoding="utf-8")
    old.write_bytes("缓存".encode("gbk"))
    long.write_bytes(bytes(16_000_001))
    lines.write_text('{"text": "one"}\n', encoding="utf-8")
    user.open("quantize")
    user.at("#quantize-data input").click()
    page.get_by_role("option", name="自己的文本").click()
    expect(user.at("#quantize-data-note")).to_contain_text("文本")  # there is none yet
    pick(page, own)
    expect(text).to_have_value(own.read_text(encoding="utf-8"))
    expect(command).to_contain_text(".txt")
    for file, why in ((old, "UTF-8"), (long, "16 MB")):
        pick(page, file)
        expect(unread).to_contain_text(file.name)
        expect(unread).to_contain_text(why)
        expect(text).to_have_value(own.read_text(encoding="utf-8"))
    pick(page, lines)
    expect(command).to_contain_text(".jsonl")
    expect(unread).to_be_hidden()
    assert not [url for url in chat.requests if "upload" in url]
    assert chat.foreign_requests() == [] and chat.problems == []


def test_a_running_download_is_cancelled(new_page: Open, desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(4 << 20))
    chat = new_page(desk.url)
    user = NewUser(chat)
    user.open("download")
    with StandInHub({"org/slow": tmp_path}) as hub:
        hub.bytes_per_s = 50_000  # a minute and more
        user.plan_download(hub.url, "org/slow")
        user.download()
        view = user.at("#job-download-view")
        expect(view.locator("progress, [role=progressbar]").first).to_be_visible(timeout=SLOW_MS)
        user.at("button#job-download-cancel").click()
        user.job_is("download", "cancelled")
        expect(user.at("button#job-download-cancel")).to_be_hidden()
    assert [model.name for model in desk.library.models()] == ["demo_model"]
    left = [path for path in (desk.home / "models").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] == [".lock"]  # empty
    assert chat.foreign_requests() == [] and chat.problems == []
