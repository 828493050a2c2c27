"""What the compare tab lets in, and what it draws; the browser's part is in tests/e2e."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend.benchmark_result import BenchmarkResult
from backend.chat import ReplyStats
from backend.classroom import SCOPE_KEY, Caller, HostOnlyError, Role
from backend.compare import Comparison, Pane, Plan, Side
from backend.config import SamplingParams
from backend.engine_manager import LoadRequest
from backend.errors import UserError
from backend.services import Services, add_desk, local_services, remote_services
from tests.app_process import ROOT
from tests.e2e.fake_chat import FakeChat
from ui import benchmark_view, compare_view
from ui.compare_tab import CompareTab
from ui.compare_target import SERVED, SERVER

DEMO = ROOT / "assets" / "demo_model"


def request(role: Role = Role.HOST) -> Any:
    scope = {SCOPE_KEY: Caller("someone", "someone", role)}
    return SimpleNamespace(headers={}, cookies={}, session_hash="tab",
                           request=SimpleNamespace(scope=scope))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompareTab]:
    """Over a desk whose engine is not started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMDESK_HOME", str(tmp_path_factory.mktemp("home")))
        services = local_services(LoadRequest(str(DEMO)))
        add_desk(services, DEMO)
        yield build(services)


def build(services: Services) -> CompareTab:
    with gr.Blocks():
        return CompareTab(services)


def form(tab: CompareTab, **right: Any) -> dict[Any, Any]:
    """The page's values; `right` are the right picker's fields."""
    sides = tab.sides
    values: dict[Any, Any] = {sides.prompt: "Hello", sides.system_prompt: ""}
    values |= dict(zip(sides.sampling.values(), (0.0, 16, None)))
    for picker, chosen in zip(sides.pickers, ({}, right)):
        fields = {"target": SERVED, "kv": "default", "url": "", "api_key": "", "model": ""}
        values |= {getattr(picker, name): value for name, value in {**fields, **chosen}.items()}
    return values


