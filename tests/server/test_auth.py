"""Who comes in: every route, method and trick with Host; keys, cookies, origins."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from backend import keyfile
from backend.config import ServerConfig
from backend.errors import UserError
from backend.server.auth import Guard, is_loopback, resolve_keys
from tests.server.support import NAME, Served, serve

KEYS = ("first-key-1234", "second-key-5678")
HTML = {"Accept": "text/html,application/xhtml+xml"}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"]


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serve(api_keys=KEYS) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(app: Any, path: str, method: str = "GET", headers: Any = (), query: bytes = b"",
              root_path: str = "", body: bytes = b"") -> tuple[int, dict[str, str]]:
    """Status and headers of an answer, with nothing between us and the application."""
    sent: list[dict] = []
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "scheme": "http",
        "query_string": query, "root_path": root_path, "http_version": "1.1",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
    }

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    found = {k.decode(): v.decode() for k, v in sent[0].get("headers", [])}
    return sent[0]["status"], found


def test_every_route_and_method_and_host_without_a_key(locked: Served):
    routes = {route.path for route in locked.app.routes} | {"/", "/nothing", "/gradio_api/queue"}
    paths = routes - {"/health"} | {
        "/health/", "//health", "/health/../v1/models", "/Health", "/health?", "/v1/health",
        "/login/", "/login/../v1/models", "//login", "/v1/models/health", ""}
    hosts = ["localhost", "127.0.0.1:6006", "evil.example", "localhost/health?", "/health", "",
             "localhost/login#", "a@localhost", "[::1]/health", "localhost:80:80", "\u00e9"]
    count = 0

    async def walk() -> None:
        nonlocal count
        for path in paths:
            for method in METHODS:
                for host in hosts:
                    status, headers = await ask(locked.app, path, method, [("Host", host)])
                    assert status == 401, (path, method, host)
                    assert "set-cookie" not in headers
                    count += 1
        for method in METHODS:
            status, _ = await ask(locked.app, "/health", method, [("Host", "evil.example")])
            assert status == (200 if method in ("GET", "HEAD") else 401)

    asyncio.run(walk())
    assert count > 1500


def test_a_proxys_prefix_opens_nothing(locked: Served):
    async def walk() -> None:
        for root, path, status in [
            ("/proxy", "/proxy/health", 200), ("/proxy", "/health", 200),
            ("/proxy", "/proxyhealth", 401), ("/proxy", "/proxy/v1/models", 401),
            ("/proxy", "/proxy", 401), ("/health", "/health/v1/models", 401),
            ("/health", "/healthy", 401), ("/proxy/", "/proxy/health", 401),
        ]:
            assert (await ask(locked.app, path, root_path=root))[0] == status, (root, path)
    asyncio.run(walk())


def test_keys_by_header(locked: Served):
    with locked.http() as http:
        for header in (
            "", "Bearer", "Bearer x", f"Bearer {KEYS[0][:-1]}", f"Bearer {KEYS[0]}x",
            f"Bearer {KEYS[0].upper()}", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {','.join(KEYS)}",
            f"Bearer {KEYS[0][0]}", f"Bearer: {KEYS[0]}", "Bearer \u00e9\u00e9".encode(),
        ):
            reply = http.get("/v1/models", headers={"Authorization": header})
            assert reply.status_code == 401, header
            assert reply.headers["www-authenticate"] == "Bearer"
            error = reply.json()["error"]
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
        for header in (f"Bearer {KEYS[0]}", f"bearer {KEYS[1]}", f"Bearer  {KEYS[1]}"):
            assert http.get("/v1/models", headers={"Authorization": header}).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key is wrong"):
        locked.client("wrong-key").models.list()
    assert locked.client(KEYS[1]).models.list().data[0].id == NAME


def test_programs_get_json_and_browsers_the_form(locked: Served):
    with locked.http() as http:
        for path in ("/", "/some/page"):
            reply = http.get(path, headers=HTML)
            assert reply.status_code == 401 and "<form" in reply.text
            assert "http://" not in reply.text and "https://" not in reply.text
            assert "error" in http.get(path, headers={"Accept": "*/*"}).json()
        for path in ("/v1/models", "/api/status", "/metrics"):
            assert "error" in http.get(path, headers=HTML).json()
        deep = http.get("/a/b/c", headers=HTML)
        assert 'action="./../../login"' in deep.text
        assert http.get("/login").status_code == 200


def test_logging_in_by_the_form(locked: Served):
    with locked.http() as http:
        wrong = http.post("/login", data={"key": "wrong"})
        assert wrong.status_code == 401 and "key is wrong" in wrong.text and not http.cookies
        assert http.post("/login", content=b"x" * 10_000).status_code == 413
        assert http.post("/login", content=b"\xff=%zz&&&").status_code == 401
        assert http.delete("/login").status_code == 405
        reply = http.post("/login", data={"key": KEYS[1]})
        assert reply.status_code == 303 and reply.headers["location"] == "./"
        cookie = reply.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Path=/" in cookie
        assert not any(key in cookie for key in KEYS)
        assert http.get("/v1/models").status_code == 200  # by the cookie
        [name] = http.cookies
        assert str(locked.config.server_port) in name
        value = http.cookies[name]
    with locked.http() as http:
        for forged in (value[:-1], value + "0", "", "0" * len(value), KEYS[0], "\u00e9"):
            header = {"Cookie": f"{name}={forged}".encode()}
            assert http.get("/v1/models", headers=header).status_code == 401
        odd = {"Cookie": f"a=b; bad cookie{{}}; {name}={value}; c=\"x"}
        assert http.get("/v1/models", headers=odd).status_code == 200
        other = {"Cookie": f"{name}x={value}"}
        assert http.get("/v1/models", headers=other).status_code == 401


def test_logging_in_by_a_link_leaves_no_key_behind(locked: Served, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "uvicorn.access")
    # A server without an access log, as other tests start one, silences it for the whole process.
    monkeypatch.setattr(logging.getLogger("uvicorn.access"), "propagate", True)
    with locked.http() as http:
        reply = http.get(f"/?key={KEYS[0]}&__theme=dark&a=%26", headers=HTML)
        assert reply.status_code == 303
        assert reply.headers["location"] == "./?__theme=dark&a=%26"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert http.get("/v1/models").status_code == 200
    with locked.http() as http:
        assert http.get("/?key=wrong-key-xyz", headers=HTML).status_code == 401
        # Programs are to use the header, and no other page takes a key.
        assert http.get(f"/v1/models?key={KEYS[0]}", headers=HTML).status_code == 401
        assert not http.cookies
    served_by_uvicorn = [r.getMessage() for r in caplog.records if r.name == "uvicorn.access"]
    assert any("__theme=dark" in line for line in served_by_uvicorn)
    assert not any(KEYS[0] in line for line in served_by_uvicorn if "GET /?" in line)


def test_a_cookie_is_no_use_to_other_pages(locked: Served):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    path = "/v1/chat/completions"
    with locked.http() as http:
        http.post("/login", data={"key": KEYS[0]})

        def status(origin: str | None, **headers: str) -> int:
            sent = {**headers, **({} if origin is None else {"Origin": origin})}
            return http.post(path, json=body, headers=sent).status_code

        own = f"http://127.0.0.1:{locked.port}"
        assert status(None) == status(own) == status("http://localhost:3000") == 200
        assert status("https://gpu.example", Host="gpu.example") == 200  # behind a proxy
        assert status("https://gpu.example:8443", Host="gpu.example:8443") == 200
        for origin in ("https://evil.example", "null", "", "http://localhost.evil.example",
                       "http://evil.example/localhost", "http://localhost@evil.example", "file://",
                       "http://[::1", "https://gpu.example"):
            assert status(origin) == 403, origin
        assert status("https://evil.example", Host="gpu.example") == 403
        # Whoever knows the key itself may come from anywhere.
        assert status("https://evil.example", **bearer(KEYS[0])) == 200
    with locked.http() as http:
        foreign = {"Origin": "https://evil.example"}
        assert http.post("/login", data={"key": KEYS[0]}, headers=foreign).status_code == 403


def test_without_keys_only_own_hosts_and_origins(served: Served):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    with served.http() as http:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:9"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:6006", "localhost.evil.example", "127.0.0.2",
                     "localhost:", "localhost:x", "", "localhost/", "a@localhost", "[::2]", "::1"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 421, host
            assert http.get("/health", headers={"Host": host}).status_code == 200
        for origin, status in (("https://evil.example", 403), ("null", 403),
                               ("http://localhost:6006", 200), ("http://127.0.0.1", 200)):
            reply = http.post("/v1/chat/completions", json=body, headers={"Origin": origin})
            assert reply.status_code == status
        assert http.get("/login").headers["location"] == "./"
        reply = http.options("/v1/models", headers={"Origin": "https://evil.example"})
        assert not any(name.startswith("access-control") for name in reply.headers)

    async def several() -> None:
        hosts = [("Host", "localhost"), ("Host", "evil.example")]
        assert (await ask(served.app, "/v1/models", headers=hosts))[0] == 421
        assert (await ask(served.app, "/v1/models"))[0] == 421
    asyncio.run(several())


def test_websockets_stay_outside(locked: Served, served: Served):
    async def connect(app: Any) -> list[dict]:
        sent: list[dict] = []

        async def send(message: dict) -> None:
            sent.append(message)
        scope = {"type": "websocket", "path": "/health", "headers": [(b"host", b"localhost")]}
        await app(scope, None, send)
        return sent

    for app in (locked.app, served.app):
        assert asyncio.run(connect(app)) == [{"type": "websocket.close", "code": 1008}]


def test_each_key_has_its_own_prefixes(locked: Served):
    messages = [{"role": "user", "content": "a rather long beginning " * 8}]

    def cached(key: str) -> int:
        reply = locked.client(key).chat.completions.create(model=NAME, messages=messages)
        return reply.usage.prompt_tokens_details.cached_tokens

    assert cached(KEYS[0]) == 0 and cached(KEYS[0]) > 100 and cached(KEYS[1]) == 0
    with httpx.Client(base_url=locked.url, verify=False) as http:
        http.post("/login", data={"key": KEYS[0]})
        reply = http.post("/v1/chat/completions", json={"messages": messages}).json()
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


@pytest.mark.parametrize(("name", "loopback"), [
    ("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), ("[::1]", True),
    ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("gpu.example", False), ("", False),
])
def test_what_is_loopback(name: str, loopback: bool):
    assert is_loopback(name) is loopback


def test_other_binds_get_a_key(monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[int, str]] = []
    monkeypatch.setattr(keyfile, "write_key", lambda port, key: written.append((port, key)))
    config = resolve_keys(ServerConfig(server_name="0.0.0.0", server_port=7007))
    [key] = config.api_keys
    assert written == [(7007, key)] and len(key) >= 32
    for config in (ServerConfig(), ServerConfig(server_name="0.0.0.0", api_keys=KEYS)):
        assert resolve_keys(config) == config
    assert len(written) == 1


@pytest.mark.parametrize("keys", [("",), (" " * 8,), ("short",), (KEYS[0], ""), ("with space",),
                                  ("schlüssel-123",), ("line\nbreak"), "a-string-of-letters"])
def test_bad_keys_are_refused_at_the_start(keys):
    with pytest.raises(UserError) as refused:
        resolve_keys(ServerConfig(api_keys=keys))
    assert refused.value.field == "api_keys"


def test_an_open_server_without_keys_is_not_built():
    with pytest.raises(UserError, match="needs an API key"):
        Guard(None, ServerConfig(server_name="0.0.0.0"))  # type: ignore[arg-type]
