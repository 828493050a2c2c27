"""The download tab's handlers, which are HTTP endpoints: odd ids, closed models, a full disk."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from backend.hub.patience import Patience
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.services import Services
from tests.app_process import ROOT
from tests.stand_in_hub import StandInHub
from ui.download_tab import DownloadTab

ID = "space/tiny"
REQUEST = SimpleNamespace(headers={}, cookies={})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "home"))
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    with StandInHub({ID: folder}) as hub:
        yield hub


@pytest.fixture
def tab(tmp_path: Path) -> DownloadTab:
    library = ModelLibrary(ROOT / "assets" / "demo_model", [tmp_path / "home" / "models"])
    services = Services(None, jobs=JobStore(tmp_path / "jobs"), library=library)  # type: ignore
    with gr.Blocks():
        return DownloadTab(services)


def said(html: str) -> str:
    return re.sub("<[^>]*>", "", html)


def plan(tab: DownloadTab, hub: StandInHub, id: str, **changes: str) -> str:
    given = {"source": "huggingface", "revision": "", "endpoint": hub.url, "token": ""} | changes
    return asyncio.run(tab.on_plan(
        given["source"], id, given["revision"], given["endpoint"], given["token"], REQUEST))


def test_a_plan_and_an_address_in_place_of_an_id(tab: DownloadTab, hub: StandInHub) -> None:
    assert "model.safetensors" in plan(tab, hub, f"  {ID} ")
    for address in (f"https://huggingface.co/{ID}", f"https://huggingface.co/{ID}/tree/main",
                    f"https://www.modelscope.cn/models/{ID}"):
        assert "model.safetensors" in plan(tab, hub, address)


@pytest.mark.parametrize("id", [
    "", "tiny", "../../etc/passwd", "a/b/c", "a/..", "./b", "a/b?x=1", "a b/c", "a/b\n", "a\0/b",
    "\u7a7a\u95f4/\u6a21\u578b", "a/" + "b" * 200, "https://example.com/a/b", "--token/x",
    "<img src=x onerror=alert(1)>/x"])
def test_odd_ids_are_refused_and_shown_as_text(tab: DownloadTab, hub: StandInHub, id: str) -> None:
    html = plan(tab, hub, id)
    if id.strip() == "a/b":  # a line's end is no part of it
        assert "no such model" in html
        return
    assert "is not the id of a model" in html and "<img" not in html
    assert hub.seen == []
    shown = asyncio.run(tab.on_start("huggingface", id, "", hub.url, "", REQUEST))
    assert "is not the id of a model" in shown[tab.planned] and tab.store.list() == []


def test_gated_missing_offline(
    tab: DownloadTab, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(ID)
    assert "put the token into the field above" in said(plan(tab, hub, ID))
    html = plan(tab, hub, ID, token="hf_wrong_secret")
    assert "lmd-problem" in html and "hf_wrong_secret" not in html
    assert "model.safetensors" in plan(tab, hub, ID, token=hub.token)
    assert "copy the id from there" in said(plan(tab, hub, "space/absent"))
    assert "lmd-problem" in plan(tab, hub, ID, source="elsewhere")
    assert "lmd-problem" in plan(tab, hub, ID, endpoint="file:///etc/passwd")
    monkeypatch.setattr(Patience, "pause", lambda self, seconds: False)
    hub.down = True
    assert "bundled model works without any network" in said(plan(tab, hub, ID))


def test_a_disk_that_is_too_small(tab: DownloadTab, hub: StandInHub) -> None:
    hub.list_size = 1 << 49
    assert "Make room first" in said(plan(tab, hub, ID))
    shown = asyncio.run(tab.on_start("huggingface", ID, "", hub.url, "", REQUEST))
    assert "Make room first" in said(shown[tab.planned]) and tab.store.list() == []


def test_a_local_folder_of_the_library_only(tab: DownloadTab, hub: StandInHub) -> None:
    assert "can be loaded" in plan(tab, hub, str(ROOT / "assets" / "demo_model"), source="local")
    assert "none of the folders" in plan(tab, hub, "/etc", source="local")