@pytest.mark.parametrize(("right", "told"), [
    ({"target": "/etc"}, "in none of the folders"),
    ({"target": f"{DEMO}/../../../../etc"}, "in none of the folders"),
    ({"target": f"{DEMO}/nothing"}, "There is no model"),
    ({"target": ["x"]}, "No model is chosen"),
    ({"target": str(DEMO), "kv": "16"}, "not one of the choices"),
    ({"target": str(DEMO), "kv": None}, "not one of the choices"),
    ({"target": SERVER}, "Type the address"),
    ({"target": SERVER, "url": "http://10.0.0.1:80"}, "not one of this page's servers"),
    ({"target": SERVER, "url": "http://169.254.169.254/latest"}, "never contacted"),
    ({"target": SERVER, "url": "x" * 3000}, "2000 characters"),
    ({"target": SERVER, "url": "127.0.0.1:1", "model": {"a": 1}}, "2000 characters"),
])
def test_targets_that_are_not_allowed(tab: CompareTab, right: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        asyncio.run(tab.sides.pickers[1].side(form(tab, **right), "en"))


def test_targets(tab: CompareTab) -> None:
    picker = tab.sides.pickers[1]

    def side(**right: Any) -> Side:
        return asyncio.run(picker.side(form(tab, **right), "en"))

    assert side().name == "demo_model" and side().load is None
    assert side(target=str(DEMO)).load is None  # what is served, as it is served
    loaded = side(target=str(DEMO), kv="8")
    assert loaded.name == "demo_model · KV int8" and loaded.load is not None
    assert loaded.load.config().kv_cache_bits == 8
    remote = side(target=SERVER, url=" 127.0.0.1:9 ", model="m")
    assert (remote.name, remote.model) == ("m", "m") and remote.backend is not None


def test_restful_pages_compare_models_of_their_server() -> None:
    services = remote_services("http://127.0.0.1:9")
    tab = build(services)
    assert tab.jobs == []
    picker = tab.sides.pickers[0]
    side = asyncio.run(picker.side(form(tab) | {picker.model: "that"}, "en"))
    assert side == Side("that", services.chat, model="that")
    fake = build(Services(FakeChat()))
    assert asyncio.run(fake.sides.pickers[1].side(form(fake), "en")).name == "fake-model"


def test_students_compare_only_what_is_served(tab: CompareTab) -> None:
    sides = tab.sides
    for right, allowed in (({}, True), ({"target": str(DEMO)}, False),
                           ({"target": SERVER, "url": "127.0.0.1:9"}, False)):
        for role in Role:
            if allowed or role is Role.HOST:
                sides.check_caller(form(tab, **right), request(role))
            else:
                with pytest.raises(HostOnlyError):
                    sides.check_caller(form(tab, **right), request(role))
    benchmark, perplexity = tab.jobs
    starts = (
        benchmark.on_start(str(DEMO), "default", "1", 4, 4, 1, request(Role.STUDENT)),
        perplexity.on_start(str(DEMO), "alone", "0", 64, request(Role.STUDENT)),
    )
    for start in starts:
        asyncio.run(start)
    assert list(benchmark.store.list()) == []


@pytest.mark.parametrize(("prompt", "told"), [
    ("  ", "empty"), (None, "empty"), (["x"], "characters"), ("x" * 200_001, "200000 characters"),
])
def test_prompts_that_are_none(tab: CompareTab, prompt: Any, told: str) -> None:
    values = form(tab) | {tab.sides.prompt: prompt}
    with pytest.raises(UserError, match=told):
        tab.sides._messages(values, "en")


def test_an_ask_that_is_refused_has_no_success(tab: CompareTab) -> None:
    """What draws the replies follows success alone: it would meet the next ask's otherwise."""
    frames: list[dict[Any, Any]] = []

    async def ask() -> None:
        async for frame in tab.sides.on_go(form(tab) | {tab.sides.prompt: " "}, request()):
            frames.append(frame)

    with pytest.raises(gr.Error) as refused:
        asyncio.run(ask())
    assert not refused.value.visible and frames[-1][tab.sides.go]["interactive"]


@pytest.mark.parametrize(("values", "told"), [
    (("/etc", "default", "1", 4, 4, 1), "in none of the folders"),
    ((str(DEMO), "3", "1", 4, 4, 1), "not one of the choices"),
    ((str(DEMO), "8", "", 4, 4, 1), "whole numbers from 1 to 1024"),
    ((str(DEMO), "8", "1 two", 4, 4, 1), "whole numbers from 1 to 1024"),
    ((str(DEMO), "8", "0", 4, 4, 1), "whole numbers from 1 to 1024"),
    ((str(DEMO), "8", "9999", 4, 4, 1), "whole numbers from 1 to 1024"),
    ((str(DEMO), "8", "1 " * 13, 4, 4, 1), "up to 12"),
    ((str(DEMO), "8", 7, 4, 4, 1), "whole numbers from 1 to 1024"),
    ((str(DEMO), "8", "--csv=/tmp/x", 4, 4, 1), "whole numbers from 1 to 1024"),
    ((str(DEMO), "8", "1", 0, 4, 1), "Prompt tokens must be a whole number"),
    ((str(DEMO), "8", "1", 4, 1e9, 1), "Reply tokens must be a whole number"),
    ((str(DEMO), "8", "1", 4, 4, True), "Rounds must be a whole number"),
])
def test_benchmarks_that_are_not_allowed(
    tab: CompareTab, values: tuple[Any, ...], told: str
) -> None:
    panel: Any = tab.jobs[0]
    assert told in asyncio.run(panel.on_change(*values, request()))
    with pytest.raises(UserError, match=told):
        panel._argv(*values, "en")


def test_a_benchmarks_command_line(tab: CompareTab) -> None:
    panel: Any = tab.jobs[0]
    assert panel._argv(str(DEMO), "8", "4, 1，4", 60, 10, 2, "en")[3:] == [
        "--concurrency", "1", "4", "--prompt-tokens", "60", "--completion-tokens", "10",
        "--rounds", "2", "--quant-policy", "8", "--kv-cache-tokens", "512"]


@pytest.mark.parametrize(("values", "told"), [
    (("/etc", "alone", "0", 64), "in none of the folders"),
    ((str(DEMO), "/etc/passwd", "0", 64), "in none of the folders"),
    ((str(DEMO), "alone", "--overwrite", 64), "not one of the choices"),
    ((str(DEMO), "alone", "8", 2.5), "Tokens of text must be a whole number"),
])
def test_evaluations_that_are_not_allowed(
    tab: CompareTab, values: tuple[Any, ...], told: str
) -> None:
    panel: Any = tab.jobs[1]
    with pytest.raises(UserError, match=told):
        panel._argv(*values, "en")


def test_csv_is_of_jobs_only(tab: CompareTab) -> None:
    panel = tab.jobs[0].panel
    panel.store.root.mkdir(parents=True, exist_ok=True)
    (panel.store.root.parent / "secret.csv").write_text("secret")
    for name in ("../secret.csv", "/etc/passwd", "20260101-000000-abcdef", "", None):
        assert asyncio.run(panel.on_csv(name, request())) == ""  # type: ignore[arg-type]


# What is drawn


def a_comparison(together: bool = True) -> Comparison:
    sides = [Side("left | one"), Side("<b>right</b>")]
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?\nNow"}]
    made = Comparison(sides, messages, SamplingParams(), Plan(together), ask=None)  # type: ignore
    live = SimpleNamespace(text="<think>hm</think>Because.", finish_reason="stop",
                           so_far=ReplyStats(5, 3, ttft_s=0.25, tokens_per_s=12.34))
    made.panes[0].live, made.panes[0].state = live, "ended"  # type: ignore[assignment]
    made.panes[1].error, made.panes[1].state = UserError("No <room>."), "ended"
    return made


def test_a_comparison_is_taken_along() -> None:
    record = compare_view.record(a_comparison(), "2026-01-01")
    text = compare_view.as_markdown(record, "en")
    assert text.startswith("# left | one – <b>right</b>\n")
    assert "| | left \\| one | <b>right</b> |" in text and "| Tokens/s | 12.3 | – |" in text
    assert "> Why?\n> Now" in text and "**System**" in text and "No <room>." in text
    assert json.loads(compare_view.as_json(record)) == record
    assert "先后" in compare_view.as_markdown(
        compare_view.record(a_comparison(together=False), ""), "zh-CN")


def noted(plan: Plan, sides: list[Side], sampling: SamplingParams) -> str:
    made = Comparison(sides, [], sampling, plan, ask=None)  # type: ignore[arg-type]
    return compare_view.note_html(made, "en")


def test_a_note_says_how_they_answer_and_why() -> None:
    one, other, varied = Side("one"), Side("other"), SamplingParams(temperature=1.0)
    assert "Both at once" in noted(Plan(), [one, other], varied)
    memory = noted(Plan(False, True, (1,)), [one, other], varied)
    assert "Memory holds only one" in memory and "loaded again" in memory
    share = noted(Plan(False), [one, one], varied)
    assert "two more replies" in share and "Memory" not in share and "alike" not in share
    for fixed in (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=0)):
        assert "will be alike" in noted(Plan(), [one, one], fixed)
        assert "alike" not in noted(Plan(), [one, other], fixed)


def test_panes_are_safe_html() -> None:
    left, right = a_comparison().panes
    assert "<b>right</b>" not in compare_view.head_html(right, "en")
    assert 'data-state="failed"' in compare_view.head_html(right, "en")
    assert "No &lt;room&gt;." in compare_view.foot_html(right, "en")
    assert compare_view.reply_markdown(left) == "> hm\n\nBecause."
    assert "0.25 s" in compare_view.foot_html(left, "en")
    assert compare_view.foot_html(Pane(Side("x")), "en") == ""


def test_plots_of_any_rows() -> None:
    assert benchmark_view.benchmark_html(BenchmarkResult(), "en") == ""
    row = {"concurrency": 1, "prompt": 8, "completion": 8, "tok/s": 100.0, "first_mean_ms": None,
           "first_max_ms": float("nan"), "p50_ms": 0.0, "p95_ms": 3.0, "mem_gb": None}
    html = benchmark_view.benchmark_html(
        BenchmarkResult([row, row | {"concurrency": 64}], {"model": "<m>"}), "en")
    assert html.count("<svg") == 3 and "&lt;m&gt;" in html and "nan" not in html
    assert html.count("<circle") == 2 + 0 + 4
