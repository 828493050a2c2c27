"""What is typed wrongly into the fields of the page gets a sentence in the reader's language."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend.classroom import SCOPE_KEY, Caller, Classroom, StudentLimits
from backend.config import EngineConfig, validate
from backend.engine_manager import EngineManager
from backend.errors import UserError
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.remote_http import normalise_url
from backend.services import Services
from tests.app_process import ROOT
from tests.e2e.fake_chat import FakeChat
from ui import answer, forms
from ui.build import build_ui
from ui.class_tab import ClassTab
from ui.guide_tab import GuideTab
from ui.model_panel import ModelPanel
from ui.quantize_tab import QuantizeTab

DEMO = ROOT / "assets" / "demo_model"


def request(locale: str) -> Any:
    scope = {SCOPE_KEY: Caller("h", "Ms Li")}
    return SimpleNamespace(headers={"accept-language": locale}, cookies={}, session_hash="tab",
                           request=SimpleNamespace(scope=scope))


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    return Services(
        FakeChat(), engines=EngineManager(), jobs=JobStore(tmp_path_factory.mktemp("jobs")),
        library=ModelLibrary(DEMO, []))


@pytest.fixture(scope="module")
def page(services: Services) -> gr.Blocks:
    return build_ui(services)


@pytest.fixture
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in the corner of the page."""
    said: list[str] = []
    monkeypatch.setattr(answer.gr, "Warning", lambda text: said.append(html.unescape(text)))
    return said


REPLIES = {"en": "Replies at a time must be a whole number from 1 to 256.",
           "zh-CN": "同时的回复数 必须是 1 到 256 的整数。"}
TOKENS = {"en": "Tokens a reply must be a whole number from 1 to 1000000.",
          "zh-CN": "每条回复的 token 数 必须是 1 到 1000000 的整数。"}


@pytest.fixture(scope="module")
def class_tab() -> ClassTab:
    with gr.Blocks():
        return ClassTab(Services(FakeChat(), classroom=Classroom(has_hosts=True)))


@pytest.mark.parametrize("locale", ["en", "zh-CN"])
@pytest.mark.parametrize(("typed", "told"), [
    ((0, None), REPLIES), ((257, None), REPLIES), ((1.5, 8), REPLIES), ((None, 8), REPLIES),
    (("many", None), REPLIES), ((1e308, None), REPLIES), ((float("nan"), None), REPLIES),
    ((2, 0), TOKENS), ((2, -3), TOKENS), ((2, "<b>x</b>"), TOKENS), ((2, 1e9), TOKENS)])
def test_limits_of_a_class(
    class_tab: ClassTab, toasts: list[str], locale: str, typed: tuple[Any, Any],
    told: dict[str, str],
) -> None:
    asyncio.run(class_tab.on_save(*typed, request(locale)))
    assert toasts == [told[locale]]
    assert class_tab.classroom.student_limits == StudentLimits()


@pytest.mark.parametrize(("locale", "told"), [
    ("en", "'none' is not one of the choices."), ("zh-CN", "'none' 不在可选项中。")])
def test_a_step_of_the_guide(
    services: Services, toasts: list[str], locale: str, told: str
) -> None:
    with gr.Blocks():
        tab = GuideTab(services)
    asyncio.run(tab.on_good(str(DEMO), "none", request(locale)))
    assert toasts == [told]


@pytest.mark.parametrize(("session_len", "en", "zh"), [
    (0, "session_len must be at least 16, not 0.", "session_len 应为 16 或更大，而不是 0。"),
    (1.5, "session_len must be a whole number, not 1.5.", "session_len 必须是整数，而不是 1.5。"),
    ("<b>", "session_len must be a number, not '<b>'.", "session_len 必须是数字，而不是 '<b>'。")])
def test_a_conversations_length(
    services: Services, toasts: list[str], session_len: Any, en: str, zh: str
) -> None:
    with gr.Blocks():
        panel = ModelPanel(services)
    for locale in ("en", "zh-CN"):
        asyncio.run(panel.on_load(str(DEMO), "default", session_len, request(locale)))
    assert toasts == [en, zh]


def sampling(**values: Any) -> Callable[[], Any]:
    return lambda: forms.sampling_params(values)


@pytest.mark.parametrize(("asked", "en", "zh"), [
    (sampling(temperature=None), "temperature is empty: a number is needed.",
     "temperature 是空的：需要一个数字。"),
    (sampling(temperature=9), "temperature must be from 0.0 to 2.0, not 9.",
     "temperature 应为 0.0 到 2.0，而不是 9。"),
    (sampling(max_tokens=0), "max_tokens must be at least 1, not 0.",
     "max_tokens 应为 1 或更大，而不是 0。"),
    (sampling(top_k=1.5), "top_k must be a whole number, not 1.5.",
     "top_k 必须是整数，而不是 1.5。"),
    (lambda: normalise_url("a b"),
     "'a b' is not the URL of a server. Write it like http://127.0.0.1:23333.",
     "'a b' 不是服务器的 URL。请写成 http://127.0.0.1:23333 这样。")])
def test_a_sentence_in_the_readers_language(asked: Callable[[], Any], en: str, zh: str) -> None:
    with pytest.raises(UserError) as refused:
        asked()
    assert [answer.sentence(refused.value, locale) for locale in ("en", "zh-CN")] == [en, zh]
    assert forms.sampling_params({"max_tokens": None, "seed": None}).max_tokens is None


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(UserError) as refused:
        validate(EngineConfig("x", device="x" * 100_000))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", [
    "quantize-samples", "quantize-seqlen", "quantize-tokens", "benchmark-prompt",
    "benchmark-completion", "benchmark-rounds", "perplexity-tokens", "models-session-len"])
def test_no_number_is_rounded_in_silence(page: gr.Blocks, name: str) -> None:
    field = next(b for b in page.blocks.values() if getattr(b, "elem_id", "") == name)
    assert isinstance(field, gr.Number) and field.preprocess(1.5) == 1.5


@pytest.mark.parametrize(("locale", "told"), [
    ("en", "Samples must be a whole number from 1 to 65536."),
    ("zh-CN", "样本数 必须是 1 到 65536 的整数。")])
def test_a_wrong_quantization_is_told_at_once(
    services: Services, locale: str, told: str
) -> None:
    with gr.Blocks():
        tab = QuantizeTab(services)
    for samples in (0, -1, 1.5, None, "<b>", 1 << 20):
        said = asyncio.run(tab.on_change(
            str(DEMO), "w4a16", "bundled", samples, 16, "128", 64, "", request(locale)))
        assert told in said[tab.notes["data"]]["value"]
        assert said[tab.start] == gr.update(interactive=False)
    right = asyncio.run(tab.on_change(
        str(DEMO), "w4a16", "bundled", 1, 16, "128", 64, "", request(locale)))
    assert right[tab.start] == gr.update(interactive=True)
