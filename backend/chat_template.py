"""Conversations to text by the model's own chat template, in a process that can be killed.

`template_process` is that process, and says why.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.model_files import chat_template_source, special_tokens
from backend.workspace.layout import text_folder

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

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


class ChatTemplate:
    """A model's chat template. Rendering blocks, and may be called from any thread.

    Args:
        source: Jinja; None for a model without one, which then cannot chat.
        variables: what the template may ask for besides the messages, such as "bos_token".
        seconds: CPU time of one rendering, and of compiling the template.
    """

    def __init__(
        self, source: str | None, variables: Mapping[str, str] | None = None, *,
        seconds: float = 0.5,
    ) -> None:
        if source is not None and len(source) > MAX_SOURCE_CHARS:
            raise UserError(
                f"The chat template has more than {MAX_SOURCE_CHARS} characters.",
                "Use the original files of the model.")
        self.source = source
        self.variables = dict(variables or {})
        self.seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """The template of a model folder.

        A model without one gets ChatML if its vocabulary has `<|im_start|>`.

        Raises:
            UserError: a broken file.
        """
        folder = text_folder(folder)
        source = chat_template_source(folder)
        if source is None and _has_token(folder / "tokenizer.json", "<|im_start|>"):
            source = CHATML
        return cls(source, special_tokens(folder))

    def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained to see it, up to where the reply begins.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text or text parts}].
            add_generation_prompt: end with the beginning of an assistant's turn.

        Raises:
            UserError: bad messages; the template refuses them, is broken, or exceeds its bounds.
        """
        checked = check_messages(messages)
        if self.source is None:
            raise UserError(
                "This model has no chat template, so it cannot chat.",
                "Use /v1/completions, or a chat version of the model.")
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


def _has_token(path: Path, token: str) -> bool:
    try:
        return path.is_file() and json.dumps(token).encode() in path.read_bytes()
    except OSError:
        return False
