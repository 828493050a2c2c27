"""The compare tab in a real browser, over the bundled model."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from backend.chat import Delta
from backend.compare import ComparisonRoom
from backend.config import EngineConfig
from backend.engine.inline import ThreadHandle
from backend.engine_manager import LoadRequest
from backend.footprint import Footprint
from backend.services import Services, add_desk, local_services
from tests.app_process import ROOT
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import serve

DEMO = ROOT / "assets" / "demo_model"
LONG_MS = 120_000
QUESTION = "What is the KV cache?"


class Memory:
    """Stands in for what is known of models and of the device: `free` bytes of it."""

    free = 1 << 40

    async def of(self, config: EngineConfig) -> Footprint:
        return Footprint("cpu", "float32", "", 50_000_000, 5, 2, 64, 32, False, 2048, 6144, 512,
                         1024, 1 << 40, self.free)


@dataclass
class Desk:
    url: str
    services: Services
    memory: Memory


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The desk with engines in this process, so that they start fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMDESK_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("OMP_NUM_THREADS", "1")
        services, memory = local_services(LoadRequest(str(DEMO)), ThreadHandle), Memory()
        services.comparisons = ComparisonRoom(
            services.engines, ThreadHandle, footprints=memory)  # type: ignore[arg-type]
        add_desk(services, DEMO)
        with serve(services) as url:
            yield Desk(url, services, memory)


@pytest.fixture
def desk(browser: Browser, running: Desk) -> Desk:
    expect.set_options(timeout=LONG_MS)  # engines share the machine with the browser
    running.memory.free = 1 << 40
    return running


Open = Callable[..., ChatPage]


@pytest.fixture
def page(new_page: Open, desk: Desk) -> Iterator[Page]:
    chat = open_tab(new_page, desk)
    yield chat.page
    assert chat.foreign_requests() == [] and chat.problems == []


def open_tab(new_page: Open, desk: Desk, **options: object) -> ChatPage:
    chat = new_page(desk.url, **options)
    chat.page.set_default_timeout(LONG_MS)
    expect(chat.page.locator("#status-bar")).to_contain_text("demo_model", timeout=LONG_MS)
    chat.page.evaluate("window.LMDESK.showTab('compare')")
    expect(chat.page.locator("#compare-prompt textarea")).to_be_visible()
    return chat


def choose(page: Page, field: str, name: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=name).first.click()


def ask(page: Page, question: str = QUESTION) -> None:
    """Ask what is served, and the same model with an int8 KV cache."""
    if not page.locator("#compare-right-kv").is_visible():
        choose(page, "compare-right-target", "demo_model")
        expect(page.locator("#compare-right-kv")).to_be_visible()
        choose(page, "compare-right-kv", "8 bits")
    page.locator("#compare-prompt textarea").fill(question)
    page.locator("button#compare-go").click()


def answered(page: Page, state: str = "stop") -> None:
    for side in ("left", "right"):
        expect(page.locator(f"#pane-{side}-head [data-state={state}]")).to_be_visible(
            timeout=LONG_MS)
    expect(page.locator("button#compare-markdown")).to_be_visible()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that happens in the server."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def download(page: Page, button: str) -> tuple[str, str]:
    with page.expect_download() as info:
        page.locator(f"button#{button}").click()
    return info.value.suggested_filename, Path(info.value.path()).read_text(encoding="utf-8")


def test_both_at_once_then_exported_then_freed(page: Page, desk: Desk) -> None:
    ask(page, " ")
    expect(page.locator(".toast-body").last).to_contain_text("The message is empty")
    ask(page)
    answered(page)
    expect(page.locator("#compare-note [data-way=together]")).to_be_visible()
    for side, name in (("left", "demo_model"), ("right", "demo_model · KV int8")):
        expect(page.locator(f"#pane-{side}-head")).to_contain_text(name)
        expect(page.locator(f"#pane-{side}-reply")).to_contain_text("KV cache")
        expect(page.locator(f"#pane-{side}-foot [data-figure=ttft]")).to_contain_text(" s")
        assert float(page.locator(f"#pane-{side}-foot [data-figure=speed]").inner_text()) > 0
        assert int(page.locator(f"#pane-{side}-foot [data-figure=tokens]").inner_text()) > 3
    name, text = download(page, "compare-markdown")
    assert name == "comparison.md" and QUESTION in text and "| First token |" in text
    made = json.loads(download(page, "compare-json")[1])
    assert made["prompt"] == QUESTION and made["together"]
    assert [side["stats"]["completion_tokens"] > 3 for side in made["sides"]] == [True, True]
    assert made["sides"][1]["options"]["quant_policy"] == 8
    assert len(desk.services.comparisons.spare.loads) == 1
    page.locator("button#compare-free").click()
    expect(page.locator("button#compare-free")).to_be_hidden()
    assert desk.services.comparisons.spare.loads == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_one_after_the_other_and_the_served_model_leaves_when_it_may(
    page: Page, desk: Desk
) -> None:
    desk.memory.free = 0  # nothing beside what is served
    served = desk.services.engines.require()
    ask(page)
    expect(page.locator("#compare-question")).to_contain_text("no room for it")
    assert desk.services.engines.require() is served
    page.locator("button#compare-force").click()
    answered(page)
    expect(page.locator("#compare-note [data-way=in_turn]")).to_contain_text("loaded again")
    for side in ("left", "right"):
        expect(page.locator(f"#pane-{side}-reply")).to_contain_text("KV cache")
    until(lambda: desk.services.engines.current not in (None, served), "it is not loaded again")
    until(lambda: desk.services.engines.require().engine.state == "ready", "it is not ready")
    assert desk.services.comparisons.spare.loads == []


def unfold(page: Page, section: str) -> None:
    """Open a section, and let Gradio fill its fields, which takes it some frames: it would write
    over what is typed before."""
    page.locator(f"#{section} > button").click()
    page.evaluate("""() => new Promise((done) => requestAnimationFrame(
        () => requestAnimationFrame(() => requestIdleCallback(done))))""")


@contextmanager
def held(desk: Desk) -> Iterator[None]:
    """Replies go no further than their first piece."""
    reply = desk.services.classroom.reply

    async def holding(*args: Any) -> AsyncGenerator[Delta, None]:
        async with aclosing(reply(*args)) as deltas:
            async for delta in deltas:
                yield delta
                await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk.services.classroom, "reply", holding)
        yield


def test_stop_and_a_closed_tab_free_the_engine(new_page: Open, desk: Desk) -> None:
    chat = open_tab(new_page, desk)
    page, room = chat.page, desk.services.comparisons
    unfold(page, "compare-settings")
    page.locator("#compare-temperature input").fill("9")
    ask(page)
    expect(chat.toast).to_contain_text("temperature must be")
    page.locator("#compare-temperature input").fill("0")
    with held(desk):
        page.locator("button#compare-go").click()
        for side in ("left", "right"):
            expect(page.locator(f"#pane-{side}-foot [data-figure=tokens]")).to_be_visible()
        page.locator("#compare-prompt textarea").press("Escape")
        answered(page, "stopped")
        assert len(room.spare.loads) == 1 and desk.services.engines.num_open == 0
        page.locator("button#compare-go").click()
        expect(page.locator("#pane-right-foot [data-figure=tokens]")).to_be_visible()
        page.close()
        until(lambda: room.spare.loads == [], "the engine outlives the browser tab")
    until(lambda: desk.services.engines.num_open == 0, "the reply outlives the browser tab")


def test_a_benchmark_is_plotted_and_taken_along(new_page: Open, page: Page, desk: Desk) -> None:
    unfold(page, "benchmark-section")
    streams = page.locator("#benchmark-concurrency textarea, #benchmark-concurrency input")
    streams.fill("1 x")
    streams.press("Tab")
    expect(page.locator("#benchmark-command")).to_contain_text("whole numbers from 1 to 1024")
    streams.fill("2, 1")
    for name in ("prompt", "completion"):
        page.locator(f"#benchmark-{name} input").fill("4")
        page.locator(f"#benchmark-{name} input").press("Tab")
    expect(page.locator("#benchmark-command")).to_contain_text(
        "--concurrency 1 2 --prompt-tokens 4 --completion-tokens 4 --rounds 1")
    page.locator("button#benchmark-start").click()
    expect(page.locator("#job-benchmark-view .lmd-pill")).to_be_visible()
    # Another browser is attached to the same job, in another language and on a phone.
    phone = open_tab(new_page, desk, viewport={"width": 390, "height": 844}, locale="zh-CN").page
    unfold(phone, "benchmark-section")
    for shown, words in ((page, "Throughput"), (phone, "总吞吐")):
        view = shown.locator("#job-benchmark-view")
        expect(view.locator("[data-state=finished]").first).to_be_visible(timeout=LONG_MS)
        expect(view.locator("svg")).to_have_count(3)
        expect(view).to_contain_text(words)
        assert view.locator("[data-plot=throughput] circle").count() == 2
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    name, text = download(page, "job-benchmark-csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert name.endswith(".csv") and [row["concurrency"] for row in rows] == ["1", "2"]
    assert all(float(row["tok/s"]) > 0 for row in rows)


def test_perplexity_has_a_verdict(page: Page) -> None:
    unfold(page, "perplexity-section")
    choose(page, "perplexity-against", "demo_model")
    choose(page, "perplexity-kv", "8 bits")
    page.locator("#perplexity-tokens input").fill("256")
    page.locator("#perplexity-tokens input").press("Tab")
    expect(page.locator("#perplexity-command")).to_contain_text(
        "--quant-policy 8 --eval-tokens 256")
    page.locator("button#perplexity-start").click()
    verdict = page.locator("#job-evaluate-view .lmd-verdict")
    expect(verdict).to_contain_text("Perplexity", timeout=LONG_MS)


def test_a_finished_quantization_is_compared_by_one_click(new_page: Open, desk: Desk) -> None:
    store, library = desk.services.jobs, desk.services.library
    assert store is not None and library is not None
    made = Path(store.root).parent / "results" / "demo_model-awq"
    shutil.copytree(DEMO, made, ignore=lambda *_: ["train", "exam"])
    job = Path(store.root) / "20990101-000000-abcdef"  # as if it had quantized
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({
        "kind": "quantize", "title": "demo: W4A16 + KV int8", "argv": [], "created": 0.0,
        "details": {"model": str(DEMO), "load_options": {"quant_policy": 8}},
        "has_secret": False, "started": 0.0}))
    (job / "progress.jsonl").write_text(json.dumps({"event": "result", "path": str(made)}) + "\n")
    (job / "exit").write_text("0")
    page = new_page(desk.url).page
    page.evaluate("window.LMDESK.showTab('quantize')")
    page.locator("button#job-quantize-compare").click()
    expect(page.locator("#compare-prompt textarea")).to_be_visible()
    expect(page.locator("#compare-left-target input")).to_have_value("demo_model")
    expect(page.locator("#compare-right-target input")).to_have_value("demo_model-awq")
    expect(page.locator("#compare-right-kv input")).to_have_value("8 bits: about twice the tokens")
