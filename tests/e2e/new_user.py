"""What a new user does with only the page, step by step, in any language: for the test that this
works, and for the pictures of it in docs/walk.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from tests.app_process import ROOT
from tests.e2e.chat_page import ChatPage

LONG_MS = 400_000  # a busy machine
MODEL = "lmdesk/demo"  # of the stand-in hub
RESULT = "demo-awq"
Picture = Callable[[str], None]


def repository(folder: Path) -> Path:
    """The bundled model as a hub's repository."""
    folder.mkdir()
    for path in (ROOT / "assets" / "demo_model").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


class NewUser:
    """Args:
        chat: the page, open.
        picture: called with a name when there is something to see.
    """

    def __init__(self, chat: ChatPage, picture: Picture = lambda name: None) -> None:
        self.chat, self.page, self.picture = chat, chat.page, picture

    def at(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def open(self, tab: str) -> None:
        """Open a tab by its id."""
        self.page.evaluate("id => window.LMDESK.showTab(id)", tab)
        expect(self.at(f"#tab-{tab}")).to_be_visible()

    def fill(self, id: str, value: str) -> None:
        field = self.at(f"#{id} input, #{id} textarea").first
        field.fill(value)
        field.press("Tab")

    def choose(self, id: str, option: str) -> None:
        """An option of a dropdown, by its words."""
        self.at(f"#{id} input").click()
        self.page.get_by_role("option", name=option).first.click()

    def plan_download(self, endpoint: str, id: str = MODEL) -> None:
        self.fill("download-id", id)
        self.fill("download-endpoint", endpoint)
        self.at("button#download-plan").click()

    def download(self) -> None:
        """What is planned."""
        expect(self.at("#download-planned .lmd-plan")).to_contain_text("model.safetensors")
        self.at("button#download-start").click()

    def downloaded(self) -> None:
        self.job_is("download", "finished")

    def job_is(self, kind: str, state: str) -> None:
        expect(self.at(f'#job-{kind}-view .lmd-job[data-state="{state}"]')).to_be_visible(
            timeout=LONG_MS)

    def prepare_quantization(self, model: str = MODEL) -> None:
        """Choose it, with little text, and wait for what it will take."""
        self.open("quantize")
        self.choose("quantize-model", model)
        for name, value in (("samples", "2"), ("seqlen", "64"), ("tokens", "512")):
            self.fill(f"quantize-{name}", value)
        expect(self.at("#quantize-command")).to_contain_text("--eval-tokens 512", timeout=LONG_MS)
        expect(self.at("#quantize-plan")).to_contain_text(RESULT)

    def quantize(self) -> None:
        self.at("button#quantize-start").click()
        expect(self.at("#job-quantize-view .lmd-verdict")).to_be_visible(timeout=LONG_MS)
        expect(self.at("#job-quantize-view .lmd-plot")).to_be_visible()
        self.job_is("quantize", "finished")

    def configure(self, model: str = RESULT) -> None:
        """KV int8, dynamic NTK, fewer sequences: what it means, the change, then load it."""
        self.open("config")
        memory = self.at("#config-memory dl")
        expect(memory).to_be_visible(timeout=LONG_MS)
        self.choose("config-model", model)
        expect(self.at("#config-about")).to_contain_text(model, timeout=LONG_MS)
        self.choose("config-engine-quant_policy", "8")
        for key, value in (("rope_scaling_factor", "2"), ("max_batch_size", "8")):
            self.at(f"#config-engine-{key} input").fill(value)
        for line in ("quant_policy = 8", "rope_scaling_factor = 2", "max_batch_size = 8"):
            expect(self.at("#config-diff")).to_contain_text(line, timeout=LONG_MS)
        expect(self.at("#config-diff")).not_to_contain_text("use_logn_attn")  # nobody touched it
        expect(self.at("#config-memory")).to_contain_text("1,360", timeout=LONG_MS)

    def save_and_load(self, model: str = RESULT) -> None:
        """Save the settings, then load what the quantization has made with its own button."""
        self.at("button#config-save").click()
        expect(self.at("#config-state .lmd-said")).to_be_visible(timeout=LONG_MS)
        self.open("quantize")
        self.at("button#job-quantize-load").click()
        self.is_served(model)

    def is_served(self, model: str) -> None:
        bar = self.at("#status-bar")
        expect(bar.locator('[data-status="model"]')).to_have_text(model, timeout=LONG_MS)
        expect(bar.locator('[data-state="ready"]')).to_be_visible(timeout=LONG_MS)

    def ask(self, question: str) -> str:
        self.open("chat")
        number = self.at("#chat .bot-row").count() + 1
        self.chat.send(question)
        return self.chat.wait_reply(number, timeout_s=LONG_MS / 1000)

    def compare(self, question: str, other: str = MODEL) -> None:
        """What is served beside the 16-bit model that it was made of."""
        self.open("compare")
        self.choose("compare-right-target", other)
        self.fill("compare-prompt", question)
        self.at("button#compare-go").click()
        expect(self.at("button#compare-markdown")).to_be_visible(timeout=LONG_MS)

    def export(self) -> str:
        """The chat as Markdown."""
        self.open("chat")
        self.at("#chat-tools button").first.click()
        with self.page.expect_download() as download:
            self.at("button#export-markdown").click()
        return Path(download.value.path()).read_text(encoding="utf-8")


def untranslated(page: Page) -> list[str]:
    """Keys of texts that stand on the page in place of the texts."""
    words: str = page.evaluate("document.body.innerText")
    spaces = ("download.", "quantize.", "job.", "jobs.", "chat.", "models.", "settings.", "guide.",
              "compare.", "verdict.", "tab.", "page.", "help.", "error.", "script.")
    return [word for word in words.split()
            if word.startswith(spaces) and word.replace(".", "").replace("_", "").isalnum()]
