"""What Gradio serves beside the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from backend.config import ServerConfig
from backend.server.api import base_app
from backend.services import remote_services
from ui.build import mount_page


def test_the_status_bars_sentences_in_the_readers_language() -> None:
    services = remote_services("http://127.0.0.1:1")
    app = base_app(services.chat, ServerConfig(), services.classroom, lambda: "")
    text = "The weights are damaged. Download the model again."
    with TestClient(mount_page(app, services), base_url="http://127.0.0.1:6006") as client:
        for language, words in (("zh-CN,zh;q=0.9", "权重已损坏。请重新下载模型。"), ("en", text)):
            answer = client.get("/page/sentence", params={"text": text},
                                headers={"Accept-Language": language})
            assert answer.text == words
            assert answer.headers["content-type"].startswith("text/plain")


def test_nobody_can_fill_the_disk_with_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    services = remote_services("http://127.0.0.1:1")
    app = base_app(services.chat, ServerConfig(), services.classroom, lambda: "")
    app = mount_page(app, services)
    with TestClient(app, base_url="http://127.0.0.1:6006") as client:
        for route in ("/gradio_api/upload", "/upload"):
            answer = client.post(route, files={"files": ("x.bin", b"a" * 1_000_000)})
            assert answer.status_code >= 400
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10
