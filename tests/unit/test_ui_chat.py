"""The chat page's parts that need no browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from backend.chat import Delta, ReplyStats
from backend.config import SamplingParams
from backend.errors import UserError
from ui import chat_view, forms
from ui.conversations import Conversation, ConversationStore, Pending, Turn
from ui.live_reply import LiveReply


@dataclass
class Backend:
    """Yields `pieces`, then waits for ever if `hangs`."""

    pieces: list[str]
    hangs: bool = False
    error: Exception | None = None
    events: list[str] = field(default_factory=list)

    async def stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Delta, None]:
        try:
            for piece in self.pieces:
                yield Delta(piece)
            if self.error:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
            yield Delta("", "stop", stats=ReplyStats(3, len(self.pieces)))
        finally:
            self.events.append("closed")


def begin(conversation: Conversation, backend: Backend, user: str, keep: int) -> Pending:
    live = LiveReply(backend, conversation.messages(keep, user), SamplingParams(), None)
    conversation.pending = Pending(user, keep, live)
    return conversation.pending


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_finished_reply_becomes_a_turn() -> None:
    async def test() -> None:
        conversation = Conversation()
        pending = begin(conversation, Backend(["a", "b"]), "hi", 0)
        live = pending.live
        await live.wait(5)
        assert live.done and live.error() is None
        conversation.settle(pending)
        conversation.settle(pending)  # whoever comes second changes nothing
        assert conversation.turns == [Turn("hi", "ab", "stop", ReplyStats(3, 2))]
        assert not conversation.busy

        later = begin(conversation, Backend([], hangs=True), "more", 1)
        conversation.settle(pending)  # nor may the end of an old reply end a new one
        assert conversation.pending is later
        await conversation.stop()
    run(test)


def test_stop_closes_the_stream_and_keeps_what_came() -> None:
    async def test() -> None:
        conversation = Conversation([Turn("old", "reply", "stop")])
        backend = Backend(["half"], hangs=True)
        pending = begin(conversation, backend, "hi", 1)
        live = pending.live
        while not live.text:
            await asyncio.sleep(0)
        await conversation.stop()
        assert backend.events == ["closed"]
        assert live.error() is None
        assert [t.finish_reason for t in conversation.turns] == ["stop", "stopped"]
    run(test)


def test_a_retry_that_brings_nothing_keeps_the_old_reply() -> None:
    async def test() -> None:
        conversation = Conversation([Turn("q", "old reply", "stop")])
        pending = begin(conversation, Backend([], error=UserError("No.")), "q", 0)
        live = pending.live
        await live.wait(5)
        assert isinstance(live.error(), UserError)
        conversation.settle(pending)
        assert [t.reply for t in conversation.turns] == ["old reply"]
    run(test)


def test_an_edit_drops_what_came_after() -> None:
    async def test() -> None:
        conversation = Conversation([Turn("1", "a", "stop"), Turn("2", "b", "stop")])
        pending = begin(conversation, Backend(["new"]), "1!", 0)
        live = pending.live
        await live.wait(5)
        conversation.settle(pending)
        assert [(t.user, t.reply) for t in conversation.turns] == [("1!", "new")]
    run(test)


def test_an_error_after_text_is_marked() -> None:
    async def test() -> None:
        conversation = Conversation()
        pending = begin(conversation, Backend(["some"], error=RuntimeError("x")), "q", 0)
        live = pending.live
        await live.wait(5)
        conversation.settle(pending)
        assert conversation.turns[0].finish_reason == "failed"
        assert isinstance(live.error(), RuntimeError)
    run(test)


def test_messages_for_the_model() -> None:
    conversation = Conversation([Turn("a", "b", "stop"), Turn("c", "d", "stop")], "Be brief.")
    roles = [(m["role"], m["content"]) for m in conversation.messages(1, "e")]
    assert roles == [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "e")]
    conversation.system_prompt = "  "
    assert len(conversation.messages()) == 4


def ids(count: int) -> list[str]:
    return [f"{number:032x}" for number in range(count)]


def test_store_finds_conversations_again_and_keeps_them_apart() -> None:
    store = ConversationStore()
    one, two = ids(2)
    store.open(one).turns.append(Turn("a", "b", "stop"))
    assert store.open(two).turns == []
    assert store.open(one).turns == [Turn("a", "b", "stop")]
    for bad in ("", None, "x" * 32, one + "0", "../etc/passwd"):
        with pytest.raises(UserError):
            store.open(bad)


def test_store_forgets_the_least_recently_used() -> None:
    store = ConversationStore(max_conversations=2, max_characters=1000)
    one, two, three = ids(3)
    for key in (one, two, one, three):
        store.open(key).system_prompt = key
    assert len(store) == 2  # of pages without a turn, too, there are never more
    assert store.open(one).system_prompt == one
    assert store.open(two).system_prompt == ""  # was forgotten

    store.open(three).turns = [Turn("x" * 2000, "", "stop")]
    store.trim()  # over the cap by itself: it is the newest, so it stays, alone
    assert len(store) == 1 and store.open(three).turns


def test_store_never_forgets_a_conversation_at_work() -> None:
    async def test() -> None:
        store = ConversationStore(max_conversations=1)
        one, two = ids(2)
        busy = store.open(one)
        begin(busy, Backend([], hangs=True), "q", 0)
        store.open(two)
        assert store.open(one) is busy
        await busy.stop()
    run(test)


def test_form_has_the_bounds_and_defaults_of_sampling_params() -> None:
    values = forms.defaults({"temperature": 0.1})
    assert values["temperature"] == 0.1 and values["max_tokens"] == 512
    assert forms.sampling_params(values) == SamplingParams(temperature=0.1, max_tokens=512)
    assert "(0 to 2)" in forms.help_texts()["help.temperature"]
    with pytest.raises(UserError, match="top_p must be from"):
        forms.sampling_params(values | {"top_p": 7})


def test_message_numbers_lead_to_their_turns() -> None:
    turns = [Turn("a", "<think>hm</think>b", "stop"), Turn("c", "", "stop")]
    conversation = Conversation(turns)
    messages = chat_view.chat_messages(conversation, "en")
    assert [m["role"] for m in messages] == ["user", "assistant", "assistant", "user", "assistant"]
    numbers = [chat_view.turn_of_message(conversation, "en", i) for i in range(6)]
    assert numbers == [0, 0, 0, 1, 1, None]


def test_reasoning_in_the_making() -> None:
    assert chat_view.split_reasoning("<think>so far") == ("so far", "")
    assert chat_view.live_markdown("<think>a\nb</think>\nc") == "> a\n> b\n\nc"
    assert chat_view.split_reasoning("no <think>tag</think>") == ("", "no <think>tag</think>")


def test_stats_line() -> None:
    turn = Turn("a", "b", "length", ReplyStats(10, 20, 5, 0.125, 33.33))
    assert chat_view.stats_line(turn, "en") == (
        "first token 0.12 s · 33.3 tokens/s · 10 prompt + 20 reply tokens · "
        "5 from the prefix cache · cut at the length limit")
    assert chat_view.stats_line(Turn("a", "b", "stopped"), "en") == "stopped"


def test_meter_warns_when_nearly_full() -> None:
    assert chat_view.meter_html(None, 100, "en") == ""
    assert "lmd-full" not in chat_view.meter_html(50, 100, "en")
    assert "lmd-full" in chat_view.meter_html(90, 100, "en")
    assert "width:100.0%" in chat_view.meter_html(190, 100, "en")
    assert "7 tokens" in chat_view.meter_html(7, None, "en")
