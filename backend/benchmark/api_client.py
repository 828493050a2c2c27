"""Streamed completions of an OpenAI-compatible server, timed piece by piece."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2

from backend.benchmark.metrics import Timeline
from backend.errors import AuthError, RemoteError
from backend.remote_http import MAX_EVENT_BYTES

CONNECT_SECONDS = 30.0


def http_client(url: str, api_key: str) -> httpx2.AsyncClient:
    """A client that keeps its connections and waits as long as the server's queue is.

    Args:
        url: normalised, as by `backend.remote_http.normalise_url`.
        api_key: sent as a bearer token; "" sends none.
    """
    return httpx2.AsyncClient(
        base_url=url + "/v1",
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        follow_redirects=False,
        trust_env=False,  # a proxy would break servers on this machine
        verify=url.startswith("https:"),  # reading the certificates takes a while
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


@dataclass(frozen=True, slots=True)
class Completion:
    """A request: its prompt as text or token ids, and how many tokens are wanted."""

    prompt: str | list[int]
    max_tokens: int


class ApiClient:
    """One model of one server.

    Args:
        http: from `http_client`.
        model: its name there.
        clock: seconds, monotonic.
    """

    def __init__(self, http: httpx2.AsyncClient, model: str, clock: Callable[[], float]) -> None:
        self._http = http
        self._model = model
        self.clock = clock

    async def complete(self, request: Completion) -> Timeline:
        """Stream one greedy reply of full length.

        Raises:
            RemoteError: no connection, a refusal, or a reply without a piece; says which.
        """
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timeline = Timeline(self.clock(), 0)
        ended = None
        try:
            async with self._http.stream("POST", "/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for event in _events(response):
                    now = self.clock()
                    if "error" in event:
                        raise RemoteError(f"The server broke off: {str(event['error'])[:200]}")
                    for choice in event.get("choices") or ():
                        ended = now
                        if choice.get("text"):
                            timeline.events.append((now, 1))
                    if usage := event.get("usage"):
                        timeline.reported_tokens = usage["completion_tokens"]
                        timeline.prompt_tokens = usage["prompt_tokens"]
        except httpx2.HTTPError as error:
            raise RemoteError(
                f"The server broke the connection: {error or type(error).__name__}."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RemoteError("The server's reply is not a stream of completions.") from error
        if not timeline.events:
            if ended is None:
                raise RemoteError("The server's reply ended without a piece.")
            timeline.events.append((ended, 1))  # all its tokens are without text
        return timeline


async def first_model(http: httpx2.AsyncClient) -> str:
    """Name of the first model that the server lists.

    Raises:
        RemoteError: it lists none, or cannot be reached.
    """
    try:
        response = await http.get("/models")
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        return str(response.json()["data"][0]["id"])
    except httpx2.HTTPError as error:
        raise RemoteError(
            f"No server answers at {http.base_url}: {error or type(error).__name__}.",
            "Start it, or check the URL.",
        ) from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise RemoteError(
            f"The server at {http.base_url} does not list its models.", "Name one: --model-name."
        ) from error


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Data of the server-sent events. Lines end at line feeds only: others split at U+2028 too."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise RemoteError("The server sent too much at once.", "Check the URL.")
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and content != b"[DONE]":
                yield json.loads(content)


def _refusal(status: int, body: bytes) -> RemoteError | AuthError:
    try:
        told = json.loads(body)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        told = body[:200].decode(errors="replace")
    if status in (401, 403):
        return AuthError(f"The server refused the key: {told}", "Give the right one: --api-key.")
    return RemoteError(f"The server answered {status}: {str(told)[:200]}")
