"""The `ChatBackend` interface over a remote OpenAI-compatible api_server (restful mode).

The other side is not trusted: what it sends is bounded, cleaned and checked, redirects are not
followed, and every way in which it can fail becomes one sentence.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import msgspec

from backend import keyfile
from backend.chat import Delta, Message, ReplyStats, ServiceStatus
from backend.chat_template import begun_reply, check_messages
from backend.config import SamplingParams
from backend.errors import (
    AuthError,
    ContextLengthError,
    ModelNotFoundError,
    OverloadedError,
    RemoteError,
    UserError,
)
from backend.remote_http import bounded_client, is_loopback_url, normalise_url

if TYPE_CHECKING:
    import openai

MAX_MODELS = 1000
MAX_REPLY_CHARS = 4 << 20  # no model's context holds more; what is endless must not fill memory
STATUS_SECONDS = 2.0  # the page polls; an answer is good for so long
GET_SECONDS = 15.0
NO_SERVER = "no_api_server"
# Sent only when they differ from the default: servers without them refuse what they do not know.
OWN_PARAMETERS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos")
OPENAI_PARAMETERS = ("presence_penalty", "frequency_penalty", "seed", "max_tokens")


class RemoteChat:
    """Chats with the api_server at `url`. Nothing is sent until something is asked.

    Connections are not kept: a client may be dropped at any time, without closing it.

    Args:
        url: as people write it, see `normalise_url`.
        api_key: "" takes the key file of a server of ours on this machine, if there is one.
        clock: seconds, monotonic.

    Raises:
        UserError: the URL is none, or the key cannot be sent.
    """

    def __init__(
        self, url: str, api_key: str = "", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if api_key and not keyfile.is_sendable(api_key):
            raise UserError("The API key has characters that cannot be sent.",
                            "Copy it again, without blanks.", field="api_key")
        self.url = normalise_url(url)
        self._api_key = api_key
        self._clock = clock
        self._status: tuple[float, ServiceStatus] | None = None
        self._asking = asyncio.Lock()  # however many pages poll, one asks
        self._with_usage = True  # until the server refuses stream_options
        self._http = bounded_client(self.url, self.key)
        import openai  # takes half a second, and only restful mode needs it

        self._completions = openai.AsyncOpenAI(
            base_url=self.url + "/v1", http_client=self._http, timeout=self._http.timeout,
            api_key="replaced by the HTTP client", max_retries=0,
        ).chat.completions

    async def models(self) -> list[str]:
        """Names that the server offers.

        Raises:
            RemoteError, AuthError, OverloadedError: see `_failure`.
        """
        data = as_json(await self.get("/v1/models"))
        entries = data.get("data") if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise self._no_server()
        names = [entry.get("id") for entry in entries[:MAX_MODELS] if isinstance(entry, dict)]
        return [name for name in names if isinstance(name, str) and 0 < len(name) <= 512]

    async def ready_models(self) -> list[str]:
        """`models`, if the server says that it can answer for them.

        Raises:
            RemoteError, AuthError, OverloadedError: see `_failure`.
        """
        await self._check_health()
        return await self.models()

    async def status(self) -> ServiceStatus:
        """State of the server: all of it if it is one of ours, else whether it is there."""
        async with self._asking:
            if self._status is None or self._clock() - self._status[0] >= STATUS_SECONDS:
                status = await self._ask_status()
                self._status = (self._clock(), status)  # who is slow to answer is not asked more
            return self._status[1]

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """Not knowable: the template and the tokenizer are over there."""
        return None

    async def stream(
        self, messages: Sequence[Message], sampling: SamplingParams, *,
        stop: Sequence[str] = (), model: str | None = None, owner: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one reply; see `ChatBackend.stream`. Times are measured here.

        The server is told `owner` as OpenAI's `user`; what it makes of that is its own affair.

        Without usage from the server, `completion_tokens` counts the pieces that came.

        Raises:
            UserError: the request cannot be sent, or the server refuses it.
            RemoteError, AuthError, OverloadedError: see `_failure`.
        """
        started = self._clock()
        request = _request(messages, sampling, stop)
        request["model"] = model or await self._first_model()
        if owner:
            request["user"] = owner
        reply = await self._open(request)
        stats = ReplyStats(0, 0)
        first = last = started
        pieces, chars, reason, usage = 0, 0, None, None
        async with reply:
            async for chunk in self._chunks(reply):
                text, chunk_reason = _choice(chunk)
                reason = chunk_reason or reason
                usage = getattr(chunk, "usage", None) or usage
                if text:
                    last = self._clock()
                    if pieces == 0:
                        first, stats.ttft_s = last, last - started
                    pieces, chars = pieces + 1, chars + len(text)
                    if chars > MAX_REPLY_CHARS:
                        raise RemoteError(f"The reply of the api_server at {self.url} does not "
                                          "end.", "Set max_tokens.")
                    yield Delta(text)
        if reason is None:
            raise RemoteError(f"The api_server at {self.url} ended the reply half-way.",
                              "Send the message again.")
        _fill(stats, usage, pieces, last - first)
        yield Delta(finish_reason="length" if reason == "length" else "stop", stats=stats)

    async def _first_model(self) -> str:
        names = await self.models()
        if not names:
            raise RemoteError(f"The api_server at {self.url} serves no model.")
        return names[0]

    async def _open(self, request: dict[str, Any]) -> openai.AsyncStream[Any]:
        """The stream of a reply, once the server has accepted the request."""
        import openai

        if self._with_usage:
            request = {**request, "stream_options": {"include_usage": True}}
        try:
            reply = await self._completions.create(**request, stream=True)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not (self._with_usage and "stream_options" in error.response.text):
                raise self._failure(error) from error
            self._with_usage = False
            del request["stream_options"]
            return await self._open(request)
        except (openai.OpenAIError, UserError) as error:
            raise self._failure(error) from error
        if not reply.response.headers.get("content-type", "").startswith("text/event-stream"):
            await reply.close()
            raise self._no_server()
        return reply

    async def _chunks(self, reply: openai.AsyncStream[Any]) -> AsyncIterator[Any]:
        chunks = aiter(reply)
        while True:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except Exception as error:  # the client trips over events that are no chunks
                raise self._failure(error) from error
            yield chunk

    async def get(self, path: str) -> httpx2.Response:
        """A successful answer, whole within `GET_SECONDS`.

        Raises:
            UserError, RemoteError, AuthError, OverloadedError: see `_failure`.
        """
        try:
            async with asyncio.timeout(GET_SECONDS):
                response = await self._http.get(self.url + path)
        except (httpx2.HTTPError, TimeoutError, UserError) as error:
            raise self._failure(error) from error
        if response.status_code != 200:
            raise self._refusal(response)
        return response

    @asynccontextmanager
    async def post_for_lines(
        self, path: str, body: dict[str, Any]
    ) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of a successful answer as they come, without the empty ones.

        Raises:
            UserError, RemoteError, AuthError, OverloadedError: see `_failure`.
        """
        try:
            async with self._http.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response)
                yield (line async for line in response.aiter_lines() if line.strip())
        except (httpx2.HTTPError, TimeoutError) as error:
            raise self._failure(error) from error

    async def _ask_status(self) -> ServiceStatus:
        try:
            names = await self.models()
        except UserError as error:
            return ServiceStatus("unreachable", "", str(error))
        model = names[0] if names else ""
        try:
            data = as_json(await self.get("/api/status"))
            status = msgspec.convert(data, ServiceStatus)
            status.model, status.detail = clean(status.model), clean(status.detail)
            return status
        except (UserError, msgspec.ValidationError):
            pass  # not one of ours
        try:
            await self._check_health()
        except UserError as error:
            return ServiceStatus("unreachable", model, str(error))
        return ServiceStatus("ready", model)

    async def _check_health(self) -> None:
        try:
            await self.get("/health")
        except UserError as error:
            if error.status >= 500 and error.code != NO_SERVER:  # many have no /health
                raise

    def key(self) -> str | None:
        """The server's key; None if it needs none. A file is read anew each time: the server may
        have been started again, with another key."""
        if self._api_key or not is_loopback_url(self.url):
            return self._api_key or None
        parts = urlsplit(self.url)
        return keyfile.read_key(parts.port or (443 if parts.scheme == "https" else 80))

    def _failure(self, error: Exception) -> UserError:
        """Whatever went wrong over there or on the way, as a sentence."""
        import openai

        if isinstance(error, UserError):
            return error
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error.response)
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            return RemoteError(f"No api_server answers at {self.url}.",
                               "Start it, or check host and port.")
        if isinstance(cause, httpx2.TimeoutException | TimeoutError):
            return RemoteError(f"The api_server at {self.url} has gone silent.", "Try again.")
        if isinstance(cause, httpx2.TransportError):
            return RemoteError(f"The connection to the api_server at {self.url} was lost.",
                               "Try again.")
        if isinstance(error, openai.APIError) and error.body is not None:  # an event of a stream
            return RemoteError(f"The api_server at {self.url} failed: {clean(error.message)}")
        return RemoteError(f"The api_server at {self.url} sent something that is no reply.",
                           "Check that the URL is that of an OpenAI-compatible server.")

    def _refusal(self, response: httpx2.Response) -> UserError:
        """An answer whose status is not 200."""
        status = response.status_code
        text, code = error_in(as_json(response))
        where = f"The api_server at {self.url}"
        if status in (401, 403):
            return AuthError(f"{where} does not accept the API key." if self.key()
                             else f"{where} needs an API key.",
                             "Enter the key it was started with.")
        if status == 404:
            if response.request.method == "POST" and text and "model" in f"{code} {text}":
                return ModelNotFoundError(f"{where} refuses: {text}", field="model")
            return self._no_server()
        if status in (429, 503):
            return OverloadedError(f"{where} cannot take the request now: {text or 'overloaded'}",
                                   "Try again later.")
        if 300 <= status < 400:
            return self._no_server(f"{where} redirects elsewhere.")
        if text is None:
            return self._no_server()
        if code == ContextLengthError.code:
            return ContextLengthError(f"{where} refuses: {text}", field="messages")
        if status < 500:
            return UserError(f"{where} refuses the request: {text}")
        return RemoteError(f"{where} failed: {text}")

    def _no_server(self, sentence: str = "") -> RemoteError:
        error = RemoteError(
            sentence or f"What answers at {self.url} is not an OpenAI-compatible api_server.",
            "Check the URL.")
        error.code = NO_SERVER
        return error


def clean(text: str, limit: int = 500) -> str:
    """Words of a stranger, as part of a sentence: one line, no control characters, bounded."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:limit]).split())


