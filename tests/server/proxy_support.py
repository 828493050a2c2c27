"""A running proxy for tests, with nodes that do as they are told."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

from backend.config import ServerConfig
from backend.server.proxy.nodes import Node, Nodes
from backend.server.proxy.routes import Proxy
from tests.app_process import until
from tests.stand_in import Answer, StandIn, send, send_json

ADMIN = "key-of-the-admin"
CLIENT = "key-of-a-client"
CHAT = "/v1/chat/completions"


class RunningProxy:
    """The real application under uvicorn; its nodes are asked whether they live all the time."""

    def __init__(self, strategy: str = "min_expected_latency", **options: Any) -> None:
        nodes = Nodes(strategy, rng=random.Random(1))
        self.proxy = Proxy(nodes, ADMIN, **options)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),))
        self._up = threading.Event()

    async def _serve(self) -> None:
        config = ServerConfig(api_keys=(CLIENT, ADMIN))
        self.server = uvicorn.Server(uvicorn.Config(
            self.proxy.app(config), port=0, log_config=None, lifespan="off",
            timeout_graceful_shutdown=1))
        async with self.proxy:
            serving = asyncio.create_task(self.server.serve())
            while not self.server.started:
                await asyncio.sleep(0.01)
            self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
            self.proxy.own_url = self.url
            self._up.set()
            await serving

    def __enter__(self) -> RunningProxy:
        self._thread.start()
        assert self._up.wait(60)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)

    def http(
        self, key: str = CLIENT, timeout: float | httpx.Timeout = 60.0
    ) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout, verify=False,
                            headers={"Authorization": f"Bearer {key}"})

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=CLIENT, max_retries=0, timeout=60)

    def admin(self, method: str, path: str, key: str = ADMIN, **options: Any) -> httpx.Response:
        with self.http(key) as http:
            return http.request(method, path, **options)

    def add(self, url: str, **fields: Any) -> dict[str, Any]:
        reply = self.admin("POST", "/nodes/add", json={"url": url, **fields})
        assert reply.status_code == 200, reply.text
        return reply.json()[url]

    def ask(self, **body: Any) -> httpx.Response:
        with self.http() as http:
            return http.post(CHAT, json={"model": "m1", "messages": "hi"} | body)

    def node(self, url: str) -> Node:
        found = self.proxy.nodes.get(url)
        assert found is not None
        return found

    def prefer(self, url: str) -> None:
        """Give every request to that node first, as long as it is there."""
        for node in self.proxy.nodes:
            node.speed = 1e6 if node.url == url else 1.0

    def assert_idle(self) -> None:
        """Insist that all counts come back to nothing."""
        until(lambda: not any(node.unfinished for node in self.proxy.nodes), "still working")
        until(lambda: not self.proxy.admission.total.open, "still admitted")
        assert self.proxy.admission.total.waiting == 0


@contextmanager
def stand_ins(count: int) -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        made = [StandIn() for _ in range(count)]
        for stand_in in made:
            stack.callback(stand_in.close)
            stand_in.chat(whole("fine"))
        yield made


def whole(text: str) -> Answer:
    """A complete reply."""
    return send_json(200, {"choices": [{"message": {"content": text}}]})


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def broken_off(sent: bytes) -> Answer:
    """A stream that says it goes on, and does not."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(sent)
        handler.wfile.flush()
        handler.close_connection = True
    return answer


def stream_of(body: bytes, **headers: str) -> Answer:
    return send(200, "text/event-stream", body, **headers)


def asked(stand_in: StandIn) -> list[tuple[str, dict[str, str], Any]]:
    """The completions that a node was asked for."""
    return [seen for seen in stand_in.seen if seen[0] == CHAT]
