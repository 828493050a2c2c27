"""A stand-in for somebody's api_server: says, byte for byte, whatever a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


class StandIn:
    """An HTTP server whose answers are functions, by path; remembers what it was sent."""

    def __init__(self, port: int = 0, chat: Answer | None = None) -> None:
        self.answers: dict[str, Answer] = {
            "/v1/models": send_json(200, {"data": [{"id": "m1"}, {"id": "m2"}]})}
        if chat is not None:
            self.chat(chat)
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                headers = {name.lower(): value for name, value in self.headers.items()}
                stand_in.seen.append((self.path, headers, body))
                answer = stand_in.answers.get(self.path, send_json(404, {"detail": "Not Found"}))
                try:
                    answer(self)
                except OSError:
                    pass  # the client has hung up, as some tests want it to

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def chat(self, answer: Answer) -> None:
        self.answers["/v1/chat/completions"] = answer


def send(status: int, kind: str, body: bytes, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
    return answer


def send_json(status: int, value: Any) -> Answer:
    return send(status, "application/json", json.dumps(value).encode())


def failure(status: int, message: str, code: str | None = None) -> Answer:
    return send_json(status, {"error": {"message": message, "code": code}})


def events(*values: Any) -> Answer:
    lines = [v if isinstance(v, str) else json.dumps(v) for v in values]
    return send(200, "text/event-stream", "".join(f"data: {v}\n\n" for v in lines).encode())


def piece(text: Any, reason: Any = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}
