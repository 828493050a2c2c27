"""The config tab's way with the server's one loop; the rest of it is in tests/e2e."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend.engine_manager import LoadRequest
from backend.services import add_desk, local_services
from tests.app_process import ROOT
from ui import config_tab
from ui.config_tab import ConfigTab

DEMO = ROOT / "assets" / "demo_model"


def test_a_model_is_read_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For it may load torch, and everybody's replies would stand still for seconds."""
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path_factory.mktemp("home")))
    services = local_services(LoadRequest(str(DEMO)))
    add_desk(services, DEMO)
    with gr.Blocks():
        tab = ConfigTab(services)
    rows, threads = config_tab.rows, []

    def spied(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return rows(*args)

    monkeypatch.setattr(config_tab, "rows", spied)

    async def choose() -> dict[Any, Any]:
        request: Any = SimpleNamespace(headers={}, cookies={})
        async with aclosing(tab.on_choose(str(DEMO), request)) as updates:
            return await anext(updates)

    shown = asyncio.run(choose())
    assert shown[tab.groups["engine"]]["visible"] and "quant_policy" in str(shown)
    assert threads and threading.main_thread() not in threads
