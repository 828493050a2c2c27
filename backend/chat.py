"""One path for every reply: page, REST and terminal call `ChatService.stream`.

`ChatBackend` is the interface that `ChatService` (an engine of our own) and `remote.RemoteChat`
(somebody's api_server) share, so that no caller knows the difference.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from backend.chat_template import ChatTemplate, begun_reply
from backend.config import SamplingParams
from backend.detokenizer import Detokenizer
from backend.engine.async_engine import AsyncEngine
from backend.engine.types import EngineStats, ModelInfo, Request, StepOutput, TokenLogprob
from backend.errors import ContextLengthError, UserError
from backend.memory import MemoryStatus, memory_status
from backend.tokenizer import Tokenizer

# {"role": "system" | "user" | "assistant", "content": str}; a last one of the assistant's with
# "prefix": True is the beginning of the reply, which goes on from there.
Message = dict[str, Any]


@dataclass(slots=True)
class ReplyStats:
    """Counts and times of one finished reply."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    ttft_s: float = 0.0  # request to first token
    tokens_per_s: float = 0.0  # from the first token on; 0 when there was only one


@dataclass(slots=True)
class TokenText:
    """A drawn token for the API's logprobs: its text, bytes and log-probability."""

    text: str
    bytes: list[int]
    logprob: float
    top: list[tuple[str, list[int], float]] = field(default_factory=list)


@dataclass(slots=True)
class Delta:
    """A piece of a reply. The last one carries `finish_reason` and `stats`; `num_tokens` is what
    the reply has so far, where that is known."""

    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: list[TokenText] | None = None
    stats: ReplyStats | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class ServiceStatus:
    """What the status bar and /api/status show."""

    state: Literal["unloaded", "loading", "ready", "restarting", "failed", "unreachable"]
    model: str
    detail: str = ""  # a sentence for a person: why it is not "ready", or what is to be known
    info: ModelInfo | None = None
    stats: EngineStats | None = None
    memory: MemoryStatus | None = None


