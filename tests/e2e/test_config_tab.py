"""The config tab in a real browser, over a real workspace: form, memory, diff, save, load, undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

import app
from backend.target import BUNDLED_MODEL
from backend.workspace.config_ini import read_ini
from backend.workspace.keys import KEYS
from backend.workspace.layout import CONFIG_INI
from tests.app_process import AppProcess, until
from tests.e2e.chat_page import ChatPage
from ui.forms import setting_value

Open = Callable[..., ChatPage]
SLOW = 60_000  # ms, of a busy machine


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "desk"
    argv = ["convert", "desk", str(BUNDLED_MODEL), "--dst-path", str(folder)]
    assert app.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def server(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppProcess]:
    home = tmp_path_factory.mktemp("home")
    started = AppProcess(home, "--server-port", "0", "--model-dirs", workspace,
                         "--max-batch-size", "4")  # fmt: skip
    started.announcement()
    yield started
    started.kill()


class ConfigPage:
    """What a person does in the tab."""

    def __init__(self, page: Page, chosen: str) -> None:
        self.page = page
        page.locator("#tab-config-button").click()
        expect(page.locator("#config-memory dl")).to_be_visible(timeout=SLOW)
        page.locator("#config-model input").click()
        page.get_by_role("option", name=chosen, exact=True).click()
        expect(page.locator("#config-ini")).to_be_visible(timeout=SLOW)
        expect(self.memory).to_be_visible(timeout=SLOW)

    @property
    def memory(self) -> Locator:
        return self.page.locator("#config-memory dl")

    @property
    def diff(self) -> Locator:
        return self.page.locator("#config-diff")

    def button(self, name: str) -> Locator:
        return self.page.locator(f"button#config-{name}")

    def type(self, key: str, value: str) -> None:
        self.page.locator(f"#config-ini-{key} input").fill(value)

    def choose(self, key: str, value: str) -> None:
        self.page.locator(f"#config-ini-{key} input").click()
        self.page.get_by_role("option", name=value, exact=True).click()


def test_edit_diff_save_undo_and_load(new_page: Open, server: AppProcess, workspace: Path) -> None:
    chat = new_page(server.url, viewport={"width": 1280, "height": 800})
    desk, path = ConfigPage(chat.page, "desk"), workspace / CONFIG_INI
    original = path.read_bytes()
    expect(desk.memory).to_contain_text("5,120 bytes, 32 bit")
    field = chat.page.locator("#config-ini-max_batch_size")
    expect(field).to_contain_text("--max-batch-size wins: 4")
    expect(chat.page.locator("#config-ini-quant_policy")).to_contain_text("4 is int8")

    desk.choose("quant_policy", "4")
    desk.type("rope_scaling_factor", "2")
    desk.type("max_batch_size", "8")
    for line in ("-quant_policy = 0", "+quant_policy = 4", "+rope_scaling_factor = 2.0",
                 "+max_batch_size = 8"):  # fmt: skip
        expect(desk.diff).to_contain_text(line, timeout=SLOW)
    expect(desk.memory).to_contain_text("1,360 bytes, 8 bit", timeout=SLOW)
    assert path.read_bytes() == original  # only shown so far

    desk.type("session_len", "3")
    expect(desk.diff).to_contain_text("session_len must be at least 16", timeout=SLOW)
    expect(desk.button("save")).to_be_disabled()
    desk.type("session_len", "1024")
    expect(desk.button("save")).to_be_enabled(timeout=SLOW)
    desk.button("apply").click()
    expect(chat.page.locator("#config-state")).to_contain_text("runs with these", timeout=SLOW)
    text = path.read_text()
    for line in ("quant_policy = 4", "rope_scaling_factor = 2.0", "max_batch_size = 8",
                 "session_len = 1024"):  # fmt: skip
        assert f"{line}\n" in text

    def status() -> dict[str, Any]:
        return httpx.get(f"{server.url}/api/status", timeout=30).json()

    until(lambda: status()["state"] == "ready", "the status is not ready")  # it is kept a moment
    assert status()["model"] == "desk"
    info = status()["info"]
    assert (info["kv_bits"], info["session_len"]) == (8, 1024)
    assert info["max_batch_size"] == 4  # the flag's

    desk.button("undo").click()
    until(lambda: path.read_bytes() == original, "undo does not bring the bytes back")
    expect(desk.button("undo")).to_be_disabled(timeout=SLOW)
    assert chat.foreign_requests() == [] and chat.problems == []


class Client:
    """A client of the web, which sends fields of its own making."""

    def __init__(self, server: AppProcess) -> None:
        self.url = f"{server.url}/gradio_api/queue"
        config = httpx.get(f"{server.url}/config", timeout=30).json()
        self.calls = config["dependencies"]
        self.names = {c["id"]: c["props"].get("elem_id") or "" for c in config["components"]}

    def call(self, trigger: str, event: str, values: dict[str, object]) -> str:
        """Everything that the server answers."""
        number = next(id for id, name in self.names.items() if name == trigger)
        call = next(d for d in self.calls if [number, event] in map(list, d["targets"]))
        data = [values.get(self.names[field]) for field in call["inputs"]]
        body = {"data": data, "fn_index": call["id"], "session_hash": "client",
                "trigger_id": number}  # fmt: skip
        assert httpx.post(f"{self.url}/join", json=body, timeout=30).status_code == 200
        said = ""
        url = f"{self.url}/data?session_hash=client"
        with httpx.stream("GET", url, timeout=60) as stream:
            for line in stream.iter_lines():
                said += line
                if "process_completed" in line:
                    return said
        return said


def test_what_a_client_posts_is_checked_again(server: AppProcess, workspace: Path) -> None:
    before = (workspace / CONFIG_INI).read_bytes()
    client = Client(server)
    client.call("tab-config", "select", {})
    shown = read_ini(workspace / CONFIG_INI).values
    mine = {f"config-ini-{name}": setting_value(key, shown.get(name)) for name, key in KEYS.items()}
    mine["config-model"] = str(workspace)
    for key, value, words in (
        ("head_num", "99", "head_num cannot be changed"),
        ("weight_type", "int4", "weight_type cannot be changed"),
    ):
        assert words in client.call("config-save", "click", {**mine, f"config-ini-{key}": value})
    for foreign in ("/etc", str(workspace / "../..")):
        said = client.call("config-save", "click", {"config-model": foreign})
        assert '"success":false' in said
    assert (workspace / CONFIG_INI).read_bytes() == before


def test_in_chinese_on_a_phone(new_page: Open, server: AppProcess) -> None:
    phone = new_page(server.url, viewport={"width": 390, "height": 844}, locale="zh-CN")
    desk = ConfigPage(phone.page, "desk")
    policy = phone.page.locator("#config-ini-quant_policy")
    expect(policy).to_contain_text("在 workspace 中 4 表示 int8")
    expect(desk.button("apply")).to_have_text("保存并加载")
    desk.type("session_len", "512")
    expect(desk.diff).to_contain_text("+session_len = 512", timeout=SLOW)
    expect(desk.memory).to_contain_text("每个 token 的 KV Cache")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.problems == []
