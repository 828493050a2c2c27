"""/v1/chat/interactive: conversations that the server keeps, whoever gives the replies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.admission import Ticket
from backend.chat import Message
from backend.classroom import Caller
from backend.errors import ContextLengthError, UserError
from backend.server import sse
from backend.server.auth import caller
from backend.server.body import read_json
from backend.server.failures import describe
from backend.server.lmdeploy_protocol import NO_SESSION, InteractiveRequest, session_number
from backend.server.sessions import Sessions, Turn
from backend.server.strict import parse

Json = dict[str, Any]

JSON_LINES = "application/x-ndjson"


class Speaker(Protocol):
    """Who answers: the engine here, or a node of a proxy."""

    async def check_room(self, body: InteractiveRequest, messages: list[Message]) -> None:
        """Insist that a reply to `messages` could follow.

        Raises:
            UserError: none could.
        """

    def reply(
        self, body: InteractiveRequest, turn: Turn, who: Caller, ticket: Ticket
    ) -> AsyncGenerator[Json, None]:
        """The reply to `turn.messages`, in `piece`s; the last has the reason why it ended.

        Args:
            who: the caller.
            ticket: to be told when the work begins.
        """


class InteractiveRoutes:
    """Handlers.

    Args:
        speaker: gives the replies.
        admit: lets a caller's request in, or refuses it.
        sessions: keeps the conversations.
    """

    def __init__(
        self, speaker: Speaker, admit: Callable[[Caller], Ticket], sessions: Sessions
    ) -> None:
        self.speaker = speaker
        self.admit = admit
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
        return JSONResponse(piece("", 0, None))

    async def history(self, request: Request) -> Response:
        """What was said in a conversation that the server keeps."""
        number = session_number(request.query_params.get("session_id"))
        return JSONResponse({"messages": self.sessions.messages(caller(request).id, number)})

    async def _add(self, key: str, body: InteractiveRequest) -> None:
        """Add to a conversation without a reply; no more than could be answered."""
        new = [message.as_dict() for message in body.prompt]
        with self.sessions.turn(key, body.session, new, keep=True) as turn:
            try:
                await self.speaker.check_room(body, turn.messages)
            except UserError as error:
                raise _of_session(error, body.session) from error
            turn.accept()

    async def _answer(self, request: Request, body: InteractiveRequest) -> Response:
        who, new = caller(request), [message.as_dict() for message in body.prompt]
        async with AsyncExitStack() as stack:
            ticket = stack.enter_context(self.admit(who))
            turn = stack.enter_context(
                self.sessions.turn(who.id, body.session, new, keep=bool(body.interactive_mode)))
            reply = self.speaker.reply(body, turn, who, ticket)
            pieces = await stack.enter_async_context(aclosing(_heard(reply, turn)))
            try:
                if not body.stream:
                    return JSONResponse(await sse.until_gone(request.receive, _whole(pieces)))
                lines = await stack.enter_async_context(aclosing(_lines(pieces, turn)))
                first = await sse.until_gone(request.receive, anext(lines))
            except UserError as error:
                raise _of_session(error, body.session) from error
            return sse.EventStream(first, lines, stack.pop_all(), media_type=JSON_LINES)


def piece(text: str, tokens: int, reason: str | None) -> Json:
    """LMDeploy's reply: a piece of text, the reply's tokens so far, why it ended."""
    return {"text": text, "tokens": tokens, "finish_reason": reason}


async def _heard(reply: AsyncGenerator[Json, None], turn: Turn) -> AsyncGenerator[Json, None]:
    """The reply, which `turn` hears too. The last piece alone has a reason: "stop" if somebody
    cancelled."""
    tokens, reason = 0, None
    async with aclosing(reply), aclosing(turn.until_cancelled(reply)) as heard:
        async for part in heard:
            turn.said(part["text"])
            tokens, reason = part["tokens"], part["finish_reason"]
            yield part
    if reason is None:
        yield piece("", tokens, "stop")


async def _whole(pieces: AsyncGenerator[Json, None]) -> Json:
    """All pieces as one."""
    found = [part async for part in pieces]
    return found[-1] | {"text": "".join(part["text"] for part in found)}


async def _lines(pieces: AsyncGenerator[Json, None], turn: Turn) -> AsyncGenerator[bytes, None]:
    """The pieces as lines of JSON. An error before the first is raised; a later one is a line."""
    begun, tokens = False, 0
    try:
        async for part in pieces:
            begun, tokens = True, part["tokens"]
            yield sse.line(part)
    except Exception as error:  # whatever it is: the status is sent, only a line can tell
        if not begun:
            raise
        turn.failed = True
        yield sse.line(piece("", tokens, "error") | describe(error)[1])


def _of_session(error: UserError, number: int) -> UserError:
    """`error` in the words of this route: who sends a prompt sees no messages."""
    if error.field == "messages":
        error.field = "prompt"
        if isinstance(error, ContextLengthError) and number != NO_SESSION:
            error.hint = ("End the session (interactive_mode false, with an empty prompt) and "
                          "begin a new one.")
    return error
