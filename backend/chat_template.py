"""Conversations to text and to token ids, by the model's own chat template or its family's format.

A template is a program that came with the model: it runs in a process that can be killed, and
`template_process` says why. A format (`chat_formats`) is data.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend import chat_formats
from backend.chat_formats import ChatFormat
from backend.config import ChatConfig
from backend.errors import UserError
from backend.model_files import chat_template_source, read_text, special_tokens
from backend.tokenizer import Tokenizer
from backend.workspace.layout import text_folder

log = logging.getLogger(__name__)

MAX_MESSAGES = 1024
MAX_CHARS = 4 << 20  # of all messages together
MAX_SOURCE_CHARS = 1 << 20
MEMORY_BYTES = 256 << 20  # above what the child needs before it sees the template
OUTPUT_CHARS = 1 << 20  # plus four times what the messages have
STARTUP_SECONDS = 60.0
ROLES = ("system", "user", "assistant")
HINT = "Use the original files of the model."
PROJECT = Path(__file__).resolve().parents[1]
# All that the child inherits. Keys and tokens are none of a template's business.
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")
# Code points that stand for no character: no text has them, and no template takes them away.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def check_messages(messages: Any) -> list[dict[str, str]]:
    """`messages` with their content as plain text.

    Raises:
        UserError: not a non-empty list of {"role", "content"}, or too much of it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError("messages must be a list of messages.", field="messages")
    if not messages:
        raise UserError("The conversation is empty.", "Send at least one message.",
                        field="messages")
    if len(messages) > MAX_MESSAGES:
        raise UserError(
            f"The conversation has {len(messages)} messages, but at most {MAX_MESSAGES} are "
            "allowed.", "Leave out the oldest ones.", field="messages")
    checked = [_check_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
    if sum(len(message["content"]) for message in checked) > MAX_CHARS:
        raise UserError(f"The conversation has more than {MAX_CHARS} characters.",
                        "Leave out the oldest messages.", field="messages")
    return checked


def _check_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"{name} must be an object with role and content.", field="messages")
    role = message.get("role")
    if role == "tool":
        raise UserError(f"{name} is of a tool; tools are not supported.", field="messages")
    if role not in ROLES:
        raise UserError(f"{name}.role must be one of {', '.join(ROLES)}, not {role!r:.60}.",
                        field="messages")
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        texts = [part.get("text") for part in content
                 if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{name}.content may have text parts only.", field="messages")
        content = "\n".join(texts)  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise UserError(f"{name}.content must be text.", field="messages")
    return {"role": role, "content": content}


def begun_reply(messages: Any) -> str:
    """What the reply begins with: the content of a last message that is the assistant's and has
    "prefix": true; "" if there is none."""
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    if not isinstance(last, Mapping) or last.get("prefix") is not True:
        return ""
    if last.get("role") != "assistant" or not last.get("content"):
        raise UserError("Only a last message of the assistant, with text in it, can be continued.",
                        "Leave out continue_final_message, or add that message.",
                        field="messages")
    return _check_message(last, "The last message")["content"]


class ChatTemplate:
    """A model's chat template. Rendering blocks, and may be called from any thread.

    Args:
        source: Jinja, or a format; None for a model without one, which then cannot chat.
        variables: what the template may ask for besides the messages, such as "bos_token".
        meta_instruction: system prompt of conversations that bring none; "" leaves that to the
            template.
        seconds: CPU time of one rendering, and of compiling the template.
    """

    def __init__(
        self, source: str | ChatFormat | None, variables: Mapping[str, str] | None = None, *,
        meta_instruction: str = "", seconds: float = 0.5,
    ) -> None:
        if isinstance(source, str) and len(source) > MAX_SOURCE_CHARS:
            raise UserError(
                f"The chat template has more than {MAX_SOURCE_CHARS} characters.",
                "Use the original files of the model.")
        self.source = source
        self.variables = dict(variables or {})
        self.meta_instruction = meta_instruction
        self.seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, choice: str = "") -> ChatTemplate:
        """The template of a model folder or workspace; else its family's format.

        Args:
            choice: wins over both: a format's name, or a file: Jinja (.jinja), or LMDeploy's
                chat_template.json (.json).

        Raises:
            UserError: a broken file, or a choice that there is not.
        """
        folder = text_folder(folder)
        own = chat_template_source(folder)
        source = chosen(choice) if choice else own
        if choice and own is not None:
            log.warning("The chat template %s takes the place of the model's own. If replies are "
                        "odd, the model was made for another: leave its own.", choice)
        return cls(source or chat_formats.declared(folder), special_tokens(folder))

    @classmethod
    def from_config(cls, folder: str | Path, config: ChatConfig) -> ChatTemplate:
        """The template that `config` asks for: its choice, capability and system prompt.

        Raises:
            UserError: as `from_folder`.
        """
        template = cls.from_folder(folder, config.chat_template)
        template.meta_instruction = config.meta_instruction
        source = template.source
        if isinstance(source, ChatFormat) and config.cap != "auto":
            template.source = replace(source, capability=config.cap)
        elif config.cap not in ("auto", "chat"):
            template.source = ChatFormat(capability=config.cap)
        return template

    def _checked(self, messages: Any) -> list[dict[str, str]]:
        checked = check_messages(messages)
        if self.meta_instruction and checked[0]["role"] != "system":
            checked.insert(0, {"role": "system", "content": self.meta_instruction})
        return checked

    def stops(self, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
        """(token ids, texts) that end a reply, besides those that the checkpoint names."""
        if isinstance(self.source, ChatFormat):
            words = [(word, tokenizer.token_to_id(word)) for word in self.source.stop_words]
            ids = [i for _, i in words if i in tokenizer.special_ids]
            return ids, [word for word, i in words if i not in tokenizer.special_ids]
        tokens = chat_formats.end_of_turn(self.source or "")
        known = [tokenizer.token_to_id(token) for token in tokens]
        return [i for i in known if i in tokenizer.special_ids], []

    def encode(self, messages: Any, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the conversation, up to where the reply begins, or goes on: see
        `begun_reply`. That needs nothing of the template, for the reply was written behind the
        same prompt.

        What reads like a special token inside a message is text there, not the token: somebody
        who types "<|im_end|>" asks about it, and does not end a turn.

        Raises:
            UserError: see `render`.
        """
        if begun := begun_reply(messages):
            return self.encode(messages[:-1], tokenizer) + tokenizer.encode_parts(
                ["", *_cut(begun, tokenizer)])
        checked = self._checked(messages)
        token = tokenizer.special_token
        if token is None or not any(token.search(message["content"]) for message in checked):
            return tokenizer.encode(self.render(checked), add_special_tokens=False)
        # Cut behind the first character of each, by a mark that survives the template.
        spoken = "".join(message["content"] for message in checked)
        mark = next((char for char in NONCHARACTERS if char not in spoken), None)
        if mark is None:
            raise UserError("The messages have all noncharacters of Unicode (U+FDD0 to U+FDEF).",
                            "Leave one out.", field="messages")
        for message in checked:
            message["content"] = mark.join(_cut(message["content"], tokenizer))
        return tokenizer.encode_parts(self.render(checked).split(mark))

    def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained to see it, up to where the reply begins.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text or text parts}].
            add_generation_prompt: end with the beginning of an assistant's turn.

        Raises:
            UserError: bad messages; the template refuses them, is broken, or exceeds its bounds.
        """
        checked = self._checked(messages)
        if self.source is None:
            raise UserError(
                "This model has no chat template, so it cannot chat.",
                "Name one (--chat-template llama2; python app.py list has all), use "
                "/v1/completions, or a chat version of the model.")
        if isinstance(self.source, ChatFormat):
            begin = self.variables.get("bos_token", "")
            return self.source.render(checked, begin, add_generation_prompt)
        size = sum(len(message["content"]) for message in checked)
        request = {
            "messages": checked, "add_generation_prompt": add_generation_prompt,
            "max_chars": OUTPUT_CHARS + 4 * size,
        }
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self._stop()  # it died while nobody asked
            if self._child is None:
                self._start()
            # CPU time is bounded by the child itself; this bounds a child that does not run.
            return self._ask(request, 10 + 10 * self.seconds)["text"]

    def close(self) -> None:
        """End the child. Rendering again would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        """Start the child and have it compile the template."""
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "backend.template_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=PROJECT, env=environment,
        )
        self._ask(
            {"source": self.source, "variables": self.variables, "seconds": self.seconds,
             "memory": MEMORY_BYTES}, STARTUP_SECONDS)

    def _ask(self, request: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
        """One exchange with the child, which is stopped if anything but text comes back."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        alarm = threading.Timer(wall_seconds, child.kill)
        alarm.start()
        line = b""
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            # A character takes at most 12 bytes of JSON, as two escaped surrogates.
            line = child.stdout.readline(12 * request.get("max_chars", 0) + 4096)
        except OSError:
            pass  # it died while we wrote
        except BaseException:
            self._stop()  # interrupted: its answer must not be taken for the next one's
            raise
        finally:
            alarm.cancel()
        if not line.endswith(b"\n"):
            raise self._no_answer()
        answer = json.loads(line)
        if "kind" in answer:
            if answer["kind"] not in ("refused", "failed"):
                self._stop()
            raise self._error(answer)
        return answer

    def _no_answer(self) -> UserError:
        status = self._stop()
        if status in (-signal.SIGPROF, -signal.SIGKILL):  # by its own bound, or by ours
            return UserError(f"The model's chat template used more than {self.seconds:g} s.", HINT)
        return UserError(f"The chat template's process ended with status {status}.", HINT)

    def _stop(self) -> int | None:
        """End the child; its exit status, which is the one it had if it was dead already."""
        if self._child is None:
            return None
        child, self._child = self._child, None
        child.kill()
        child.communicate()
        return child.returncode

    def _error(self, answer: dict[str, str]) -> UserError:
        match answer["kind"]:
            case "refused":
                return UserError(
                    f"The model's chat template refuses the conversation: {answer['text']}",
                    field="messages")
            case "syntax":
                return UserError(f"The model's chat template is broken: {answer['text']}", HINT)
            case "memory":
                return UserError(
                    f"The model's chat template used more than {MEMORY_BYTES >> 20} MiB.", HINT)
            case "output":
                return UserError("The model's chat template wrote too much text.", HINT)
            case _:
                return UserError(f"The model's chat template failed: {answer['text']}", HINT)


def _cut(text: str, tokenizer: Tokenizer) -> list[str]:
    """`text` in parts, cut behind the first character of whatever reads like a special token."""
    token = tokenizer.special_token
    starts = [match.start() + 1 for match in token.finditer(text)] if token else []
    return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]


def chosen(choice: str) -> str | ChatFormat:
    """The template that a user names, see `ChatTemplate.from_folder`.

    Raises:
        UserError: no such format, no such file, or a broken one.
    """
    path = Path(choice).expanduser()
    if path.suffix not in chat_formats.FILE_TYPES:
        return chat_formats.named(choice)
    if path.suffix == ".json":
        return chat_formats.from_json(path)
    source = read_text(path)
    if source is None:
        raise UserError(f"There is no file {path}.", chat_formats.HINT, field="chat_template")
    return source
