"""LMDeploy's own routes: /v1/chat/interactive, whose conversations the server keeps, /v1/encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.classroom import Classroom
from backend.errors import ContextLengthError, UserError
from backend.server import sse
from backend.server.auth import caller
from backend.server.body import read_json
from backend.server.failures import describe
from backend.server.lmdeploy_protocol import (
    NO_SESSION,
    EncodeRequest,
    InteractiveRequest,
    session_number,
)
from backend.server.metrics import Metrics
from backend.server.sessions import Sessions, Turn
from backend.server.strict import parse
from backend.server.timed import timed_reply

if TYPE_CHECKING:
    from backend.chat import ChatService, Delta
    from backend.engine_manager import EngineManager

Json = dict[str, Any]

JSON_LINES = "application/x-ndjson"


class LMDeployRoutes:
    """Handlers; the arguments are those of `OpenAIRoutes`, and the sessions."""

    def __init__(
        self,
        engines: EngineManager,
        classroom: Classroom,
        metrics: Metrics,
        sessions: Sessions,
    ) -> None:
        self.engines = engines
        self.classroom = classroom
        self.metrics = metrics
        self.sessions = sessions

    async def interactive(self, request: Request) -> Response:
        """The next turn of a conversation that the server keeps."""
        body = parse(InteractiveRequest, await read_json(request))
        body.check()
        key, number = caller(request).id, body.session
        if body.cancels:
            self.sessions.cancel(key, number)
        elif body.answers:
            return await self._answer(request, body)
        elif not body.interactive_mode:
            self.sessions.end(key, number)
        elif body.prompt:
            await self._add(key, body)
        return JSONResponse(_piece("", 0, None))

    async def history(self, request: Request) -> Response:
        """What was said in a conversation that the server keeps."""
        number = session_number(request.query_params.get("session_id"))
        return JSONResponse({"messages": self.sessions.messages(caller(request).id, number)})

    async def encode(self, request: Request) -> Response:
        """Token ids of a text, or of each of several."""
        body = parse(EncodeRequest, await read_json(request))
        chat = self.engines.require()
        begun = body.add_bos is not False
        if isinstance(body.input, str):
            ids = await _encode(chat, body.input, bool(body.do_preprocess), begun)
            return JSONResponse({"input_ids": ids, "length": len(ids)})
        lists = [
            await _encode(chat, text, bool(body.do_preprocess), begun) for text in body.input]
        return JSONResponse({"input_ids": lists, "length": [len(ids) for ids in lists]})

    async def _add(self, key: str, body: InteractiveRequest) -> None:
        """Add to a conversation without a reply; no more than could be answered."""
        chat = self.engines.require()
        info = chat.engine.require_ready()
        new = [message.as_dict() for message in body.prompt]
        with self.sessions.turn(key, body.session, new, keep=True) as turn:
            try:
                chat.room(len(await chat.encode_chat(turn.messages)), info)
            except UserError as error:
                raise _of_session(error, body.session) from error
            turn.accept()

    async def _answer(self, request: Request, body: InteractiveRequest) -> Response:
        chat = self.engines.require()
        who = caller(request)
        sampling = self.classroom.bounded(who, body.sampling(chat.sampling_defaults))
        chat.engine.require_ready()
        key, new = who.id, [message.as_dict() for message in body.prompt]
        async with AsyncExitStack() as stack:
            ticket = stack.enter_context(self.classroom.admit(who))
            turn = stack.enter_context(
                self.sessions.turn(key, body.session, new, keep=bool(body.interactive_mode)))
            try:
                prompt = await chat.encode_chat(turn.messages)
                ticket.set_prompts([len(prompt)])
                deltas = timed_reply(
                    chat, self.metrics, ticket, prompt, sampling,
                    stop=(*body.stop, *chat.stop), owner=key,
                    skip_special_tokens=body.skip_special_tokens is not False)
                pieces = await stack.enter_async_context(aclosing(_pieces(deltas, turn)))
                if not body.stream:
                    return JSONResponse(await sse.until_gone(request.receive, _whole(pieces)))
                lines = await stack.enter_async_context(aclosing(_lines(pieces, turn)))
                first = await sse.until_gone(request.receive, anext(lines))
            except UserError as error:
                raise _of_session(error, body.session) from error
            return sse.EventStream(first, lines, stack.pop_all(), media_type=JSON_LINES)


async def _encode(chat: ChatService, text: str, as_message: bool, begun: bool) -> list[int]:
    if not as_message:
        return await asyncio.to_thread(chat.tokenizer.encode, text, begun)
    ids = await chat.encode_chat([{"role": "user", "content": text}])
    return ids if begun or ids[:1] != [chat.tokenizer.bos_token_id] else ids[1:]


def _piece(text: str, tokens: int, reason: str | None) -> Json:
    """LMDeploy's reply: a piece of text, the reply's tokens so far, why it ended."""
    return {"text": text, "tokens": tokens, "finish_reason": reason}


async def _pieces(deltas: AsyncGenerator[Delta, None], turn: Turn) -> AsyncGenerator[Json, None]:
    """The reply, which `turn` hears too. The last piece alone has a reason: "stop" if somebody
    cancelled."""
    tokens, reason = 0, None
    async with aclosing(deltas), aclosing(turn.until_cancelled(deltas)) as heard:
        async for delta in heard:
            turn.said(delta.text)
            tokens, reason = delta.num_tokens, delta.finish_reason
            yield _piece(delta.text, tokens, reason)
    if reason is None:
        yield _piece("", tokens, "stop")


async def _whole(pieces: AsyncGenerator[Json, None]) -> Json:
    """All pieces as one."""
    found = [piece async for piece in pieces]
    return found[-1] | {"text": "".join(piece["text"] for piece in found)}


async def _lines(pieces: AsyncGenerator[Json, None], turn: Turn) -> AsyncGenerator[bytes, None]:
    """The pieces as lines of JSON. An error before the first is raised; a later one is a line."""
    begun, tokens = False, 0
    try:
        async for piece in pieces:
            begun, tokens = True, piece["tokens"]
            yield sse.line(piece)
    except Exception as error:  # whatever it is: the status is sent, only a line can tell
        if not begun:
            raise
        turn.failed = True
        yield sse.line(_piece("", tokens, "error") | describe(error)[1])


def _of_session(error: UserError, number: int) -> UserError:
    """`error` in the words of this route: who sends a prompt sees no messages."""
    if error.field == "messages":
        error.field = "prompt"
        if isinstance(error, ContextLengthError) and number != NO_SESSION:
            error.hint = ("End the session (interactive_mode false, with an empty prompt) and "
                          "begin a new one.")
    return error
