"""A growing reply's way to the page, without a browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import pytest
from hypothesis import given, strategies as st
from starlette.requests import Request

from backend.classroom import SCOPE_KEY, Caller
from backend.errors import UserError
from backend.history import History
from tests.unit.chats import ANNA, CHAT, Backend, Clock, begin, run, until
from ui import conversations, reply_stream
from ui.conversations import Conversation, ConversationStore
from ui.owner import cookie_name, owner_of
from ui.reply_stream import Frame, ReplyStream, changes

COOKIE = "b" * 32


def request_of(store: ConversationStore, cookie: str = COOKIE) -> Request:
    cookies = f"{cookie_name(store.history.instance)}={cookie}"
    return Request({"type": "http", "headers": [(b"cookie", cookies.encode())],
                    SCOPE_KEY: Caller()})


async def nobody_waits() -> None:
    """The engine's figures, which are not known."""


async def opened(store: ConversationStore) -> Conversation:
    """The browser's chat."""
    request = gr.Request(request_of(store))
    return await store.open(owner_of(request, store.history.instance, CHAT), CHAT)


async def lines_of(
    store: ConversationStore, *, wait: bool = False, cookie: str = COOKIE
) -> AsyncIterator[dict[str, Any]]:
    answer = await ReplyStream(store, nobody_waits).answer(
        CHAT, request_of(store, cookie), wait=wait)
    async for line in answer.body_iterator:
        yield json.loads(line)


def after(frame: Frame, line: dict[str, Any]) -> Frame:
    """What the page has, after a line, of what it had."""
    added = {name: frame[name] + text for name, text in line.get("add", {}).items()}
    return {**frame, **line.get("set", {}), **added}


@given(st.lists(st.fixed_dictionaries({
    "thoughts": st.sampled_from(["", "a", "ab", "b"]), "live": st.text("ab\n", max_size=4)})))
def test_changes_make_each_frame_of_the_one_before(frames: list[Frame]) -> None:
    shown: Frame = {"thoughts": "", "live": ""}
    sent: Frame = {}
    for frame in frames:
        shown = after(shown, changes(sent, frame))
        sent = frame
        assert shown == frame


def test_a_reply_is_told_from_its_first_word_to_its_end() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await opened(store)
        backend = Backend(["<think>so</think>", "The ", "answer"])
        begin(store, conversation, backend, "q", 0)
        lines = [line async for line in lines_of(store)]
        shown: Frame = {"thoughts": "", "live": ""}
        for line in lines:
            shown = after(shown, line)
        assert shown == {"thoughts": "so", "live": "The answer"}
        assert lines[-1] == {"ended": True} and not any("ended" in line for line in lines[:-1])
        assert (await opened(store)).turns[0].reply.endswith("The answer")  # a turn by then
    run(test)


def test_a_chat_without_a_reply_has_no_lines() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        await begin(store, await opened(store), Backend(["x"]), "q", 0).settled.wait()
        assert [line async for line in lines_of(store)] == []
    run(test)


def test_others_do_not_see_it() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        begin(store, await opened(store), Backend(["secret"], hangs=True), "q", 0)
        assert [line async for line in lines_of(store, cookie="c" * 32)] == []
        await store.stop(await opened(store))
    run(test)


def test_it_may_be_asked_for_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        store = ConversationStore(History())
        reading = asyncio.ensure_future(anext(lines_of(store, wait=True)))
        also = asyncio.ensure_future(anext(lines_of(store, wait=True)))
        await until(lambda: bool(store._coming))
        await asyncio.sleep(0)
        pending = begin(store, await opened(store), Backend(["x"], hangs=True), "q", 0)
        assert (await reading)["set"] == (await also)["set"] == {"live": "x"}
        pending.live.stop()
        await pending.settled.wait()
        assert not store._coming
        monkeypatch.setattr(reply_stream, "BEGIN_S", 0.01)
        assert [line async for line in lines_of(store, wait=True)] == []
    run(test)


def test_a_page_that_goes_away_leaves_the_reply_to_its_grace() -> None:
    async def test() -> None:
        clock = Clock()
        store = ConversationStore(History(), clock.sleep)
        backend = Backend(["half"], hangs=True)
        pending = begin(store, await opened(store), backend, "q", 0)
        answer = await ReplyStream(store, nobody_waits).answer(CHAT, request_of(store))

        gone = asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        serving = asyncio.ensure_future(answer({"type": "http"}, receive, send))
        await until(lambda: pending.viewers == 1 and len(sent) > 1)
        gone.set()
        await serving
        assert not pending.viewers and not pending.live.done
        await until(lambda: clock.asked[-1:] == [conversations.GRACE_S])
        clock.over.set()
        await pending.settled.wait()
        assert backend.events == ["closed"]
    run(test)


def test_ids_are_as_the_page_makes_them() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        with pytest.raises(UserError):
            await ReplyStream(store, nobody_waits).answer("../x", request_of(store))
        assert (await store.open(ANNA, CHAT)).turns == []
    run(test)
