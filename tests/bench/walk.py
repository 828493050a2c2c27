"""The pictures of docs/walk.md: a new user's way through the page, in both languages.

    python -m tests.bench.walk [--only en] [--images DIR]

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
QUESTIONS = {
    "en": ("What is the KV cache?", "When should I set quant_policy?"),
    "zh": ("什么是 KV cache？", "什么时候该设置 quant_policy？"),
}
SCREEN = {"width": 1280, "height": 800}
COLOURS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(LOCALES), help="one language")
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.images.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        for language in [args.only] if args.only else LOCALES:
            with tempfile.TemporaryDirectory() as home:
                walk(browser, language, Path(home), args.images)
        browser.close()


def walk(browser: Browser, language: str, home: Path, images: Path) -> None:
    """All steps in one language."""
    os.environ["LMDESK_HOME"] = str(home / "lmdesk")  # a short path for the pictures
    app = AppProcess(home, "--server-port", "0", "--no-model")
    try:
        app.announcement()
        context = browser.new_context(
            locale=LOCALES[language], viewport=SCREEN, color_scheme="light")
        page = context.new_page()

        def picture(name: str) -> None:
            save(page, images / f"{name}.{language}.png")
            print(f"{name}.{language}.png", flush=True)

        take(NewUser(ChatPage(page, app.url).open(), picture), home, *QUESTIONS[language])
        context.close()
    finally:
        app.kill()


def take(user: NewUser, home: Path, question: str, second: str) -> None:
    """The walk, with a picture of each step."""
    with StandInHub({MODEL: repository(home / "repository")}) as hub:
        user.plan_download(hub.url)
        expect(user.at("#download-planned .lmd-plan")).to_be_visible()
        user.picture("download")
        user.download()
        user.downloaded()
    user.prepare_quantization()
    user.at("#quantize-model").scroll_into_view_if_needed()
    user.picture("quantize")
    user.quantize()
    user.at("#job-quantize-view").scroll_into_view_if_needed()
    user.picture("verdict")
    user.configure()
    user.picture("config")
    user.save_and_load()
    user.ask(question)
    user.ask(second)
    user.picture("chat")
    user.compare(question)
    user.at("#pane-left").scroll_into_view_if_needed()
    user.picture("compare")
    user.open("jobs")
    expect(user.at("#job-any-view .lmd-job")).to_be_visible()
    user.picture("jobs")
    user.open("guide")
    expect(user.at("#guide-about")).not_to_be_empty()
    user.picture("guide")


def save(page: Page, path: Path) -> None:
    """What is in sight, in few colours: a fifth of the bytes, and no eye sees it."""
    page.mouse.move(0, 0)
    seen = page.screenshot(animations="disabled")
    image = Image.open(io.BytesIO(seen)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
