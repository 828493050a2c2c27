"""A conversation and its settings as something to take along: files, and code that asks the same.

Pure functions. No key is in what they return, only the name of a variable for it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from backend.chat import Message
from backend.config import SamplingParams
from backend.history import StoredChat

KEY = "LMDESK_API_KEY"  # the variable that holds the key
OPENAI = ("temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty", "seed")


def chosen(sampling: SamplingParams, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named settings that differ from the API's defaults."""
    defaults = {f.name: f.default for f in fields(SamplingParams)}
    values = {name: getattr(sampling, name) for name in names}
    return {name: value for name, value in values.items() if value != defaults[name]}


def as_curl(url: str, model: str, messages: Sequence[Message], settings: dict[str, Any]) -> str:
    """A line for a POSIX shell; `url` is the API's, without /v1."""
    body = json.dumps({"model": model, "messages": list(messages), **settings},
                      ensure_ascii=False, indent=2)
    return (f"curl {shlex.quote(f'{url}/v1/chat/completions')} \\\n"
            f'  -H "Authorization: Bearer ${KEY}" \\\n'
            "  -H 'Content-Type: application/json' \\\n"
            f"  -d {shlex.quote(body)}\n")


def as_python(url: str, model: str, messages: Sequence[Message], settings: dict[str, Any]) -> str:
    """A program over OpenAI's client; what OpenAI's API does not know goes as extra_body."""
    known = {name: value for name, value in settings.items() if name in OPENAI}
    extra = {name: value for name, value in settings.items() if name not in OPENAI}
    arguments = [f"model={model!r}", f"messages={_indented(list(messages))}",
                 *(f"{name}={value!r}" for name, value in known.items())]
    if extra:
        arguments.append(f"extra_body={extra!r}")
    lines = "".join(f"    {argument},\n" for argument in arguments)
    base = f"{url}/v1"
    return ("import os\n\nfrom openai import OpenAI\n\n"
            f"client = OpenAI(base_url={base!r}, api_key=os.environ.get({KEY!r}, 'none'))\n"
            f"stream = client.chat.completions.create(\n{lines}    stream=True,\n)\n"
            "for chunk in stream:\n"
            "    if chunk.choices:\n"
            "        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)\n")


def as_command_line(url: str, system_prompt: str, settings: dict[str, Any]) -> str:
    """The chat in a terminal with the same settings; it begins a conversation of its own."""
    words = ["python app.py chat", shlex.quote(url), f'--api-key "${KEY}"']
    words += [f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
              for name, value in settings.items()]
    if system_prompt.strip():
        words.append(f"--system {shlex.quote(system_prompt)}")
    return " \\\n  ".join(words) + "\n"


def as_markdown(chat: StoredChat) -> str:
    """The branch in view, to read."""
    parts = [f"# {chat.title}"]
    if chat.system_prompt.strip():
        quoted = "\n".join(f"> {line}" for line in chat.system_prompt.splitlines())
        parts.append(f"**System**\n\n{quoted}")
    for turn in chat.turns:
        parts.append(f"## User\n\n{turn.user}")
        parts.append(f"## Assistant\n\n{turn.reply}")
    return "\n\n".join(parts) + "\n"


def as_json(chat: StoredChat) -> str:
    """The branch in view with its settings and figures, for programs."""
    messages: list[dict[str, Any]] = []
    if chat.system_prompt.strip():
        messages.append({"role": "system", "content": chat.system_prompt})
    for turn in chat.turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.reply,
                         "finish_reason": turn.finish_reason,
                         "stats": asdict(turn.stats) if turn.stats else None})
    return json.dumps({"title": chat.title, "sampling": chat.sampling, "messages": messages},
                      ensure_ascii=False, indent=2) + "\n"


def file_name(title: str, ending: str) -> str:
    """A name that every file system takes."""
    words = re.sub(r"[^\w-]+", "-", title).strip("-")[:50]
    return f"{words or 'chat'}.{ending}"


def _indented(messages: list[Message]) -> str:
    lines = "".join(f"        {message!r},\n" for message in messages)
    return f"[\n{lines}    ]"
