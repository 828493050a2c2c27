"""Restful mode: `ChatBackend` over somebody's api_server, by OpenAI's own client.

The server is treated as a stranger: no redirects, no proxies from the environment, bounded waits
and sizes, and none of its HTML in our errors.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx  # what openai is built on
import openai

from backend import keyfile
from backend.chat import Delta, Message, ReplyStats, ServiceStatus
from backend.config import SamplingParams
from backend.errors import (
    AuthError,
    ContextLengthError,
    ModelNotFoundError,
    RemoteError,
    UserError,
)

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 60.0  # without a byte
STATUS_SECONDS = 2.0  # a status is asked for once in so long, however many pages poll
MAX_REPLY_CHARS = 4 << 20
MAX_MODELS = 200
# Sent only when they differ from the default: other servers may not know them.
EXTRAS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids")


def normalise_url(text: str) -> str:
    """`http://host:port` of an api_server as people write it: `127.0.0.1:23333`, `.../v1`.

    A target of 0.0.0.0, which the tutorials type, means this machine.

    Raises:
        UserError: it is no address of a server, or one that must not be asked.
    """
    written = text.strip()
    url = written if "://" in written else f"http://{written}"
    example = "Write it as http://127.0.0.1:23333."
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UserError(f"{written!r:.200} is not an address.", example, field="url") from None
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{written!r:.200} is neither http nor https.", example, field="url")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{host} is given with a user, a query or a fragment.",
            f"Leave them out; the key has a field of its own. {example}",
            field="url",
        )
    if not re.fullmatch(r"[a-z0-9_.:-]+", host) or re.search(r"[\\\s]", url):
        raise UserError(f"{written!r:.200} is not an address.", example, field="url")
    address = _ip_address(host)
    if address is not None:
        if address.is_unspecified:
            host = "127.0.0.1"
        elif address.is_link_local or address.is_multicast:
            raise UserError(f"{host} is not an address of a server.", example, field="url")
    path = re.sub(r"/v1$", "", parts.path.rstrip("/"))
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}{'' if port is None else f':{port}'}{path}"


def is_loopback_url(url: str) -> bool:
    """Whether a normalised URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    address = _ip_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


