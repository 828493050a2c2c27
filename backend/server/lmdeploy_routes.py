"""What LMDeploy has beside OpenAI's routes: replies for /v1/chat/interactive, and /v1/encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.admission import Ticket
from backend.chat import Message
from backend.classroom import Caller, Classroom
from backend.server.body import read_json
from backend.server.interactive import piece
from backend.server.lmdeploy_protocol import EncodeRequest, InteractiveRequest
from backend.server.metrics import Metrics
from backend.server.openai_routes import check_model
from backend.server.sessions import Turn
from backend.server.strict import parse
from backend.server.timed import timed_reply

if TYPE_CHECKING:
    from backend.chat import ChatService
    from backend.engine_manager import EngineManager


class LMDeployRoutes:
    """Handlers, and the `Speaker` of conversations; the arguments are those of `OpenAIRoutes`."""

    def __init__(self, engines: EngineManager, classroom: Classroom, metrics: Metrics) -> None:
        self.engines = engines
        self.classroom = classroom
        self.metrics = metrics

    async def encode(self, request: Request) -> Response:
        """Token ids of a text, or of each of several."""
        body = parse(EncodeRequest, await read_json(request))
        chat = self.engines.require()
        check_model(chat, body.model)
        begun = body.add_bos is not False
        if isinstance(body.input, str):
            ids = await _encode(chat, body.input, bool(body.do_preprocess), begun)
            return JSONResponse({"input_ids": ids, "length": len(ids)})
        lists = [
            await _encode(chat, text, bool(body.do_preprocess), begun) for text in body.input]
        return JSONResponse({"input_ids": lists, "length": [len(ids) for ids in lists]})

    async def check_room(self, body: InteractiveRequest, messages: list[Message]) -> None:
        """See `Speaker`."""
        chat = self.engines.require()
        check_model(chat, body.model)
        info = chat.engine.require_ready()
        chat.room(len(await chat.encode_chat(messages)), info)

    async def reply(
        self, body: InteractiveRequest, turn: Turn, who: Caller, ticket: Ticket
    ) -> AsyncGenerator[dict[str, Any], None]:
        """See `Speaker`."""
        chat = self.engines.require()
        check_model(chat, body.model)
        sampling = self.classroom.bounded(who, body.sampling(chat.sampling_defaults))
        chat.engine.require_ready()
        prompt = await chat.encode_chat(turn.messages)
        ticket.set_prompts([len(prompt)])
        deltas = timed_reply(
            chat, self.metrics, ticket, prompt, sampling,
            stop=(*body.stop, *chat.stop), owner=who.id,
            skip_special_tokens=body.skip_special_tokens is not False)
        async with aclosing(deltas):
            async for delta in deltas:
                yield piece(delta.text, delta.num_tokens, delta.finish_reason)


async def _encode(chat: ChatService, text: str, as_message: bool, begun: bool) -> list[int]:
    if not as_message:
        return await asyncio.to_thread(chat.tokenizer.encode, text, begun)
    ids = await chat.encode_chat([{"role": "user", "content": text}])
    return ids if begun or ids[:1] != [chat.tokenizer.bos_token_id] else ids[1:]
