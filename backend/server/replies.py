"""OpenAI's reply shapes, built from deltas. One class for chat, one for plain completions.

Dictionaries rather than pydantic models: this runs for every token of every stream.
"""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backend.chat import Delta, ReplyStats, TokenText

Json = dict[str, Any]

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say; as OpenAI does


def usage(stats: Sequence[ReplyStats], n: int) -> Json:
    """Token counts of a request. The `n` replies to one prompt lie side by side in `stats`; their
    prompt counts once, as OpenAI counts it."""
    prompt = sum(s.prompt_tokens for s in stats[::n])
    completion = sum(s.completion_tokens for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in stats[::n])},
    }


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


class Reply:
    """What the answers of both routes share.

    Args:
        model: its name in the API.
        n: replies to each prompt; choice `index` answers prompt `index // n`.
        with_usage: the stream ends with a usage chunk, so that all others have a null there.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, n: int, with_usage: bool = False) -> None:
        self.model, self.n, self.with_usage = model, n, with_usage
        self.id = self.id_prefix + secrets.token_hex(16)
        self.created = int(time.time())

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, before anything is drawn."""
        raise NotImplementedError

    def chunk(self, index: int, delta: Delta) -> Json:
        """A piece of a choice."""
        raise NotImplementedError

    def closing(self, index: int, reason: str) -> Json:
        """The last chunk of a choice."""
        raise NotImplementedError

    def choice(self, index: int, text: str, tokens: list[TokenText] | None, reason: str) -> Json:
        """A complete choice."""
        raise NotImplementedError

    def usage_chunk(self, counts: Json) -> Json:
        """The chunk after all choices, if it was asked for."""
        return self._envelope(self.chunk_object, []) | {"usage": counts}

    def complete(self, choices: list[Json], counts: Json) -> Json:
        """The whole answer."""
        return self._envelope(self.whole_object, choices) | {"usage": counts}

    def _piece(self, index: int, content: Json, logprobs: Json | None, reason: str | None) -> Json:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        envelope = self._envelope(self.chunk_object, [choice])
        return envelope | {"usage": None} if self.with_usage else envelope

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices}


class ChatReply(Reply):
    """Shapes of a /v1/chat/completions answer."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, index: int, delta: Delta) -> Json:
        logprobs = self._logprobs(delta.logprobs)
        return self._piece(index, {"delta": {"content": delta.text}}, logprobs, None)

    def closing(self, index: int, reason: str) -> Json:
        return self._piece(index, {"delta": {}}, None, reason)

    def choice(self, index: int, text: str, tokens: list[TokenText] | None, reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens),
                "finish_reason": reason}

    def _logprobs(self, tokens: list[TokenText] | None) -> Json | None:
        if tokens is None:
            return None

        def entry(text: str, raw: list[int], logprob: float) -> Json:
            return {"token": text, "logprob": _number(logprob), "bytes": raw}

        content = [
            {**entry(t.text, t.bytes, t.logprob), "top_logprobs": [entry(*top) for top in t.top]}
            for t in tokens]
        return {"content": content, "refusal": None}


class CompletionReply(Reply):
    """Shapes of a /v1/completions answer. `echoes`, if any, stand before the replies: one text
    for each prompt."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, n: int, with_usage: bool = False,
                 echoes: list[str] | None = None) -> None:
        super().__init__(model, n, with_usage)
        self.echoes = echoes
        self._offsets: dict[int, _Offsets] = {}

    def opening(self, index: int) -> Json | None:
        if self.echoes is None:
            return None
        return self._piece(index, {"text": self.echoes[index // self.n]}, None, None)

    def chunk(self, index: int, delta: Delta) -> Json:
        return self._piece(index, {"text": delta.text}, self._logprobs(index, delta.logprobs), None)

    def closing(self, index: int, reason: str) -> Json:
        return self._piece(index, {"text": ""}, None, reason)

    def choice(self, index: int, text: str, tokens: list[TokenText] | None, reason: str) -> Json:
        if self.echoes is not None:
            text = self.echoes[index // self.n] + text
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens),
                "finish_reason": reason}

    def _logprobs(self, index: int, tokens: list[TokenText] | None) -> Json | None:
        """OpenAI's older shape. As there, each `top_logprobs` has the drawn token too, even if it
        is none of the likeliest."""
        if tokens is None:
            return None
        offsets = self._offsets.setdefault(index, _Offsets())
        top_logprobs = []
        for token in tokens:
            # Different tokens may show the same text (pieces of characters): the likeliest stays.
            top = {text: _number(logprob) for text, _, logprob in reversed(token.top)}
            top_logprobs.append(top | {token.text: _number(token.logprob)})
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [_number(t.logprob) for t in tokens],
            "top_logprobs": top_logprobs,
            "text_offset": [offsets.next(t) for t in tokens],
        }


class _Offsets:
    """Character offsets of a reply's tokens. A token that begins inside a character, as byte-level
    vocabularies have them, gets that character's offset."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def next(self, token: TokenText) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(bytes(token.bytes)))
        return offset
