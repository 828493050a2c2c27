"""The client of remote servers against our own server: the same talk as without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backend import keyfile
from backend.chat import ChatBackend, Delta
from backend.config import SamplingParams
from backend.errors import AuthError, ContextLengthError, RemoteError, UserError
from backend.remote import RemoteChat
from backend.services import Services, remote_services
from tests.server.support import NAME, Served, serve


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # no real key file
    with serve() as running:
        yield running


async def talk(
    backend: ChatBackend, text: str, sampling: SamplingParams, stop: Sequence[str] = ()
) -> list[Delta]:
    messages = [{"role": "user", "content": text}]
    return [delta async for delta in backend.stream(messages, sampling, stop=stop)]


@pytest.mark.parametrize(("text", "options", "stop"), [
    ("Grüße, 世界 👩‍👧", {}, ()),
    ("cut off here", {"max_tokens": 4}, ()),
    ("random", {"seed": 7}, ()),
    ("a stop string", {}, ("stop",)),
])
def test_a_reply_is_that_of_the_engine(
    text: str, options: dict[str, Any], stop: tuple[str, ...], served: Served
) -> None:
    sampling = SamplingParams(**options)
    here = served.run(lambda: talk(served.chat, text, sampling, stop))
    there = asyncio.run(talk(RemoteChat(served.url), text, sampling, stop))
    assert "".join(d.text for d in there) == "".join(d.text for d in here)
    assert there[-1].finish_reason == here[-1].finish_reason
    for name in ("prompt_tokens", "completion_tokens"):
        assert getattr(there[-1].stats, name) == getattr(here[-1].stats, name)
    assert there[-1].stats.ttft_s > 0


def test_cached_tokens_are_told(served: Served) -> None:
    chat, text = RemoteChat(served.url), "the same again " * 50
    asyncio.run(talk(chat, text, SamplingParams(max_tokens=1)))
    last = asyncio.run(talk(chat, text, SamplingParams(max_tokens=1)))[-1]
    assert 0 < last.stats.cached_tokens < last.stats.prompt_tokens == len(text)


def test_models_and_status(served: Served) -> None:
    async def main() -> None:
        async with remote_services(served.url + "/v1") as services:
            assert await services.chat.models() == [NAME]
            status = await services.chat.status()
            assert (status.state, status.model) == ("ready", NAME)
            assert status.info is not None and status.info.session_len == 1 << 17
            assert served.url in await services.ready()

    asyncio.run(main())


def test_no_connection_is_kept(served: Served) -> None:
    """So a client may be forgotten without being closed, as the page does."""
    async def main() -> None:
        chat = RemoteChat(served.url)
        await chat.status()
        await talk(chat, "hello", SamplingParams())
        idle = partial(served.eventually, lambda: not served.server.server_state.connections)
        await asyncio.to_thread(idle)

    asyncio.run(main())


def test_leaving_aborts_the_engine_s_work(served: Served) -> None:
    async def leave() -> None:
        chat = RemoteChat(served.url)
        deltas = chat.stream([{"role": "user", "content": "endless"}], SamplingParams())
        assert (await anext(deltas)).text
        await deltas.aclose()

    asyncio.run(leave())
    served.assert_all_ended()


def test_errors_are_those_of_the_server(served: Served) -> None:
    def fail(kind: type[UserError], text: str, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            asyncio.run(talk(RemoteChat(served.url), text, SamplingParams(**options)))
        assert type(caught.value) is kind
        return str(caught.value)

    assert "131072" in fail(ContextLengthError, "long" * 40_000)
    assert "min_tokens" in fail(UserError, "x", min_tokens=5, max_tokens=2)
    assert "engine" in fail(RemoteError, "crash now").lower()


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with serve(api_keys=("sk-of-the-server",)) as served:
        for key, sentence in (("", "needs an API key"), ("sk-wrong", "does not accept the API")):
            with pytest.raises(AuthError, match=sentence):
                asyncio.run(RemoteChat(served.url, key).models())
        keyfile.write_key(served.port, "sk-of-the-server")
        assert asyncio.run(RemoteChat(served.url).models()) == [NAME]


@pytest.mark.parametrize("url", [
    "http://10.0.0.8:23333", "http://192.0.2.1", "http://localhost.example.org", "0.0.0.1:80",
    "http://[2001:db8::1]:5", "http://example.org:23333/lab2",
])
def test_a_page_reaches_no_other_machine(url: str) -> None:
    services = Services(RemoteChat("http://example.org:23333/lab"),
                        default_url="http://example.org:23333/lab")
    assert services.connect("http://example.org:23333/lab/v1", "").url == services.default_url
    assert services.connect("127.0.0.1:5", "").url == "http://127.0.0.1:5"
    with pytest.raises(UserError, match="not one of this page's servers"):
        services.connect(url, "")
