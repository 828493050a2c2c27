"""What the tutorials have people send: their bodies as they stand, and LMDeploy's client's."""

from __future__ import annotations

import json

import pytest

from tests.server.support import NAME, Served

# The sample for /v1/chat/completions in "hands-on notes", letter by letter.
SAMPLE = """{
  "model": "internlm-chat-7b",
  "messages": "写一首春天的诗",
  "temperature": 0.7,
  "top_p": 1,
  "n": 1,
  "max_tokens": 512,
  "stop": false,
  "stream": false,
  "presence_penalty": 0,
  "frequency_penalty": 0,
  "user": "string",
  "repetition_penalty": 1,
  "renew_session": false,
  "ignore_eos": false
}"""


def test_the_sample_body(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.chat, "model_name", "internlm-chat-7b")
    with served.http() as http:
        reply = http.post("/v1/chat/completions", content=SAMPLE.encode())
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "写一首春天的诗"


def test_messages_as_text_are_what_the_user_says(served: Served):
    """By the chat template, not as raw text to continue."""
    seen: list[list[dict[str, str]]] = []
    encode, served.chat.template.encode = served.chat.template.encode, (
        lambda messages, tokenizer: seen.append(messages) or encode(messages, tokenizer))
    try:
        for renew in (True, False):
            with served.http() as http:
                reply = http.post("/v1/chat/completions", json={
                    "messages": "hello", "session_id": 7, "renew_session": renew})
            assert reply.json()["choices"][0]["message"]["content"] == "hello"
    finally:
        del served.chat.template.encode
    assert seen == [[{"role": "user", "content": "hello"}]] * 2


# As LMDeploy's `APIClient` sends them: all arguments, with those left over as "kwargs".
CLIENT = {
    "/v1/chat/completions": {
        "model": NAME, "messages": "hello", "temperature": 0.7, "top_p": 1.0, "n": 1,
        "max_tokens": 512, "stop": None, "stream": False, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "user": None, "repetition_penalty": 1.0, "session_id": -1,
        "ignore_eos": False, "kwargs": {}},
    "/v1/completions": {
        "model": NAME, "prompt": "hello", "suffix": None, "temperature": 0.7, "n": 1,
        "max_tokens": 16, "stream": False, "stop": None, "top_p": 1.0, "top_k": 40, "user": None,
        "repetition_penalty": 1.0, "session_id": -1, "ignore_eos": False, "kwargs": {}},
}


@pytest.mark.parametrize("path", CLIENT)
def test_bodies_of_lmdeploys_client(served: Served, path: str):
    with served.http() as http:
        reply = http.post(path, json=CLIENT[path])
    assert reply.status_code == 200, reply.text
    assert "hello" in json.dumps(reply.json()["choices"])
