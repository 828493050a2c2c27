"""Bodies of the routes that LMDeploy has beside OpenAI's: /v1/chat/interactive and /v1/encode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, PlainValidator, WithJsonSchema

from backend.chat_template import MAX_MESSAGES
from backend.config import SamplingParams
from backend.errors import UserError
from backend.server.protocol import (
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Message,
    as_messages,
    parse_stop,
    sampling_field,
)
from backend.server.strict import Strict, described

NO_SESSION = -1
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos")


def _as_new_messages(value: Any) -> Any:
    return [] if value in (None, "") else as_messages(value)


def _parse_stop(value: Any) -> Any:
    return True if value is True else parse_stop(value)


def _parse_input(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be text or a list of texts")
    if not 1 <= len(texts) <= MAX_PROMPTS:
        raise ValueError(f"must hold 1 to {MAX_PROMPTS} texts, not {len(texts)}")
    return value


NewMessages = Annotated[
    list[Message], FailFast(),
    BeforeValidator(_as_new_messages, json_schema_input_type=str | list[Message] | None)]
StopOrCancel = Annotated[Any, PlainValidator(_parse_stop), WithJsonSchema({"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "boolean"},
    {"type": "null"}]})]
Input = Annotated[Any, PlainValidator(_parse_input), WithJsonSchema({"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]


class InteractiveRequest(Strict):
    """Body of POST /v1/chat/interactive."""

    # What LMDeploy's clients and its API page send along for other kinds of models.
    neutral = dict(image_url=(), adapter_name=(), kwargs=({},))
    parts = {"prompt": Message}

    prompt: NewMessages = described(
        (), "what is said now; empty with interactive_mode false, it only ends the session",
        f"text, or a list of at most {MAX_MESSAGES} messages", max_length=MAX_MESSAGES)
    session_id: int | None = described(
        NO_SESSION, "number of the session, of your own choice; -1: none is kept",
        "a whole number, -1 or more", ge=NO_SESSION)
    interactive_mode: bool | None = described(
        False, "true keeps the session for the next request, false ends it with this reply",
        "true or false")
    stream: bool | None = described(
        False, "send the reply piece by piece, a line of JSON each", "true or false")
    stop: StopOrCancel = described(
        (), "end the reply before any of these texts; true is the older spelling of cancel",
        f"text, a list of at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters, "
        "true or false")
    cancel: bool | None = described(
        False, "stop the reply that the session is giving; what was said of it is kept",
        "true or false")
    request_output_len: int | None = described(
        None, "longest reply in tokens; 0 only adds the prompt to the session; default: what the "
        "context leaves", "a whole number, at least 0", ge=0)
    top_p: float | None = sampling_field("top_p")
    top_k: int | None = sampling_field("top_k", "a whole number")
    temperature: float | None = sampling_field("temperature")
    repetition_penalty: float | None = sampling_field("repetition_penalty")
    ignore_eos: bool | None = sampling_field("ignore_eos", "true or false")
    skip_special_tokens: bool | None = described(
        True, "false shows the special tokens that the reply has inside it", "true or false")
    model: str | None = described(
        None, "its name; needed only where a proxy has several", "text")

    @property
    def session(self) -> int:
        return NO_SESSION if self.session_id is None else self.session_id

    @property
    def cancels(self) -> bool:
        return bool(self.cancel) or self.stop is True

    @property
    def answers(self) -> bool:
        """Whether a reply is asked for."""
        return bool(self.prompt) and self.request_output_len != 0

    def check(self) -> None:
        """Refuse combinations that no single field shows."""
        if self.session == NO_SESSION and (self.cancels or self.interactive_mode):
            what = "cancel" if self.cancels else "interactive_mode"
            raise UserError(f"{what} needs the session_id of a session.",
                            "Send a number of your own, from 0.", field="session_id")
        if self.cancels and self.prompt:
            raise UserError("A prompt cannot be sent together with cancel.",
                            "Send it in the next request.", field="prompt")
        ends = self.session != NO_SESSION and not self.interactive_mode
        adds = self.request_output_len == 0
        if not (self.prompt or self.cancels or ends or adds):
            raise UserError("The prompt is empty.", "Send at least one character.",
                            field="prompt")

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The sampling of this request, over `defaults` (fields of `SamplingParams`)."""
        given = {n: value for n in SAMPLING if (value := getattr(self, n)) is not None}
        if self.request_output_len is not None:
            given["max_tokens"] = self.request_output_len
        return SamplingParams(**{**defaults, **given})


def session_number(text: str | None) -> int:
    """A session's number in a query.

    Raises:
        UserError: it is none.
    """
    if text is None or not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError("session_id must be the number of a session.", "Write ?session_id=1.",
                        field="session_id")
    return int(text)


class EncodeRequest(Strict):
    """Body of POST /v1/encode."""

    input: Input = described(
        ..., "what to encode", f"text or a list of 1 to {MAX_PROMPTS} texts")
    do_preprocess: bool | None = described(
        False, "true takes each text as a user's message, by the chat template", "true or false")
    add_bos: bool | None = described(
        True, "begin with the token that begins a text, if the model has one", "true or false")
    model: str | None = described(
        None, "its name; needed only where a proxy has several", "text")
