"""A growing reply's own way to the page: one request that lasts as long as the reply is written.

An event of Gradio's could draw it too, but it would have to be asked for when the one that began
the reply has ended; each frame would cost the server more; and that a tab is closed just then would
never be noticed. assets/ui/reply.js reads what comes here, a line of JSON a frame:

    {"set": {"live": "The ans"}}    the text of the reply, or of its "thoughts", as it now is
    {"add": {"live": "wer"}}        what it goes on with
    {"ended": true}                 the last line: the reply is a finished turn, or has failed
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import gradio as gr
from starlette.requests import Request
from starlette.responses import StreamingResponse

from backend.engine.types import EngineStats
from backend.live_reply import LiveReply
from ui import chat_view
from ui.conversations import Conversation, ConversationStore, Pending
from ui.i18n import locale_of
from ui.owner import owner_of
from ui.roles import Page

PATH = "/page/reply/{chat_id}"
FRAME_S = 0.1  # between two drawings of a growing reply
WAITING_S = 0.5  # between two of how long it has been waited for
BEGIN_S = 20.0  # the page asks when it asks for the reply, which begins in this time, if it does

Frame = dict[str, str]  # "live" and "thoughts" -> text
Queue = Callable[[], Awaitable[EngineStats | None]]


class ReplyStream:
    """Serves the replies of `store`.

    Args:
        queue: the engine's figures, asked while a reply has no text.
    """

    def __init__(self, store: ConversationStore, queue: Queue) -> None:
        self.store = store
        self.queue = queue

    def wire(self, page: Page) -> None:
        page.routes[PATH] = self.answer

    async def answer(
        self, chat_id: str, request: Request, wait: bool = False
    ) -> StreamingResponse:
        """The lines of the reply that the chat is getting; none if it gets none.

        Args:
            wait: for one that begins in `BEGIN_S`.
        """
        asked_by = gr.Request(request)
        owner = owner_of(asked_by, self.store.history.instance, chat_id)
        conversation = await self.store.open(owner, chat_id)
        return StreamingResponse(
            self._lines(conversation, locale_of(asked_by), wait),
            media_type="application/x-ndjson",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def _lines(
        self, conversation: Conversation, locale: str, wait: bool
    ) -> AsyncGenerator[bytes, None]:
        pending = conversation.pending
        if pending is None and wait:
            pending = await self.store.next_reply(conversation, BEGIN_S)
        if pending is None:
            return
        sent: Frame = {}
        with self.store.watching(pending):
            async with aclosing(frames(pending, locale, self.queue)) as shown:
                async for frame in shown:
                    yield _line(changes(sent, frame))
                    sent = frame
            await pending.settled.wait()
        yield _line({"ended": True})


async def frames(pending: Pending, locale: str, queue: Queue) -> AsyncGenerator[Frame, None]:
    """How the reply grows, until it ends."""
    live, drawn = pending.live, ""
    while not live.done:
        if not live.text:
            yield waiting(live, await queue(), locale)
            await live.wait_begun(WAITING_S)
            continue
        if live.text != drawn:
            drawn = live.text
            yield frame_of(drawn)
        await live.wait(FRAME_S)
    if live.text:
        yield frame_of(live.text)


def frame_of(text: str) -> Frame:
    """What has come of a reply, as it is drawn."""
    thoughts, answer = chat_view.split_reasoning(text)
    return {"thoughts": thoughts, "live": answer}


def waiting(live: LiveReply, stats: EngineStats | None, locale: str) -> Frame:
    """What is drawn before there is text."""
    seconds = time.monotonic() - live.started
    return {"thoughts": "", "live": chat_view.waiting_html(seconds, stats, locale)}


def changes(sent: Frame, frame: Frame) -> dict[str, Frame]:
    """What makes the one of the other."""
    found: dict[str, Frame] = {}
    for name, text in frame.items():
        before = sent.get(name, "")
        if before and text.startswith(before):
            if text != before:
                found.setdefault("add", {})[name] = text[len(before):]
        elif text != before:
            found.setdefault("set", {})[name] = text
    return found


def _line(message: object) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode() + b"\n"
