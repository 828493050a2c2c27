"""Bodies of /v1/chat/completions and /v1/completions: OpenAI's fields, strictly typed.

Strict means no "1" for 1, no true for 1, no unknown fields (see `strict.py`). Bounds and help of
the sampling fields come from `SamplingParams`, so that they stand in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema

from backend.chat_template import MAX_MESSAGES
from backend.config import SamplingParams
from backend.errors import UserError
from backend.server.strict import Strict, described, show

MAX_PROMPTS = 64
MAX_REPLIES = 8  # n
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOKEN_IDS = 1024  # in stop_token_ids and logit_bias

_SAMPLING = {f.name: f.metadata for f in fields(SamplingParams)}


def sampling_field(name: str, kind: str = "a number") -> Any:
    """A field with help and bounds of `SamplingParams.name`."""
    meta = _SAMPLING[name]
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        kind += f" from {low} to {high}"
    elif low is not None:
        kind += f", at least {low}"
    return described(None, meta["help"], kind, ge=low, le=high)


def parse_stop(value: Any) -> tuple[str, ...]:
    if value is None or value is False:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be text, a list of texts, false or null")
    if len(stops) > MAX_STOPS or any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(
            f"must hold at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters each")
    return tuple(stops)


def _parse_logit_bias(value: Any) -> dict[int, float]:
    meta = _SAMPLING["logit_bias"]
    low, high = meta["low"], meta["high"]
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_TOKEN_IDS:
        raise ValueError(f"must be an object of at most {MAX_TOKEN_IDS} token ids")
    bias = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise ValueError(f"must map token ids, not {show(key)}")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not (
                low <= number <= high):
            raise ValueError(f"must hold numbers from {low} to {high}, not {show(number)}")
        bias[int(key)] = float(number)
    return bias


def _parse_content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be text or a list of text parts, not {show(value)}")
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError('must have parts like {"type": "text", "text": "..."}')
        if part["type"] != "text":
            raise ValueError(f"has a part of type {show(part['type'])}; this model reads text only")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('must have parts like {"type": "text", "text": "..."}')
    return "\n".join(part["text"] for part in value)


def _parse_prompt(value: Any) -> list[str | list[int]]:
    """A list of prompts, each text or token ids, whichever of the four forms was sent."""
    def is_ids(item: Any) -> bool:
        return isinstance(item, list) and all(type(token) is int for token in item)

    prompts: Any = [value] if isinstance(value, str) or (value and is_ids(value)) else value
    if not isinstance(prompts, list) or not prompts or not (
            all(isinstance(item, str) for item in prompts) or all(map(is_ids, prompts))):
        raise ValueError("must be text, a list of texts, a list of token ids, or a list of these")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, not {len(prompts)}")
    return prompts


_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_IDS = {"type": "array", "items": {"type": "integer"}}

Stop = Annotated[tuple[str, ...], PlainValidator(parse_stop), WithJsonSchema(
    {"anyOf": [*_TEXTS["anyOf"], {"const": False}, {"type": "null"}]})]
LogitBias = Annotated[dict[int, float], PlainValidator(_parse_logit_bias), WithJsonSchema(
    {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]})]
Content = Annotated[str, PlainValidator(_parse_content), WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]
Prompt = Annotated[list[str | list[int]], PlainValidator(_parse_prompt), WithJsonSchema(
    {"anyOf": [*_TEXTS["anyOf"], _IDS, {"type": "array", "items": _IDS}]})]
TokenId = Annotated[int, Field(ge=_SAMPLING["stop_token_ids"]["low"])]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)]


class Message(Strict):
    """One turn of the conversation."""

    no_effect = {"name": "chat templates here have no place for a speaker's name"}
    # What OpenAI's client adds when a reply is sent back as part of the history.
    neutral = dict(tool_calls=([],), function_call=(), refusal=(), audio=(), annotations=([],))

    role: Literal["system", "developer", "user", "assistant"] = described(
        ..., "who speaks; developer is read as system", "system, developer, user or assistant")
    content: Content = described(
        ..., "what is said; text parts are joined by line ends", "text or a list of text parts")

    def as_dict(self) -> dict[str, Any]:
        return {"role": "system" if self.role == "developer" else self.role,
                "content": self.content}


def as_messages(value: Any) -> Any:
    """Text alone is what the user says, as the tutorials send it."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Messages = Annotated[
    list[Message], FailFast(),
    BeforeValidator(as_messages, json_schema_input_type=str | list[Message])]


class StreamOptions(Strict):
    """What a stream carries besides text."""

    neutral = dict(include_obfuscation=(False,))

    include_usage: bool | None = described(
        False, "send a last chunk with the token counts", "true or false")


