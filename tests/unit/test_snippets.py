"""Chats as files and as code: whole, runnable, without keys."""

from __future__ import annotations

import json
import shlex

from backend.config import SamplingParams
from backend.history import StoredChat, Turn
from ui import forms, snippets

URL = "http://127.0.0.1:6006"
MESSAGES = [{"role": "user", "content": "It's \"$HOME\"\n`id` 你好"}]


def test_curl_sends_the_very_messages() -> None:
    settings = snippets.chosen(SamplingParams(temperature=0.3, top_k=5), forms.SAMPLING_FIELDS)
    words = shlex.split(snippets.as_curl(URL, "m", MESSAGES, settings))
    assert words[:2] == ["curl", f"{URL}/v1/chat/completions"]
    assert "Authorization: Bearer $LMDESK_API_KEY" in words
    assert json.loads(words[-1]) == {"model": "m", "messages": MESSAGES, **settings}


def test_python_is_a_program() -> None:
    code = snippets.as_python(URL, "m'\"", MESSAGES, {"temperature": 0.3, "top_k": 5})
    compile(code, "snippet", "exec")
    assert "extra_body={'top_k': 5}" in code and "temperature=0.3" in code


def test_command_line_is_quoted() -> None:
    line = snippets.as_command_line(URL, "Don't; rm -rf /", {"max_tokens": 5})
    words = shlex.split(line.replace("\\\n", " "))  # shlex knows no continued lines
    assert words[:4] == ["python", "app.py", "chat", URL]
    assert words[-4:] == ["--max-tokens", "5", "--system", "Don't; rm -rf /"]


def test_files() -> None:
    chat = StoredChat("T/../x", "Be brief.", {"top_p": 1}, 0, [Turn("q", "a", "stop")])
    assert snippets.as_markdown(chat).count("## ") == 2
    assert [m["content"] for m in json.loads(snippets.as_json(chat))["messages"]] == [
        "Be brief.", "q", "a"]
    assert snippets.file_name(chat.title, "md") == "T-x.md"
    assert snippets.file_name("", "json") == "chat.json"