class ChatBackend(Protocol):
    """Something that answers messages."""

    async def models(self) -> list[str]:
        """Names that `stream` accepts as `model`."""

    async def status(self) -> ServiceStatus:
        """State, load and memory, cheaply: it is polled."""

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """Prompt tokens of a conversation by the true chat template; None if not knowable."""

    def stream(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        model: str | None = None,
        owner: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one reply; `owner` as in `Request`. Closing the generator aborts the request
        at once."""


class ChatService:
    """Text in, text out, over an engine of our own.

    Args:
        model_name: in the API.
        sampling_defaults: what the checkpoint recommends; fields of `SamplingParams`.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        model_name: str,
        *,
        sampling_defaults: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sampling_defaults = dict(sampling_defaults or {})
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.model_name = model_name
        ids, stop = template.stops(tokenizer)
        self.stop = tuple(stop)  # texts that end a turn by the chat template
        self._eos = list(dict.fromkeys((*tokenizer.eos_token_ids, *ids)))
        self._clock = clock

    async def models(self) -> list[str]:
        return [self.model_name]

    async def status(self) -> ServiceStatus:
        engine = self.engine
        return ServiceStatus(
            engine.state,
            self.model_name,
            engine.detail,
            engine.info,
            engine.stats,
            await asyncio.to_thread(memory_status, engine.pid, engine.info, engine.stats),
        )

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the reply begins."""
        return await asyncio.to_thread(self.template.encode, messages, self.tokenizer)

    async def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a plain prompt, begun as the model's tokenizer begins text."""
        if isinstance(prompt, str):
            return await asyncio.to_thread(self.tokenizer.encode, prompt)
        return list(prompt)

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        return len(await self.encode_chat(messages))

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        model: str | None = None,
        owner: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """See `ChatBackend.stream`."""
        prompt = await self.encode_chat(messages)
        stop = (*stop, *self.stop)
        deltas = self.stream_ids(prompt, sampling, stop=stop, owner=owner,
                                 continues=bool(begun_reply(messages)))
        async with aclosing(deltas):  # an abandoned generator would abort only when collected
            async for delta in deltas:
                yield delta

    def request(
        self, prompt_token_ids: list[int], sampling: SamplingParams, owner: str = ""
    ) -> Request:
        """A request for the engine, bounded by what the context leaves.

        Raises:
            UserError, EngineNotReadyError: see `stream_ids`.
        """
        sampling = self._fit(prompt_token_ids, sampling, self.engine.require_ready())
        return Request(uuid.uuid4().hex, prompt_token_ids, sampling, self._eos, owner)

    async def stream_ids(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        owner: str = "",
        skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of the reply to token ids; `continues` as in `Detokenizer`.

        Raises:
            UserError: the prompt is empty, has ids outside the vocabulary or does not fit.
            EngineNotReadyError, EngineDeadError: see `AsyncEngine.generate`.
        """
        started = self._clock()
        request = self.request(prompt_token_ids, sampling, owner)
        text = Detokenizer(self.tokenizer, stop, skip_special_tokens, continues)
        stats = ReplyStats(len(prompt_token_ids), 0)
        first = started
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                now = self._clock()
                if stats.completion_tokens == 0 and output.token_ids:
                    first, stats.ttft_s = now, now - started
                stats.completion_tokens += len(output.token_ids)
                stats.cached_tokens = max(stats.cached_tokens, output.num_cached_tokens)
                delta = self._delta(output, text)
                delta.num_tokens = stats.completion_tokens
                if delta.finish_reason:  # a stop string ends it before the engine knows
                    seconds = now - first
                    if stats.completion_tokens > 1 and seconds > 0:
                        stats.tokens_per_s = (stats.completion_tokens - 1) / seconds
                    delta.stats = stats
                    yield delta
                    return
                if delta.text or delta.logprobs:
                    yield delta

    def room(self, num_tokens: int, info: ModelInfo) -> int:
        """Tokens that the context leaves for the reply to a prompt of so many.

        Raises:
            ContextLengthError: none.
        """
        room = info.session_len - num_tokens
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {num_tokens} tokens, but the context holds {info.session_len}, "
                "prompt and reply together.",
                "Shorten the conversation, or load the model with a larger --session-len.",
                field="messages",
            )
        return room

    def _fit(self, ids: list[int], sampling: SamplingParams, info: ModelInfo) -> SamplingParams:
        """Refuse what cannot run; bound the reply by what the context leaves."""
        if not ids:
            raise UserError("The prompt is empty.", "Send at least one character.", field="prompt")
        wrong = next((i for i in ids if not 0 <= i < info.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"Token id {wrong} is outside the vocabulary of {info.vocab_size}.", field="prompt"
            )
        room = self.room(len(ids), info)
        for name in ("stop_token_ids", "logit_bias"):
            wrong = next((i for i in getattr(sampling, name) if i >= info.vocab_size), None)
            if wrong is not None:
                raise UserError(
                    f"Token id {wrong} in {name} is outside the vocabulary of {info.vocab_size}.",
                    field=name,
                )
        max_tokens = min(sampling.max_tokens or room, room)
        if sampling.min_tokens > max_tokens:
            raise UserError(
                f"min_tokens is {sampling.min_tokens}, but at most {max_tokens} tokens may follow.",
                field="min_tokens",
            )
        return replace(sampling, max_tokens=max_tokens)

    def _delta(self, output: StepOutput, text: Detokenizer) -> Delta:
        if output.finish_reason == "error":
            error = UserError(output.error)
            error.status, error.code = 500, "engine_error"  # `_fit` let it in: not the client's
            raise error
        ids = output.token_ids
        stopped = output.finish_reason == "stop"
        piece = text.add(ids[:-1] if stopped else ids)
        reason = output.finish_reason if output.finish_reason in ("stop", "length") else None
        if reason and text.stopped is None:
            piece += text.finish()
        if text.stopped is not None:  # by `finish` too, if a longer stop string stayed incomplete
            reason = "stop"
        logprobs = None
        if output.logprobs is not None:
            shown = output.logprobs[:-1] if stopped else output.logprobs
            logprobs = [self._token_text(entry) for entry in shown]
        return Delta(piece, reason, logprobs)

    def _token_text(self, entry: TokenLogprob) -> TokenText:
        def show(token_id: int) -> tuple[str, list[int]]:
            raw = self.tokenizer.token_bytes(token_id)
            return raw.decode("utf-8", errors="replace"), list(raw)

        top = [(*show(token_id), logprob) for token_id, logprob in entry.top]
        return TokenText(*show(entry.token_id), entry.logprob, top)
