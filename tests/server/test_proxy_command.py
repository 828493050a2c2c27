"""`app.py serve proxy` as a process."""

from __future__ import annotations

import os
import re
import signal
import stat
from pathlib import Path

import httpx
import pytest

import app
from tests.app_process import AppProcess, until
from tests.server.proxy_support import CHAT, stand_ins


def test_it_announces_its_keys_serves_and_ends(tmp_path: Path):
    with stand_ins(2) as (node, late):
        running = AppProcess(
            tmp_path, "serve", "proxy", "--server-port", "0", "--strategy", "random", "--nodes",
            node.url, "http://127.0.0.1:9", "--api-keys", "key-of-a-client", "--node_key", "secret")
        try:
            text = running.announcement()
            assert "over 1 of 2 nodes" in text and "secret" not in text
            admin = re.search(r"Admin +(\S+)", text)
            assert admin and "key-of-a-client" in text
            [kept] = tmp_path.rglob("keys/*")
            assert kept.read_text() == admin[1] and stat.S_IMODE(os.stat(kept).st_mode) == 0o600
            with httpx.Client(base_url=running.url, timeout=60) as http:
                client = {"Authorization": "Bearer key-of-a-client"}
                operator = {"Authorization": f"Bearer {admin[1]}"}
                assert http.get("/health").status_code == 200
                body = {"model": "m1", "messages": "hi"}
                assert http.post(CHAT, json=body).status_code == 401
                assert "fine" in http.post(CHAT, json=body, headers=client).text
                assert http.get("/nodes/status", headers=client).status_code == 403
                add = http.post("/nodes/add", json={"url": late.url}, headers=operator)
                assert add.status_code == 200
                status = http.get("/nodes/status", headers=operator).json()
                assert [status[url]["healthy"] for url in sorted(
                    status, key=[node.url, late.url, "http://127.0.0.1:9"].index)] == [
                        True, True, False]
                until(lambda: "fine" in http.post(CHAT, json=body, headers=client).text and any(
                    seen[0] == CHAT for seen in late.seen), "the late node gets nothing")
            os.kill(running.pid, signal.SIGTERM)
            code, _, complaints = running.wait()
            assert code == 0 and "Traceback" not in complaints
        finally:
            running.kill()


@pytest.mark.parametrize(("argv", "words"), [
    (["--strategy", "fastest"], "min_expected_latency"),
    (["--admin-key", "short"], "at least 8"),
    (["--admin-key", "the-same-key", "--api-keys", "the-same-key"], "Take another"),
    (["--nodes", "ftp://x"], "http://"),
    (["--stratgy", "random"], "--strategy"),
])
def test_mistakes(argv: list[str], words: str, capfd: pytest.CaptureFixture[str], tmp_path: Path,
                  monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert app.main(["serve", "proxy", "--server-port", "0", *argv]) == 2
    said = capfd.readouterr()
    assert words in said.err and len(said.err.splitlines()) == 1
