"""Replies of nodes to conversations that the proxy keeps.

A node is sent the whole conversation, without a session of its own: so it goes on when its node is
lost, and two clients' sessions of one number cannot meet there. It stays with the node that
answered last, which has most of it in its prefix cache.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any, Protocol

from backend.admission import Ticket
from backend.chat import Message
from backend.classroom import Caller
from backend.errors import ContextLengthError, RemoteError, UserError
from backend.remote import error_in
from backend.remote_session import reply_line
from backend.server.interactive import piece
from backend.server.lmdeploy_protocol import NO_SESSION, InteractiveRequest
from backend.server.proxy.nodes import Work
from backend.server.proxy.upstream import Answer
from backend.server.sessions import Turn

PATH = "/v1/chat/interactive"
OWN = {"prompt", "session_id", "interactive_mode", "stream", "cancel", "model"}


class Ask(Protocol):
    """`Proxy.ask`."""

    async def __call__(
        self, path: str, body: bytes, model: str | None, stream: bool, stack: AsyncExitStack,
        preferred: object = None,
    ) -> tuple[Answer, Work]: ...


class NodeSpeaker:
    """A `Speaker` whose replies are the nodes'."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def check_room(self, body: InteractiveRequest, messages: list[Message]) -> None:
        """Nothing: only a node could count the tokens, and it will with the next reply."""

    async def reply(
        self, body: InteractiveRequest, turn: Turn, who: Caller, ticket: Ticket
    ) -> AsyncGenerator[dict[str, Any], None]:
        """See `Speaker`.

        Raises:
            UserError: what a node refuses, and why; RemoteError: none answers.
        """
        given = body.model_dump(exclude_unset=True, exclude=OWN)
        sent = {**given, "prompt": turn.messages, "session_id": NO_SESSION, "stream": True}
        async with AsyncExitStack() as stack:
            answer, work = await self._ask(
                PATH, json.dumps(sent).encode(), body.model, True, stack, turn.place)
            ticket.started(0)
            turn.place = work.node
            if answer.chunks is None:
                raise _refusal(answer)
            reason = None
            async for line in _lines(answer):
                part = _piece(line)
                reason = part["finish_reason"]
                yield part
            if reason is None:
                raise RemoteError("The node ended the reply half-way.", "Send it again.")
            work.done()


async def _lines(answer: Answer) -> AsyncGenerator[bytes, None]:
    """What came first, then the rest, by lines."""
    assert answer.chunks is not None
    *whole, rest = answer.body.split(b"\n")
    for line in whole:
        if line.strip():
            yield line
    async for chunk in answer.chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line.strip():
                yield line
    if rest.strip():
        yield rest


def _piece(line: bytes) -> dict[str, Any]:
    """A line of a node's reply.

    Raises:
        RemoteError: it is none, or an error.
    """
    found = reply_line(line)
    if found is None:
        raise RemoteError("The node sent something that is no reply.")
    text, tokens, reason, told = found
    if reason == "error":
        raise RemoteError(f"The node failed: {told}")
    return piece(text, tokens, reason)


def _refusal(answer: Answer) -> UserError:
    """What a node has against the request."""
    try:
        told, code = error_in(json.loads(answer.body))
    except (ValueError, RecursionError):
        told, code = None, ""
    if code == ContextLengthError.code:
        return ContextLengthError(told or "The conversation is too long.", field="messages")
    error = UserError(told or "The node refuses the request.")
    error.status = answer.status if answer.status >= 400 else RemoteError.status
    error.code = code or error.code
    return error
