"""The page's figures, each beside its aim: what it costs, how late it is, how soon it is there.

    python -m tests.bench.page [--only NAME ...] [--sessions 40] [--seconds 10] [--turns 4]

    start      from `python app.py --no-model` to its page, and from opening that to typing in it
    sessions   CPU of the page's process while so many replies are being written
    first      what the page adds to the first token's time
    late       how late tokens are in the browser, turn by turn
    stop       from pressing Stop to the engine's being free
    closed     from closing the browser's tab to the engine's being free

A real Chromium, over a chat that stamps its tokens (tests/bench/page_server.py). Prints a Markdown
table; docs/desk-performance.md holds one as it was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.app_process import AppProcess, environment
from tests.bench.page_server import DAY_MS
from tests.bench.page_sessions import cost_of_sessions
from tests.browser import find_browser
from tests.e2e.chat_page import ChatPage
from ui.conversations import GRACE_S

BOUND_S = 180.0  # for what a busy machine may take long to do
TOKENS, RATE = 1500, 150
REPEATS = 8
# When the thread has changed, looks in the next frame for new tokens. `first` is when the
# first was seen, `worst` how late the latest was, in milliseconds.
WATCH = """(day) => {
  const seen = window.seen = {};
  window.forget = () => Object.assign(seen,
    {since: Date.now() % day, last: -1, first: null, worst: 0});
  window.forget();
  const look = () => {
    const rows = document.querySelectorAll("#chat .bot-row");
    const live = document.querySelector("#live").textContent.trim();
    const text = live || rows[rows.length - 1]?.textContent;
    for (const [, index, stamp] of (text || "").slice(-6000).matchAll(/t(\\d+):(\\d{8})/g)) {
      if (+index <= seen.last || +stamp < seen.since) continue; // or of an earlier turn
      const now = Date.now();
      seen.first ??= now;
      seen.last = +index;
      seen.worst = Math.max(seen.worst, ((now % day) - stamp + day) % day);
    }
  };
  let waits = false;
  new MutationObserver(() => {
    if (!waits) requestAnimationFrame(() => { waits = false; look(); });
    waits = true;
  }).observe(document.querySelector("#thread"),
    {childList: true, subtree: true, characterData: true});
  document.addEventListener("keydown", () => { window.pressed = Date.now(); }, true);
}"""
FORGET = "() => { window.forget() }"


@dataclass
class Figure:
    """A figure, and the most that it should be."""

    what: str
    value: float
    aim: float
    unit: str
    note: str = ""
    valid: bool = True  # false: the machine was too busy for a verdict

    def row(self) -> str:
        verdict = ("met" if self.value <= self.aim else "missed") if self.valid else "no verdict"
        measured = f"{self.value:.2f}" if self.unit != "ms" else f"{self.value:.0f}"
        note = f" ({self.note})" if self.note else ""
        aim = f"{self.aim:g} {self.unit}"
        return f"| {self.what} | {measured} {self.unit}{note} | {aim} | {verdict} |"


class PageServer:
    """tests.bench.page_server, as a process."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.page_server", str(folder)], text=True,
            env=environment(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def when(self, event: str, message: str) -> float:
        """time.time() of the next such event; those before it are forgotten."""
        while True:
            found = self._events.get(timeout=BOUND_S)
            if found["event"] == event and found["message"] == message:
                return float(found["at"])

    def close(self) -> None:
        self.process.communicate(timeout=BOUND_S)


class Bench:
    """Measures over one server and one browser."""

    def __init__(self, args: argparse.Namespace, server: PageServer, browser: Browser) -> None:
        self.args, self.server, self.browser = args, server, browser
    @contextmanager
    def page(self) -> Iterator[ChatPage]:
        """An open page that watches its tokens."""
        with self.browser.new_context(locale="en-US") as context:
            page = open_chat(context.new_page(), self.server.url)
            page.page.evaluate(WATCH, DAY_MS)
            yield page

    def sessions(self) -> list[Figure]:
        count, rate, seconds = self.args.sessions, 50, self.args.seconds
        cost = cost_of_sessions(
            self.server.url.rstrip("/"), self.server.process.pid, count, rate, seconds)
        with ThreadPoolExecutor() as threads:  # the browser's driver has an event loop in this one
            cores, updates = threads.submit(asyncio.run, cost).result()
        note = f"{updates:.1f} updates a second to the slowest"
        return [Figure(f"CPU of {count} replies of {rate} tokens/s", cores, 0.5, "cores", note,
                       valid=updates >= 9)]

    def first(self) -> list[Figure]:
        added = []
        with self.page() as page:
            for number in range(REPEATS):
                message = f"20 tokens at 100, {number}"
                page.page.evaluate(FORGET)
                page.send(message)
                asked = self.server.when("asked", message) * 1000
                page.wait_reply(number + 1, BOUND_S)
                seen = self._seen(page, 19)
                made = self.server.when("first", message) * 1000
                added.append((asked - seen["pressed"]) + (seen["first"] - made))
        note = f"median of {REPEATS}, worst {max(added):.0f} ms"
        return [Figure("UI's part of the first token's delay", statistics.median(added), 100,
                       "ms", note)]

    def late(self) -> list[Figure]:
        figures = []
        with self.page() as page:
            for turn in range(1, self.args.turns + 1):
                page.page.evaluate(FORGET)
                page.send(f"{TOKENS} tokens at {RATE}")
                used = renderer_seconds()
                page.wait_reply(turn, BOUND_S)
                worst = self._seen(page, TOKENS - 1)["worst"]
                used = renderer_seconds() - used
                figures.append(Figure(f"latest of {TOKENS} tokens at {RATE}/s, turn {turn}",
                                      worst / 1000, 0.5, "s", f"{used:.1f} s of the browser's CPU"))
        return figures

    def _seen(self, page: ChatPage, last: int) -> dict[str, Any]:
        """What the page's watch has seen, once that is token `last`."""
        page.page.wait_for_function("last => window.seen.last >= last", arg=last)
        return page.page.evaluate("() => ({...window.seen, pressed: window.pressed})")

    def stop(self) -> list[Figure]:
        return [Figure(f"engine free after Stop, {state}", self._freed(message, stop=True), 2, "s")
                for state, message in (("waiting", "nothing"), ("writing", "9000 tokens at 50"))]

    def closed(self) -> list[Figure]:
        return [Figure(f"engine free after the tab was closed and {GRACE_S:g} s of grace, {state}",
                       self._freed(message, stop=False) - GRACE_S, 2, "s")
                for state, message in (("waiting", "nothing"), ("writing", "9000 tokens at 50"))]

    def _freed(self, message: str, stop: bool) -> float:
        """Seconds from the end that its user puts to a reply until the chat is freed of it."""
        with self.page() as page:
            page.send(message)
            self.server.when("asked", message)
            words = "Waiting" if message == "nothing" else "t30:"
            expect(page.live).to_contain_text(words, timeout=BOUND_S * 1000)
            began = time.time()
            page.stop() if stop else page.page.close()
            return self.server.when("closed", message) - began


def open_chat(page: Page, url: str) -> ChatPage:
    """Without a model, the page opens on another tab."""
    chat = ChatPage(page, url).open()
    page.evaluate("() => window.LMDESK.showTab('chat')")
    return chat


def renderer_seconds() -> float:
    """CPU time of this process's browser where it draws pages."""
    return sum(sum(child.cpu_times()[:2])
               for child in psutil.Process().children(recursive=True)
               if "--type=renderer" in child.cmdline())


def start(browser: Browser, folder: Path) -> list[Figure]:
    """The real command without a model; the page by a browser that never saw it."""
    began = time.monotonic()
    app = AppProcess(folder, "--no-model", "--server-port", "0")
    try:
        app.announcement()
        httpx.get(app.url, timeout=BOUND_S).raise_for_status()
        served = time.monotonic() - began
        times = []
        for _ in range(3):
            with browser.new_context(locale="en-US") as context:
                began = time.monotonic()
                open_chat(context.new_page(), app.url).box.fill("typed")
                times.append(time.monotonic() - began)
    finally:
        app.kill()
    return [Figure("server start to page, without model", served, 8, "s"),
            Figure("page opened and usable", statistics.median(times), 3, "s",
                   f"median of {len(times)}, worst {max(times):.2f} s")]


def main() -> None:
    names = ("start", "sessions", "first", "late", "stop", "closed")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    expect.set_options(timeout=BOUND_S * 1000)
    load = f"load {os.getloadavg()[0]:.1f} before"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        server = PageServer(Path(folder))
        bench = Bench(args, server, browser)
        parts: dict[str, Callable[[], list[Figure]]] = {
            "start": lambda: start(browser, Path(folder)), "sessions": bench.sessions,
            "first": bench.first, "late": bench.late, "stop": bench.stop, "closed": bench.closed}
        try:
            print("| what | measured | aim | |\n|---|---|---|---|")
            for name in args.only:
                for figure in parts[name]():
                    print(figure.row(), flush=True)
        finally:
            server.close()
            browser.close()
    print(f"\n{os.cpu_count()} cores, Python {platform.python_version()}, {load}, "
          f"{os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
