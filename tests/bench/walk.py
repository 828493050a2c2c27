"""The pictures of docs/walk.md: a new user's way through the page, in both languages.

    python -m tests.bench.walk [--images DIR]

It downloads the bundled model from a stand-in hub, quantizes, configures, loads, asks and compares
it, all of it really, in a real browser.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.app_process import ROOT, AppProcess
from tests.browser import find_browser
from tests.e2e.chat_page import ChatPage
from tests.e2e.new_user import MODEL, NewUser, repository
from tests.stand_in_hub import StandInHub

IMAGES = ROOT / "docs" / "images"
LOCALES = {"en": "en-US", "zh": "zh-CN"}
QUESTIONS = (
    ("What is the KV cache?", "When should I set quant_policy?"),
    ("什么是 KV cache？", "什么时候该设置 quant_policy？"),
)
SCREEN = {"width": 1280, "height": 800}
COLOURS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=IMAGES)
    images = parser.parse_args().images
    images.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=120_000)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        os.environ["LMDESK_HOME"] = f"{folder}/lmdesk"  # a short path for the pictures
        app = AppProcess(Path(folder), "--server-port", "0", "--no-model")
        try:
            app.announcement()
            take([open_page(browser, app.url, language, images) for language in LOCALES],
                 Path(folder))
        finally:
            app.kill()
        browser.close()


def open_page(browser: Browser, url: str, language: str, images: Path) -> NewUser:
    """A reader of one language, and where the pictures of the pages go."""
    context = browser.new_context(locale=LOCALES[language], viewport=SCREEN, color_scheme="light")
    page = context.new_page()

    def picture(name: str) -> None:
        save(page, images / f"{name}.{language}.png")
        print(f"{name}.{language}.png", flush=True)

    return NewUser(ChatPage(page, url).open(), picture)


def take(users: list[NewUser], home: Path) -> None:
    """The walk, with a picture of each step by each reader; the first one does the work."""
    first = users[0]
    with StandInHub({MODEL: repository(home / "repository")}) as hub:
        for user in users:
            user.plan_download(hub.url)
            expect(user.at("#download-planned .lmd-plan")).to_be_visible()
            user.picture("download")
        first.download()
        first.downloaded()
    for user in users:
        user.prepare_quantization()
        user.picture("quantize")
    first.quantize()
    for user in users:
        if user is not first:  # a reloaded page finds the job
            user.chat.reload()
            user.open("quantize")
        user.job_is("quantize", "finished")
        user.page.evaluate("document.querySelector('#job-quantize').scrollIntoView()")
        user.picture("verdict")
    for user in users:
        user.configure()
        user.picture("config")
    first.save_and_load()
    for user, questions in zip(users, QUESTIONS):
        for question in questions:
            user.ask(question)
        user.picture("chat")
    for user, questions in zip(users, QUESTIONS):
        user.compare(questions[0])
        user.page.evaluate("document.querySelector('#compare-prompt').scrollIntoView()")
        user.picture("compare")


def save(page: Page, path: Path) -> None:
    """What is in sight, in few colours: a fifth of the bytes, and no eye sees it."""
    page.mouse.move(0, 0)
    seen = page.screenshot(animations="disabled")
    image = Image.open(io.BytesIO(seen)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
