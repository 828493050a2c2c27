"""`serve api_server --proxy-url`: it joins a proxy, comes back to it, and leaves it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
from contextlib import closing
from pathlib import Path

import httpx
import pytest

import app
from backend.config import ServerConfig
from backend.errors import AuthError, RemoteError, UserError
from backend.server.proxy import membership
from backend.server.proxy.membership import Membership, reachable_url
from tests.app_process import BOUND_S, AppProcess, until
from tests.server.proxy_support import ADMIN, CLIENT, RunningProxy
from tests.server.support import NAME, Served, serve
from tests.stand_in import StandIn


def nodes(proxy: RunningProxy) -> dict[str, dict]:
    return proxy.admin("GET", "/nodes/status").json()


async def eventually(condition) -> None:
    await asyncio.to_thread(until, condition, "it did not come about")


def test_it_joins_comes_back_and_leaves(proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(membership, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(membership, "LEAVE_SECONDS", BOUND_S)
    with serve(api_keys=("key-of-the-node",)) as node:
        async def story() -> None:
            member = Membership(proxy.url, ADMIN, node.config_with_port())
            await member.check()
            member.begin()
            await eventually(lambda: node.url in nodes(proxy))
            assert nodes(proxy)[node.url]["models"] == [NAME]
            reply = await asyncio.to_thread(proxy.ask, model=NAME)  # with the node's own key
            assert reply.json()["choices"][0]["message"]["content"] == "hi"
            proxy.node(node.url).speed = 5.0
            asked = asyncio.Event()
            ask = member._ask

            async def seen() -> str:
                run = await ask()
                asked.set()
                return run

            monkeypatch.setattr(member, "_ask", seen)
            await asyncio.wait_for(asked.wait(), 60)
            assert proxy.node(node.url).speed == 5.0  # what is known is not said again
            proxy.admin("POST", "/nodes/remove", json={"url": node.url})
            for _ in range(3):
                asked.clear()
                await asyncio.wait_for(asked.wait(), 60)
            assert not nodes(proxy)  # whom its operator removed stays out
            proxy.proxy.run_id = "another"  # as if it had been started again between two looks
            await eventually(lambda: node.url in nodes(proxy))
            await member.leave()
            assert not nodes(proxy)
            await member.leave()

        asyncio.run(story())


def test_a_proxy_that_was_away_is_joined_again(proxy: RunningProxy, served: Served,
                                               monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(membership, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(membership, "LEAVE_SECONDS", BOUND_S)

    async def story() -> None:
        member = Membership(proxy.url, ADMIN, served.config_with_port())
        there = member._proxy.url
        member._proxy.url = "http://127.0.0.1:9"
        await member.check()  # away: not a mistake
        member.begin()
        await asyncio.sleep(0.1)
        member._proxy.url = there
        await eventually(lambda: served.url in nodes(proxy))
        member._proxy.url = "http://127.0.0.1:9"
        await eventually(lambda: not member._joined)
        proxy.admin("POST", "/nodes/remove", json={"url": served.url})  # it has forgotten
        member._proxy.url = there
        await eventually(lambda: served.url in nodes(proxy))
        await member.leave()
        assert not nodes(proxy)

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    told = [record.getMessage() for record in caplog.records if "membership" in record.name]
    assert "No proxy answers" in told[0] and len(told) <= 6, told


def test_mistakes(proxy: RunningProxy, served: Served, monkeypatch: pytest.MonkeyPatch,
                  tmp_path: Path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # no real key file
    own = served.config_with_port()
    for key, sentence in (("", "needs a key"), ("key-of-nobody", "does not accept the key"),
                          (CLIENT, "does not accept the key")):
        with pytest.raises(AuthError, match=f"{sentence}. Give its admin key.*--proxy-key"):
            asyncio.run(Membership(proxy.url, key, own).check())
    with closing(StandIn()) as other, pytest.raises(RemoteError, match="is no proxy. Start one"):
        asyncio.run(Membership(other.url, "", own).check())
    with pytest.raises(UserError, match="cannot reach this server"):
        Membership("http://192.0.2.7:8000", "", own)
    with pytest.raises(UserError, match="not the URL"):
        Membership("http://", "", own)


def test_where_the_proxy_finds_the_server():
    here, elsewhere = "http://127.0.0.1:8000", "http://192.0.2.7:8000"
    assert reachable_url(ServerConfig("0.0.0.0", 5), here) == "http://127.0.0.1:5"
    assert reachable_url(ServerConfig("localhost", 5), here) == "http://localhost:5"
    assert reachable_url(ServerConfig("10.0.0.3", 5), elsewhere) == "http://10.0.0.3:5"
    assert reachable_url(ServerConfig("10.0.0.3", 5), here) == "http://10.0.0.3:5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "_address_towards", lambda host: f"to-{host}")
        assert reachable_url(ServerConfig("0.0.0.0", 5), elsewhere) == "http://to-192.0.2.7:5"
    assert membership._address_towards("127.0.0.1") == "127.0.0.1"


def test_the_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                      monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    server = AppProcess(
        tmp_path, "serve", "api_server", app.BUNDLED_MODEL, "--inline", "--device", "cpu",
        "--kv-cache-tokens", "1024", "--server-port", "0", "--proxy_url", url)
    proxy = AppProcess(tmp_path, "serve", "proxy", "--server-port", port)
    try:
        assert f"Proxy   {url}" in server.announcement()
        admin = re.search(r"Admin +(\S+)", proxy.announcement())
        assert admin
        with httpx.Client(base_url=url, timeout=60,
                          headers={"Authorization": f"Bearer {admin[1]}"}) as http:
            until(lambda: server.url in http.get("/nodes/status").json(), "it does not join")
            monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "nobody"))
            monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nobody"))
            words = ["serve", "api_server", "--proxy-url", url, "--server-port", "0"]
            for more, told in (([], "needs a key"), (["--proxy-key", "no-such-key"], "the key.")):
                assert app.main([*words, *more]) == 2
                said = capfd.readouterr().err.splitlines()
                assert len(said) == 1 and told in said[0] and "--proxy-key" in said[0]
            os.kill(server.pid, signal.SIGTERM)
            until(lambda: not http.get("/nodes/status").json(), "it does not leave")
            code, _, complaints = server.wait()
            assert code == 0 and "Traceback" not in complaints
    finally:
        server.kill()
        proxy.kill()
    assert app.main(["serve", "api_server", "--proxy-key", "no-such-key"]) == 2
    assert "--proxy-url" in capfd.readouterr().err
