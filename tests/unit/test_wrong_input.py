"""What is typed wrongly into the fields of the page gets a sentence in the reader's language."""

from __future__ import annotations

import asyncio
import html
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend.classroom import SCOPE_KEY, Caller, Classroom, StudentLimits
from backend.model_library import ModelLibrary
from backend.services import Services
from tests.app_process import ROOT
from tests.e2e.fake_chat import FakeChat
from ui import answer
from ui.class_tab import ClassTab
from ui.guide_tab import GuideTab

DEMO = ROOT / "assets" / "demo_model"


def request(locale: str) -> Any:
    scope = {SCOPE_KEY: Caller("h", "Ms Li")}
    return SimpleNamespace(headers={"accept-language": locale}, cookies={}, session_hash="tab",
                           request=SimpleNamespace(scope=scope))


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
def test_a_step_of_the_guide(toasts: list[str], locale: str, told: str) -> None:
    services = Services(FakeChat(), library=ModelLibrary(DEMO, []))
    with gr.Blocks():
        tab = GuideTab(services)
    asyncio.run(tab.on_good(str(DEMO), "none", request(locale)))
    assert toasts == [told]