class RemoteChat:
    """Another server's models.

    Args:
        url: as `normalise_url` takes it.
        api_key: its key; without one, the key that a server of ours left on this machine.

    Raises:
        UserError: the URL is not one.
    """

    def __init__(
        self, url: str, api_key: str = "", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = normalise_url(url)
        self._clock = clock
        port = urlsplit(self.url).port
        if not api_key and port and is_loopback_url(self.url):
            api_key = keyfile.read_key(port) or ""
        timeout = httpx.Timeout(IDLE_SECONDS, connect=CONNECT_SECONDS)
        self._http = httpx.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=False)
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key or "none",
            http_client=self._http,
            max_retries=0,
            timeout=timeout,
        )
        self._models: list[str] = []
        self._status: tuple[float, ServiceStatus] | None = None

    async def models(self) -> list[str]:
        """The server's models.

        Raises:
            AuthError, RemoteError: it cannot be asked.
        """
        try:
            page = await self._client.models.list()
            names = [str(model.id) for model in page.data][:MAX_MODELS]
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise self._sentence(error) from error
        except (AttributeError, TypeError, ValueError) as error:  # not a list of models
            raise self._foreign() from error
        if not names:
            raise RemoteError(f"{self.url} serves no model.", "Wait until it has loaded one.")
        self._models = names
        return names

    async def status(self) -> ServiceStatus:
        now = self._clock()
        if self._status is None or now - self._status[0] >= STATUS_SECONDS:
            try:
                names = await self.models()
                status = ServiceStatus("ready", names[0])
            except UserError as error:
                status = ServiceStatus("unreachable", self.url, str(error))
            self._status = (now, status)
        return self._status[1]

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """Not knowable: the tokenizer is the server's."""
        return None

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        model: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """See `ChatBackend.stream`.

        Raises:
            AuthError, ContextLengthError, ModelNotFoundError, RemoteError, UserError: as the
                server answered, or because it did not.
        """
        started = self._clock()
        first = started
        stats = ReplyStats(0, 0)
        reason: str | None = None
        received = pieces = 0
        try:
            name = model or (self._models or await self.models())[0]
            events = await self._create(messages, sampling, stop, name)
            async with events:
                async for event in events:
                    if event.usage is not None:
                        stats.prompt_tokens = event.usage.prompt_tokens
                        stats.completion_tokens = event.usage.completion_tokens
                        details = event.usage.prompt_tokens_details
                        stats.cached_tokens = (details and details.cached_tokens) or 0
                    if not event.choices:
                        continue
                    choice = event.choices[0]
                    reason = choice.finish_reason or reason
                    text = choice.delta.content or ""
                    if not text:
                        continue
                    if not pieces:
                        first = self._clock()
                        stats.ttft_s = first - started
                    pieces += 1
                    received += len(text)
                    if received > MAX_REPLY_CHARS:
                        raise RemoteError(f"The reply of {self.url} does not end.")
                    yield Delta(text)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise self._sentence(error) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise self._foreign() from error
        if reason is None:
            raise RemoteError(f"{self.url} broke off the reply.", "Send the message again.")
        # Without a usage chunk, a piece is about a token.
        stats.completion_tokens = stats.completion_tokens or pieces
        seconds = self._clock() - first
        if stats.completion_tokens > 1 and seconds > 0:
            stats.tokens_per_s = (stats.completion_tokens - 1) / seconds
        yield Delta(finish_reason="length" if reason == "length" else "stop", stats=stats)

    async def _create(
        self, messages: Sequence[Message], sampling: SamplingParams, stop: Sequence[str], model: str
    ) -> Any:
        defaults = SamplingParams()
        extras = {
            field: getattr(sampling, field)
            for field in EXTRAS
            if getattr(sampling, field) != getattr(defaults, field)
        }
        request: dict[str, Any] = dict(
            model=model,
            messages=list(messages),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            extra_body=extras or None,
            stream=True,
        )
        if sampling.max_tokens is not None:
            request["max_tokens"] = sampling.max_tokens
        if sampling.seed is not None:
            request["seed"] = sampling.seed
        if sampling.logit_bias:
            request["logit_bias"] = {str(k): v for k, v in sampling.logit_bias.items()}
        if stop:
            request["stop"] = list(stop)
        create = self._client.chat.completions.create
        try:
            return await create(**request, stream_options={"include_usage": True})
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if "stream_options" not in str(error):
                raise
            return await create(**request)

    def _sentence(self, error: Exception) -> UserError:
        """What went wrong, for a person."""
        if isinstance(error, openai.APIStatusError):
            return self._status_sentence(error)
        if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
            return RemoteError(f"{self.url} does not answer.", "Is the server busy, or stopped?")
        if isinstance(error, httpx.RemoteProtocolError):
            return RemoteError(f"{self.url} broke off the reply.", "Send the message again.")
        if isinstance(error, (openai.APIConnectionError, httpx.TransportError)):
            return RemoteError(
                f"No server can be reached at {self.url}.",
                "Start it with: python app.py serve api_server MODEL",
            )
        if isinstance(error, openai.APIError) and not isinstance(
            error, openai.APIResponseValidationError
        ):  # an error sent in the middle of a stream
            return RemoteError(f"{self.url} says: {_plain(error.message)}")
        return self._foreign()

    def _status_sentence(self, error: openai.APIStatusError) -> UserError:
        body = error.body if isinstance(error.body, dict) else None
        said = _plain(str(body.get("message", ""))) if body else ""
        if error.status_code in (401, 403):
            return AuthError(f"{self.url} does not accept this API key.", "Enter its key.")
        if not said or 300 <= error.status_code < 400:
            return self._foreign()
        if error.code == ContextLengthError.code:
            return ContextLengthError(said)
        if error.status_code == 404:
            return ModelNotFoundError(f"{self.url} says: {said}")
        return RemoteError(f"{self.url} says: {said}")

    def _foreign(self) -> RemoteError:
        return RemoteError(
            f"{self.url} is not an OpenAI-compatible server.",
            "Check address and port; ours listens on 23333.",
        )


def _plain(text: str) -> str:
    """A stranger's sentence, bounded, without markup."""
    return re.sub(r"\s+", " ", re.sub(r"[<>]", "", text)).strip()[:500]