class Generation(Strict):
    """Fields that both kinds of completion share."""

    no_effect = {
        "user": "nothing is recorded about callers",
        "safety_identifier": "nothing is recorded about callers",
        "metadata": "nothing is stored",
        "prompt_cache_key": "the prefix cache finds common beginnings by their content",
        "session_id": "every request carries its whole conversation; /v1/chat/interactive keeps it",
        "renew_session": "every request is a session of its own",
    }
    # LMDeploy's own client sends its leftover arguments as an object named kwargs.
    neutral = dict(kwargs=({},))
    parts = {"stream_options": StreamOptions}

    model: str | None = described(None, "name of the model; default: the one served", "text")
    temperature: float | None = sampling_field("temperature")
    top_p: float | None = sampling_field("top_p")
    top_k: int | None = sampling_field("top_k", "a whole number")
    min_p: float | None = sampling_field("min_p")
    repetition_penalty: float | None = sampling_field("repetition_penalty")
    presence_penalty: float | None = sampling_field("presence_penalty")
    frequency_penalty: float | None = sampling_field("frequency_penalty")
    max_tokens: int | None = sampling_field("max_tokens", "a whole number")
    min_tokens: int | None = sampling_field("min_tokens", "a whole number")
    seed: int | None = sampling_field("seed", "a whole number")
    stop: Stop = described(
        (), "end the reply before any of these texts",
        f"text, or a list of at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters")
    stop_token_ids: TokenIds | None = described(
        None, _SAMPLING["stop_token_ids"]["help"],
        f"a list of at most {MAX_TOKEN_IDS} whole numbers, at least 0")
    ignore_eos: bool | None = described(None, _SAMPLING["ignore_eos"]["help"], "true or false")
    skip_special_tokens: bool | None = described(
        True, "false shows the special tokens that the reply has inside it", "true or false")
    logit_bias: LogitBias = described(
        {}, _SAMPLING["logit_bias"]["help"],
        "an object of token ids (as text) and numbers from -100 to 100")
    n: int | None = described(1, "how many replies", f"a whole number from 1 to {MAX_REPLIES}",
                           ge=1, le=MAX_REPLIES)
    stream: bool | None = described(False, "send the reply piece by piece", "true or false")
    stream_options: StreamOptions | None = described(
        None, "only with stream: {\"include_usage\": true} adds the token counts", "an object")

    @property
    def continues(self) -> bool:
        """Whether the reply goes on from an assistant's message."""
        return False

    @property
    def num_replies(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse combinations that no single field shows."""
        if self.stream_options and not self.stream:
            raise UserError("stream_options needs stream to be true.", field="stream_options")

    @property
    def skips_special(self) -> bool:
        return self.skip_special_tokens is not False

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The sampling of this request, over `defaults` (fields of `SamplingParams`)."""
        given = {name: value for name in _SAMPLING if name != "logprobs"
                 and (value := getattr(self, name)) not in (None, {})}
        if "stop_token_ids" in given:
            given["stop_token_ids"] = tuple(given["stop_token_ids"])
        return SamplingParams(**{**defaults, **given, "logprobs": self.num_logprobs()})

    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None for no log-probabilities at all."""
        raise NotImplementedError


class ChatRequest(Generation):
    """Body of POST /v1/chat/completions."""

    no_effect = Generation.no_effect | {
        "parallel_tool_calls": "there are no tool calls, parallel or not"}
    parts = Generation.parts | {"messages": Message}
    neutral = Generation.neutral | dict(
        tools=([],), tool_choice=("none", "auto"), functions=([],), function_call=("none", "auto"),
        response_format=({"type": "text"},), modalities=(["text"],), audio=(), prediction=(),
        web_search_options=(), reasoning_effort=(), verbosity=("medium",), store=(False,),
        service_tier=("auto", "default"))

    messages: Messages = described(
        ..., "the conversation so far, oldest first; text alone is a user's message",
        f"text, or a list of 1 to {MAX_MESSAGES} messages",
        min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = sampling_field("max_tokens", "a whole number")
    logprobs: bool | None = described(
        False, "report the log-probability of each token", "true or false")
    top_logprobs: int | None = sampling_field("logprobs", "a whole number")
    continue_final_message: bool | None = described(
        False, "go on from the last message, which is the assistant's", "true or false")
    add_generation_prompt: bool | None = described(
        None, "the opposite of continue_final_message, as vLLM's users send it", "true or false")

    @property
    def continues(self) -> bool:
        return bool(self.continue_final_message)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The messages; the last one marked, if it is to be continued."""
        messages = [message.as_dict() for message in self.messages]
        if self.continues:
            messages[-1]["prefix"] = True
        return messages

    def check(self) -> None:
        super().check()
        if self.add_generation_prompt is self.continues:
            raise UserError("add_generation_prompt is the opposite of continue_final_message.",
                            "Leave it out.", field="add_generation_prompt")
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs to be true.", field="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
                self.max_tokens != self.max_completion_tokens):
            raise UserError("max_tokens and max_completion_tokens differ.", "Send one of them.",
                            field="max_completion_tokens")

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        if self.max_completion_tokens is not None:
            defaults = {**defaults, "max_tokens": self.max_completion_tokens}
        return super().sampling(defaults)

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """Body of POST /v1/completions."""

    neutral = Generation.neutral | dict(suffix=("",))

    prompt: Prompt = described(
        ..., "text or token ids to continue", f"text, token ids, or a list of up to {MAX_PROMPTS}")
    max_tokens: int | None = described(
        16, _SAMPLING["max_tokens"]["help"].split(";")[0], "a whole number, at least 1", ge=1)
    logprobs: int | None = sampling_field("logprobs", "a whole number")
    echo: bool | None = described(False, "begin the reply with the prompt", "true or false")
    best_of: int | None = described(
        None, "accepted only when equal to n", "a whole number equal to n")

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.num_replies:
            raise UserError(
                f"best_of must be equal to n ({self.num_replies}), not {self.best_of}.",
                field="best_of")
        if self.echo and self.logprobs is not None:
            raise UserError(
                "echo together with logprobs is not supported by this server.",
                "Leave one of them out.", field="echo")

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        if self.max_tokens is None:  # null was sent: OpenAI's default, not the context's rest
            defaults = {**defaults, "max_tokens": 16}
        return super().sampling(defaults)

    def num_logprobs(self) -> int | None:
        return self.logprobs
