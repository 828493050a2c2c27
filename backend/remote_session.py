"""A conversation that an api_server keeps under a number: /v1/chat/interactive, LMDeploy's route.

Only what is new is sent, and any other client with the same key may go on with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from backend.chat import Delta, Message, ReplyStats
from backend.config import SamplingParams
from backend.errors import AuthError, OverloadedError, RemoteError, UserError
from backend.remote import (
    MAX_REPLY_CHARS,
    NO_SERVER,
    RemoteChat,
    as_json,
    clean,
    error_in,
    printable,
)

PATH = "/v1/chat/interactive"
ALWAYS_SENT = ("temperature", "top_p")
IF_CHANGED = ("top_k", "repetition_penalty", "ignore_eos")
SHOWN_CHARS = 200  # of the last message, to whom joins a session


class RemoteSession:
    """A `Conversation` that the server keeps.

    Args:
        number: of the session, the user's own choice.
        system: system prompt, of a session that is new.

    Raises:
        UserError: no session has such a number.
    """

    def __init__(self, backend: RemoteChat, number: int, system: str | None = None) -> None:
        if number < 0:
            raise UserError("A session's number is at least 0.", field="session_id")
        self.backend = backend
        self._number = number
        self._system = system
        self._is_new = True

    async def begin(self) -> str:
        """How far the session has come.

        Raises:
            UserError: the server keeps no sessions, or cannot be asked.
        """
        found = await self._history()
        if not found:
            return ""
        self._is_new = False
        unused = " --system is for new ones; end begins one." if self._system else ""
        last = clean(str(found[-1].get("content")), SHOWN_CHARS)
        return (f"Session {self._number} goes on after {len(found)} messages, the last: "
                f"{last}{unused}")

    async def say(self, text: str, sampling: SamplingParams) -> AsyncGenerator[Delta, None]:
        started = last = first = time.monotonic()
        body = self._body(text, sampling)
        stats = ReplyStats(0, 0)
        reason: str | None = None
        chars = 0
        try:
            async with self.backend.post_for_lines(PATH, body) as lines:
                async for line in lines:
                    piece, stats.completion_tokens, reason = self._piece(line)
                    if piece:
                        last = time.monotonic()
                        if not chars:
                            first, stats.ttft_s = last, last - started
                        chars += len(piece)
                        if chars > MAX_REPLY_CHARS:
                            raise RemoteError("The reply does not end.", "Set --max-tokens.")
                        self._is_new = False
                        yield Delta(piece, num_tokens=stats.completion_tokens)
        except Exception:
            raise
        except BaseException:  # left half-way: the session is to be free for the next message
            await self._cancel()
            raise
        if reason is None:
            raise RemoteError(f"The api_server at {self.backend.url} ended the reply half-way.",
                              "Send the message again.")
        if stats.completion_tokens > 1 and last > first:
            stats.tokens_per_s = (stats.completion_tokens - 1) / (last - first)
        yield Delta(finish_reason="length" if reason == "length" else "stop", stats=stats)

    async def end(self) -> None:
        """Make the server forget the session.

        Raises:
            UserError: it is answering somebody, or the server cannot be asked.
        """
        await self._post(prompt="", interactive_mode=False, request_output_len=0)
        self._is_new = True

    def farewell(self) -> str:
        return (f"Session {self._number} stays at the server for whoever goes on with it; "
                "end would have it forgotten.")

    async def _history(self) -> list[Message]:
        """Messages of the session; none if the server does not tell, as LMDeploy's."""
        try:
            answer = as_json(await self.backend.get(f"{PATH}?session_id={self._number}"))
        except UserError as error:
            if error.code == NO_SERVER:
                raise UserError(f"The server at {self.backend.url} keeps no sessions.",
                                "Leave out --session-id.", field="session_id") from error
            if isinstance(error, AuthError | OverloadedError | RemoteError):
                raise
            return []
        found = answer.get("messages") if isinstance(answer, dict) else None
        return [m for m in found if isinstance(m, dict)] if isinstance(found, list) else []

    def _body(self, text: str, sampling: SamplingParams) -> dict[str, Any]:
        prompt: Any = text
        if self._system and self._is_new:
            prompt = [{"role": "system", "content": self._system},
                      {"role": "user", "content": text}]
        default = SamplingParams()
        known = (*ALWAYS_SENT, *IF_CHANGED, "max_tokens")
        for name in SamplingParams.__dataclass_fields__:
            if name not in known and getattr(sampling, name) != getattr(default, name):
                raise UserError(f"--{name.replace('_', '-')} does not go with --session-id.",
                                f"{PATH} does not have it.", field=name)
        body = {name: getattr(sampling, name) for name in (*ALWAYS_SENT, *IF_CHANGED)
                if name in ALWAYS_SENT or getattr(sampling, name) != getattr(default, name)}
        if sampling.max_tokens is not None:
            body["request_output_len"] = sampling.max_tokens
        return {"prompt": prompt, "session_id": self._number, "interactive_mode": True,
                "stream": True, **body}

    def _piece(self, line: str) -> tuple[str, int, str | None]:
        """(text, tokens so far, why it ended) of a line of the reply."""
        found = reply_line(line)
        if found is None:
            raise RemoteError(f"The api_server at {self.backend.url} sent something that is no "
                              "reply.", "Check the URL.")
        text, tokens, reason, told = found
        if reason == "error":
            raise RemoteError(f"The api_server at {self.backend.url} failed: {told}")
        return printable(text), tokens, reason

    async def _cancel(self) -> None:
        try:
            await self._post(cancel=True)
        except UserError:
            pass  # it sees that the connection is closed, a moment later

    async def _post(self, **body: Any) -> None:
        async with self.backend.post_for_lines(PATH, {"session_id": self._number, **body}) as lines:
            async for _ in lines:
                pass


def reply_line(line: str | bytes) -> tuple[str, int, str | None, str] | None:
    """(text, tokens so far, why it ended, what went wrong) of a line of /v1/chat/interactive's
    reply; None if it is no such line."""
    try:
        data = json.loads(line)
        text, tokens, reason = data["text"], data["tokens"], data["finish_reason"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(text, str) or type(tokens) is not int:
        return None
    told = error_in(data)[0] or "" if reason == "error" else ""
    return text, tokens, reason if isinstance(reason, str) else None, told
