"""/v1: models, chat completions and completions over `ChatService`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.admission import Ticket
from backend.classroom import Caller, Classroom
from backend.config import SamplingParams
from backend.errors import ModelNotFoundError, UserError
from backend.server import sse
from backend.server.auth import caller
from backend.server.body import read_json
from backend.server.failures import describe
from backend.server.metrics import Metrics
from backend.server.protocol import ChatRequest, CompletionRequest, Generation
from backend.server.replies import ChatReply, CompletionReply, Reply, usage
from backend.server.strict import parse, show
from backend.server.timed import timed_reply

if TYPE_CHECKING:
    from backend.chat import ChatService, Delta, ReplyStats, TokenText
    from backend.engine_manager import EngineManager

Deltas = AsyncGenerator[tuple[int, "Delta"], None]


class OpenAIRoutes:
    """Handlers of /v1.

    Args:
        engines: has what answers; a request keeps to what was served when it came.
        classroom: knows what callers may.
        metrics: takes the times of replies.
    """

    def __init__(self, engines: EngineManager, classroom: Classroom, metrics: Metrics) -> None:
        self.engines = engines
        self.classroom = classroom
        self.metrics = metrics
        self._created = int(time.time())

    async def list_models(self, request: Request) -> Response:
        """The served model, as a list of one; of none while no model is loaded."""
        data = [self._model(chat)] if (chat := self.engines.current) else []
        return JSONResponse({"object": "list", "data": data})

    async def get_model(self, request: Request, model: str) -> Response:
        """The served model, by its name."""
        chat = self.engines.require()
        check_model(chat, model)
        return JSONResponse(self._model(chat))

    async def chat_completions(self, request: Request) -> Response:
        """The assistant's next turn."""
        body = parse(ChatRequest, await read_json(request))
        chat = self.engines.require()
        sampling = self._prepare(chat, body, caller(request))
        messages = body.as_dicts()
        reply = ChatReply(chat.model_name, body.num_replies, body.include_usage)
        async with AsyncExitStack() as stack:
            ticket = stack.enter_context(self.classroom.admit(caller(request), body.num_replies))
            prompts = [await chat.encode_chat(messages)]
            stop = (*body.stop, *chat.stop)
            return await self._answer(
                request, chat, body, reply, prompts, sampling, stop, ticket, stack)

    async def completions(self, request: Request) -> Response:
        """The continuation of a text."""
        body = parse(CompletionRequest, await read_json(request))
        chat = self.engines.require()
        sampling = self._prepare(chat, body, caller(request))
        replies = body.num_replies * len(body.prompt)
        async with AsyncExitStack() as stack:
            ticket = stack.enter_context(self.classroom.admit(caller(request), replies))
            prompts = [await chat.encode_prompt(prompt) for prompt in body.prompt]
            echoes = [_text(chat, prompt) for prompt in body.prompt] if body.echo else None
            reply = CompletionReply(
                chat.model_name, body.num_replies, body.include_usage, echoes)
            try:
                return await self._answer(
                    request, chat, body, reply, prompts, sampling, body.stop, ticket, stack)
            except UserError as error:
                if error.field == "messages":  # as the chat service calls what it was given
                    error.field = "prompt"
                raise

    def _model(self, chat: ChatService) -> dict[str, Any]:
        info = chat.engine.info
        return {
            "id": chat.model_name, "object": "model", "created": self._created,
            "owned_by": "lmdesk", "max_model_len": info.session_len if info else None,
        }

    def _prepare(self, chat: ChatService, body: Generation, caller: Caller) -> SamplingParams:
        """Refuse what can be refused before any work; the sampling of the rest."""
        check_model(chat, body.model)
        body.check()
        sampling = body.sampling(chat.sampling_defaults)
        chat.engine.require_ready()
        return self.classroom.bounded(caller, sampling)

    async def _answer(
        self,
        request: Request,
        chat: ChatService,
        body: Generation,
        reply: Reply,
        prompts: list[list[int]],
        sampling: SamplingParams,
        stop: tuple[str, ...],
        ticket: Ticket,
        stack: AsyncExitStack,
    ) -> Response:
        """Run `n` replies to each prompt. `stack` holds what must end with the request."""
        n = body.num_replies
        ticket.set_prompts([len(prompt) for prompt in prompts for _ in range(n)])
        deltas = await stack.enter_async_context(aclosing(sse.interleave([
            timed_reply(
                chat, self.metrics, ticket, prompt, _nth_seed(sampling, i), stop=stop,
                owner=caller(request).id, skip_special_tokens=body.skips_special,
                continues=body.continues)
            for prompt in prompts for i in range(n)])))
        count = n * len(prompts)
        if not body.stream:
            whole = await sse.until_gone(request.receive, _collect(deltas, count, reply))
            return JSONResponse(whole)
        events = await stack.enter_async_context(aclosing(_events(deltas, count, reply)))
        # Headers wait for the first event: bad input and a dead engine get their true status.
        first = await sse.until_gone(request.receive, anext(events))
        return sse.EventStream(first, events, stack.pop_all())


def check_model(chat: ChatService, name: str | None) -> None:
    """Insist that a request that names a model means the one that is served.

    Raises:
        ModelNotFoundError: it means another.
    """
    if name is not None and name != chat.model_name:
        raise ModelNotFoundError(
            f"The model {show(name)} is not served here.",
            f"This server has {show(chat.model_name)}.", field="model")


def _text(chat: ChatService, prompt: str | list[int]) -> str:
    """A prompt as text, for `echo`."""
    return prompt if isinstance(prompt, str) else chat.tokenizer.decode(prompt)


def _nth_seed(sampling: SamplingParams, i: int) -> SamplingParams:
    """The sampling of the i-th reply to a prompt: another seed, but one that is known."""
    if sampling.seed is None or i == 0:
        return sampling
    seed = (sampling.seed + i + (1 << 63)) % (1 << 64) - (1 << 63)  # stays within 64 bits
    return replace(sampling, seed=seed)


async def _collect(deltas: Deltas, count: int, reply: Reply) -> dict[str, Any]:
    """The complete answer."""
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: dict[int, list[TokenText]] = {}
    reasons = ["stop"] * count
    stats: dict[int, ReplyStats] = {}
    async for index, delta in deltas:
        texts[index].append(delta.text)
        if delta.logprobs is not None:
            tokens.setdefault(index, []).extend(delta.logprobs)
        if delta.finish_reason is not None and delta.stats is not None:
            reasons[index], stats[index] = delta.finish_reason, delta.stats
    choices = [
        reply.choice(i, "".join(texts[i]), tokens.get(i), reasons[i]) for i in range(count)]
    return reply.complete(choices, usage([stats[i] for i in range(count)], reply.n))


async def _events(deltas: Deltas, count: int, reply: Reply) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. An error before the first of them is raised, a later one
    is sent as an event, and then there is no [DONE]."""
    stats: dict[int, ReplyStats] = {}
    opened: set[int] = set()
    try:
        async for index, delta in deltas:
            if index not in opened:
                opened.add(index)
                if opening := reply.opening(index):
                    yield sse.event(opening)
            if delta.text or delta.logprobs:
                yield sse.event(reply.chunk(index, delta))
            if delta.finish_reason is not None and delta.stats is not None:
                stats[index] = delta.stats
                yield sse.event(reply.closing(index, delta.finish_reason))
    except Exception as error:  # whatever it is: the status is sent, only an event can tell
        if not opened:
            raise
        yield sse.event(describe(error)[1])
        return
    if reply.with_usage:
        yield sse.event(reply.usage_chunk(usage([stats[i] for i in range(count)], reply.n)))
    yield sse.DONE