def printable(text: str) -> str:
    """Without the half surrogate pairs that JSON can smuggle, which no terminal can show."""
    return text.encode("utf-8", "replace").decode()


def as_json(response: httpx2.Response) -> Any:
    """Its JSON; None if it has none."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def error_in(data: Any) -> tuple[str | None, str]:
    """(message, code) of OpenAI's {"error": {...}}, or of FastAPI's and LMDeploy's ways."""
    error = data.get("error", data) if isinstance(data, dict) else None
    if isinstance(error, str):
        return clean(error), ""
    if not isinstance(error, dict):
        return None, ""
    text = next((v for k in ("message", "detail") if isinstance(v := error.get(k), str)), None)
    return None if text is None else clean(text), clean(str(error.get("code") or ""))


def _request(
    messages: Sequence[Message], sampling: SamplingParams, stop: Sequence[str]
) -> dict[str, Any]:
    """Arguments of OpenAI's client, without model and stream."""
    checked = check_messages(messages)
    if sampling.logprobs is not None:
        raise UserError("Log-probabilities are not available over a remote api_server.",
                        field="logprobs")
    default = SamplingParams()
    changed = [name for name in (*OWN_PARAMETERS, *OPENAI_PARAMETERS)
               if getattr(sampling, name) != getattr(default, name)]
    extra: dict[str, Any] = {n: getattr(sampling, n) for n in changed if n in OWN_PARAMETERS}
    if sampling.stop_token_ids:
        extra["stop_token_ids"] = list(sampling.stop_token_ids)
    if begun_reply(messages):
        extra |= {"continue_final_message": True, "add_generation_prompt": False}
    request: dict[str, Any] = {
        "messages": checked, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "extra_body": extra,
        **{name: getattr(sampling, name) for name in changed if name in OPENAI_PARAMETERS},
    }
    if stop:
        request["stop"] = list(stop)
    if sampling.logit_bias:
        request["logit_bias"] = {str(k): v for k, v in sampling.logit_bias.items()}
    return request


def _choice(chunk: Any) -> tuple[str, str | None]:
    """(text, finish reason) of a chunk. OpenAI's client does not check the types of its fields."""
    choices = getattr(chunk, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(choice, "delta", None), "content", None)
    reason = getattr(choice, "finish_reason", None)
    shown = printable(text) if isinstance(text, str) else ""
    return shown, reason if isinstance(reason, str) else None


def _fill(stats: ReplyStats, usage: Any, pieces: int, seconds: float) -> None:
    """Counts from the server's usage, as far as it sent any."""
    def count(owner: Any, name: str) -> int | None:
        value = getattr(owner, name, None)
        return value if type(value) is int and 0 <= value < 1 << 40 else None

    stats.prompt_tokens = count(usage, "prompt_tokens") or 0
    tokens = count(usage, "completion_tokens")
    stats.completion_tokens = pieces if tokens is None else tokens
    details = getattr(usage, "prompt_tokens_details", None)
    stats.cached_tokens = count(details, "cached_tokens") or 0
    if stats.completion_tokens > 1 and seconds > 0:
        stats.tokens_per_s = (stats.completion_tokens - 1) / seconds
