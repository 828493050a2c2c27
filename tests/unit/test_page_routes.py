"""What Gradio serves beside the page."""

from __future__ import annotations

import re
from pathlib import Path

import gradio
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from backend.config import ServerConfig
from backend.server.api import base_app
from backend.services import remote_services
from ui.build import mount_page


@pytest.fixture
def app() -> FastAPI:
    services = remote_services("http://127.0.0.1:1")
    app = base_app(services.chat, ServerConfig(), services.classroom, lambda: "")
    return mount_page(app, services)


def test_the_status_bars_sentences_in_the_readers_language(app: FastAPI) -> None:
    text = "The weights are damaged. Download the model again."
    with TestClient(app, base_url="http://127.0.0.1:6006") as client:
        for language, words in (("zh-CN,zh;q=0.9", "权重已损坏。请重新下载模型。"), ("en", text)):
            answer = client.get("/page/sentence", params={"text": text},
                                headers={"Accept-Language": language})
            assert answer.text == words
            assert answer.headers["content-type"].startswith("text/plain")


def test_nobody_can_fill_the_disk_with_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: FastAPI
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with TestClient(app, base_url="http://127.0.0.1:6006") as client:
        for route in ("/gradio_api/upload", "/upload"):
            answer = client.post(route, files={"files": ("x.bin", b"a" * 1_000_000)})
            assert answer.status_code >= 400
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10


def an_asset(client: TestClient) -> str:
    """The path of a file that the page asks for."""
    found = re.search(r"assets/index-[^\"]+\.js", client.get("/").text)
    assert found
    return f"/{found[0]}"


def test_the_pages_files_are_sent_alike_each_time_in_each_encoding(app: FastAPI) -> None:
    with TestClient(app, base_url="http://127.0.0.1:6006") as client:
        path = an_asset(client)
        plain = (Path(gradio.__file__).parent / "templates/frontend" / path[1:]).read_bytes()
        for _ in range(2):
            for encoding in ("gzip, deflate, br", "gzip", "identity"):
                answer = client.get(path, headers={"Accept-Encoding": encoding})
                assert answer.content == plain
                expected = {"gzip, deflate, br": "br", "gzip": "gzip"}.get(encoding)
                assert answer.headers.get("content-encoding") == expected
                assert "immutable" in answer.headers["cache-control"]
        none = client.get("/assets/none.js")
        assert none.status_code == 404 and "cache-control" not in none.headers


def test_the_page_is_compressed_for_browsers_that_can_read_that(app: FastAPI) -> None:
    with TestClient(app, base_url="http://127.0.0.1:6006") as client:
        packed = client.get("/", headers={"Accept-Encoding": "gzip"})
        plain = client.get("/", headers={"Accept-Encoding": "identity"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers and "gradio_config" in packed.text
        assert int(packed.headers["content-length"]) < len(plain.content) / 4


def test_the_pages_files_are_for_those_who_may_come_in() -> None:
    services = remote_services("http://127.0.0.1:1")
    config = ServerConfig(api_keys=("a-key-of-the-test",))
    app = base_app(services.chat, config, services.classroom, lambda: "")
    mount_page(app, services)
    key = {"Authorization": "Bearer a-key-of-the-test"}
    with TestClient(app, base_url="http://127.0.0.1:6006", headers=key) as client:
        path = an_asset(client)
        assert client.get(path).status_code == 200
    with TestClient(app, base_url="http://127.0.0.1:6006") as client:
        assert client.get(path, follow_redirects=False).status_code in (303, 401)
