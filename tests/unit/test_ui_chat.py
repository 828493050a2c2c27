"""The chat page's parts that need no browser."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend.chat import ReplyStats
from backend.config import SamplingParams
from backend.errors import UserError
from backend.history import History, Turn
from tests.unit.chats import ANNA, BERT, CHAT, Backend, Clock, begin, run, talk, until
from ui import chat_view, conversations, forms
from ui.context_notice import ContextNotice, turns_to_drop
from ui.conversations import Conversation, ConversationStore


def test_finished_reply_becomes_a_turn() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await store.open(ANNA, CHAT)
        pending = begin(store, conversation, Backend(["a", "b"]), "hi", 0)
        assert conversation.busy and await store.open(ANNA, CHAT) is conversation
        await pending.settled.wait()
        assert pending.live.error() is None and not conversation.busy
        assert conversation.turns == [Turn("hi", "ab", "stop", ReplyStats(3, 2))]
        again = await store.open(ANNA, CHAT)  # nothing is held: it comes from the history
        assert again is not conversation and again.turns == conversation.turns
        assert again.title == "hi"
        assert (await store.open(BERT, CHAT)).turns == []
    run(test)


def test_stop_closes_the_stream_and_keeps_what_came() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await talk(store, "old")
        backend = Backend(["half"], hangs=True)
        pending = begin(store, conversation, backend, "hi", 1)
        await until(lambda: bool(pending.live.text))
        await store.stop(conversation)
        assert backend.events == ["closed"]
        assert pending.live.error() is None
        stored = (await store.open(ANNA, CHAT)).turns
        assert [t.finish_reason for t in stored] == ["stop", "stopped"]
        await store.stop(conversation)  # of a chat at rest: nothing
    run(test)


def test_a_retry_that_brings_nothing_keeps_the_old_reply() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await talk(store, "q")
        pending = begin(store, conversation, Backend([], error=UserError("No.")), "q", 0)
        await pending.settled.wait()
        assert isinstance(pending.live.error(), UserError) and pending.lost
        assert [t.reply for t in (await store.open(ANNA, CHAT)).turns] == ["re q"]
    run(test)


def test_an_edit_takes_what_came_after_out_of_view() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await talk(store, "1", "2")
        await begin(store, conversation, Backend(["new"]), "1!", 0).settled.wait()
        edited = await store.open(ANNA, CHAT)
        assert [(t.user, t.reply) for t in edited.turns] == [("1!", "new")]
        old, new = edited.turns[0].versions
        assert new == edited.turns[0].id
        store.history.show(ANNA, CHAT, old, newest=True)
        assert [t.user for t in (await store.open(ANNA, CHAT)).turns] == ["1", "2"]
    run(test)


def test_an_error_after_text_is_marked() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await store.open(ANNA, CHAT)
        pending = begin(store, conversation, Backend(["some"], error=RuntimeError("x")), "q", 0)
        await pending.settled.wait()
        assert conversation.turns[0].finish_reason == "failed"
        assert isinstance(pending.live.error(), RuntimeError)
    run(test)


def test_a_reply_ends_when_nobody_came_back_in_time() -> None:
    async def test() -> None:
        clock = Clock()
        store = ConversationStore(History(), clock.sleep)
        backend = Backend(["half"], hangs=True)
        pending = begin(store, await store.open(ANNA, CHAT), backend, "q", 0)
        with store.watching(pending):
            await until(lambda: bool(pending.live.text))
        await until(lambda: clock.asked[-1:] == [conversations.GRACE_S])
        assert not pending.live.done  # it goes on, unseen
        clock.over.set()
        await pending.settled.wait()
        assert backend.events == ["closed"]
        assert (await store.open(ANNA, CHAT)).turns[0].finish_reason == "stopped"
    run(test)


def test_who_comes_back_in_time_finds_the_reply_and_a_whole_new_grace() -> None:
    async def test() -> None:
        clock = Clock()
        store = ConversationStore(History(), clock.sleep)
        pending = begin(store, await store.open(ANNA, CHAT), Backend(["a"], hangs=True), "q", 0)
        with store.watching(pending):
            pass
        await until(lambda: len(clock.asked) == 1)  # the one that began with the reply never did
        found = (await store.open(ANNA, CHAT)).pending
        assert found is pending
        with store.watching(pending), store.watching(pending):  # two tabs
            clock.over.set()  # of the first grace, which does not count any more
            for _ in range(20):
                await asyncio.sleep(0)
            assert not pending.live.done
            clock.over = asyncio.Event()
        await until(lambda: len(clock.asked) == 2)
        assert not pending.live.done
        await store.stop(await store.open(ANNA, CHAT))
    run(test)


def test_a_reply_that_nobody_ever_looks_at_ends_too() -> None:
    async def test() -> None:
        clock = Clock()
        store = ConversationStore(History(), clock.sleep)
        pending = begin(store, await store.open(ANNA, CHAT), Backend(["a"], hangs=True), "q", 0)
        await until(lambda: clock.asked == [conversations.GRACE_S])
        clock.over.set()
        await pending.settled.wait()
        assert pending.live.stopped
    run(test)


def test_why_a_reply_failed_is_told_once() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        pending = begin(store, await store.open(ANNA, CHAT), Backend([], error=UserError("No.")),
                        "q", 0)
        await pending.settled.wait()
        conversation = await store.open(ANNA, CHAT)
        found = store.untold(conversation)
        assert found is pending and found.lost and [str(e) for e in found.troubles()] == ["No."]
        assert store.untold(conversation) is None
        await begin(store, conversation, Backend(["fine"]), "q", 0).settled.wait()
        assert store.untold(await store.open(ANNA, CHAT)) is None
    run(test)


def test_a_turn_that_cannot_be_saved_is_held_and_saved_with_the_next() -> None:
    class Full(History):
        full = True

        def add_turn(self, *args: Any) -> int:
            if self.full:
                raise UserError("The chat history cannot be used: disk full.")
            return super().add_turn(*args)

    async def test() -> None:
        store = ConversationStore(Full())
        pending = begin(store, await store.open(ANNA, CHAT), Backend(["a"]), "1", 0)
        await pending.settled.wait()
        assert pending.trouble is not None and "disk full" in str(pending.trouble)
        held = await store.open(ANNA, CHAT)
        assert [t.user for t in held.turns] == ["1"] and not held.saved and not held.busy
        store.history.full = False
        await begin(store, held, Backend(["b"]), "2", 1).settled.wait()
        assert [t.user for t in store.history.open(ANNA, CHAT).turns] == ["1", "2"]
        assert await store.open(ANNA, CHAT) is not held
    run(test)


def test_undo_and_delete() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        conversation = await talk(store, "1", "2")
        assert await store.undo(conversation) == "2"
        assert [t.user for t in (await store.open(ANNA, CHAT)).turns] == ["1"]
        await store.undo(await store.open(ANNA, CHAT))
        assert await store.undo(await store.open(ANNA, CHAT)) == ""
        busy = await store.open(ANNA, CHAT)
        backend = Backend(["x"], hangs=True)
        begin(store, busy, backend, "3", 0)
        await until(lambda: bool(busy.pending and busy.pending.live.text))
        await store.delete(busy)
        assert backend.events == ["closed"] and store.history.summaries(ANNA) == []
    run(test)


def test_ids_are_as_the_page_makes_them() -> None:
    async def test() -> None:
        store = ConversationStore(History())
        for bad in ("", None, "x" * 32, CHAT + "0", "../etc/passwd"):
            with pytest.raises(UserError):
                await store.open(ANNA, bad)
    run(test)


def test_messages_for_the_model() -> None:
    conversation = Conversation(turns=[Turn("a", "b", "stop"), Turn("c", "d", "stop")])
    conversation.system_prompt = "Be brief."
    roles = [(m["role"], m["content"]) for m in conversation.messages(1, "e")]
    assert roles == [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "e")]
    conversation.system_prompt = "  "
    assert len(conversation.messages()) == 4


def test_dropped_turns_are_shown_but_not_sent() -> None:
    turns = [Turn("a", "b", "stop"), Turn("c", "d", "stop"), Turn("e", "f", "stop")]
    conversation = Conversation(turns=turns, dropped=1)
    assert [m["content"] for m in conversation.messages(2, "x")] == ["c", "d", "x"]
    assert [m["content"] for m in conversation.messages(3, "x", 2)] == ["e", "f", "x"]
    assert len(chat_view.chat_messages(conversation, "en")) == 6
    assert chat_view.stats_html(conversation, "en").count("no longer sent") == 1


class Counter:
    """Counts a token a word of a context of a hundred."""

    async def status(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(session_len=100))

    async def count_tokens(self, messages: Any) -> int:
        return sum(len(m["content"].split()) for m in messages)


@pytest.mark.parametrize(("words", "expected"), [(8, 2), (2, 0), (40, 4), (200, 4)])
def test_as_few_turns_are_dropped_as_needed(words: int, expected: int) -> None:
    text = "word " * (words - 1)
    conversation = Conversation(turns=[Turn(text, "r", "stop") for _ in range(4)])
    dropped = asyncio.run(turns_to_drop(Counter(), conversation, 4, "w " * 30))
    assert dropped == expected


@pytest.mark.parametrize(("tokens", "fits"), [(95, True), (99, True), (100, False), (9000, False)])
def test_nobody_is_offered_to_go_on_with_what_does_not_fit(tokens: int, fits: bool) -> None:
    with gr.Blocks():
        notice = ContextNotice()
    shown = notice.shown(chat_view.ContextUse(tokens, 100), True, "en")
    assert shown[notice.go_on]["visible"] is fits
    assert ("does not fit" in shown[notice.text]) is not fits


def test_form_has_the_bounds_and_defaults_of_sampling_params() -> None:
    values = forms.defaults({"temperature": 0.1})
    assert values["temperature"] == 0.1 and values["max_tokens"] == 512
    assert forms.sampling_params(values) == SamplingParams(temperature=0.1, max_tokens=512)
    assert "(0 to 2)" in forms.help_texts()["help.temperature"]
    with pytest.raises(UserError, match="top_p must be from"):
        forms.sampling_params(values | {"top_p": 7})


def test_message_numbers_lead_to_their_turns() -> None:
    turns = [Turn("a", "<think>hm</think>b", "stop"), Turn("c", "", "stop")]
    conversation = Conversation(turns=turns)
    messages = chat_view.chat_messages(conversation, "en")
    assert [m["role"] for m in messages] == ["user", "assistant", "assistant", "user", "assistant"]
    numbers = [chat_view.turn_of_message(conversation, "en", i) for i in range(6)]
    assert numbers == [0, 0, 0, 1, 1, None]


@pytest.mark.parametrize(("text", "thoughts", "answer"), [
    ("<think>so far", "so far", ""),
    (" <think>a\nb</think>\nc", "a\nb", "c"),
    ("no <think>tag</think>", "", "no <think>tag</think>"),
    ("begun by the template\n</think>\n\nThe answer", "begun by the template", "The answer"),
    ("it ends with `</think>`, you see", "", "it ends with `</think>`, you see"),
    ("plain", "", "plain"),
    ("", "", ""),
])
def test_reasoning(text: str, thoughts: str, answer: str) -> None:
    assert chat_view.split_reasoning(text) == (thoughts, answer)


def test_stats_line() -> None:
    turn = Turn("a", "b", "length", ReplyStats(10, 20, 5, 0.125, 33.33))
    assert chat_view.stats_line(turn, "en") == (
        "first token 0.12 s · 33.3 tokens/s · 10 prompt + 20 reply tokens · "
        "5 from the prefix cache · cut at the length limit")
    assert chat_view.stats_line(Turn("a", "b", "stopped"), "en") == "stopped"


def test_meter_warns_when_nearly_full() -> None:
    def meter(tokens: int | None, limit: int | None) -> str:
        return chat_view.meter_html(chat_view.ContextUse(tokens, limit), "en")

    assert meter(None, 100) == ""
    assert "lmd-full" not in meter(50, 100)
    assert "lmd-full" in meter(90, 100)
    assert "width:100.0%" in meter(190, 100)
    assert "7 tokens" in meter(7, None)


def test_a_class_that_waits_for_replies_leaves_room_for_other_events() -> None:
    from backend.services import Services
    from tests.e2e.fake_chat import FakeChat
    from ui.build import MAX_EVENTS, build_ui

    assert build_ui(Services(FakeChat()))._queue.max_thread_count == MAX_EVENTS > 40
