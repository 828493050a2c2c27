"""Hostile and mistaken bodies: each gets one sentence with a 4xx, and the service goes on."""

from __future__ import annotations

import json

import pytest

from tests.server.support import Served

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def with_messages(tail: str) -> bytes:
    """A fine body but for `tail`."""
    return f'{{"messages": {json.dumps(MESSAGES)}, {tail}}}'.encode()


NO_JSON = [
    b"", b" ", b"\n\n", b"\x00", b"{", b"}", b"[", b"nul", b"{\"a\"}", b"{'a': 1}", b"{a: 1}",
    b'{"a": 1,}', b'{"a": 1}}', b'{"a": 1} x', b'{"a": 01}', b'{"a": +1}', b'{"a": .5}',
    b'{"a": 1.}', b'{"a": 0x1F}', b'{"a": "\x01"}', b'{"a": "\\x41"}', b'{"a": "\\u12"}',
    b'{"a": "unfinished}', b'{"a": /* c */ 1}', b"<html></html>", b"model=x&messages=y",
    b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b'{"a": "\xc0\xaf"}',
    b'{"a": "\xed\xa0\x80"}', b'{"a": "\xf4\x90\x80\x80"}', '{"a": 1}'.encode("utf-16"),
    b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"1", b'"text"', b"null", b"true", b"-0", b"1e999",
    b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}",
]
NO_VALUE = [
    '"temperature": NaN', '"temperature": Infinity', '"temperature": -Infinity',
    '"temperature": 1e400', '"temperature": -1e400', f'"seed": {10**30}', f'"n": {1 << 63}',
    '"stop": "\\ud800"', '"stop": ["\\udc00x"]', '"\\ud83d": 1', '"stop": "\\ude00\\ud83d"',
    '"metadata": ' + "[" * 64 + "]" * 64, '"metadata": ' + '{"a":' * 64 + "1" + "}" * 64,
    '"metadata": {' + ",".join(f'"k{i}": 0' for i in range(2000)) + "}",
    ",".join(f'"k{i}": 0' for i in range(2000)),
]


def refused(served: Served, path: str, body: bytes, status: int = 400) -> dict:
    with served.http() as http:
        reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith((".", "?")) and len(error["message"]) < 400
    return error


def assert_goes_on(served: Served) -> None:
    with served.http() as http:
        reply = http.post(CHAT, json={"messages": MESSAGES})
    assert reply.json()["choices"][0]["message"]["content"] == "hi"
    assert served.engine.epoch == 1, "the engine was started again"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_what_is_no_json(served: Served, path: str):
    for body in NO_JSON:
        error = refused(served, path, body)
        assert "body" in error["message"], body[:50]
    assert_goes_on(served)


def test_values_that_json_or_unicode_does_not_have(served: Served):
    for tail in NO_VALUE:
        assert "body" in refused(served, CHAT, with_messages(tail))["message"], tail[:50]
    assert_goes_on(served)


def test_whole_surrogate_pairs_and_nul_are_text(served: Served):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00 \\u0000 \\uffff"}]}'
    with served.http() as http:
        reply = http.post(CHAT, content=body)
    assert reply.json()["choices"][0]["message"]["content"] == "\U0001f600 \x00 \uffff"


FIELDS = [  # what follows the messages, `param`, a part of the sentence
    ('"temperature": "1"', "temperature", 'a number from 0.0 to 2.0, not "1"'),
    ('"temperature": true', "temperature", "not true"),
    ('"temperature": 2.01', "temperature", "not 2.01"),
    ('"temperature": -1', "temperature", "not -1"),
    ('"temperature": [1]', "temperature", "not a list of 1"),
    ('"top_p": 1.5', "top_p", "from 0.0 to 1.0"),
    ('"top_k": -1', "top_k", "a whole number from 0"),
    ('"top_k": 1.5', "top_k", "not 1.5"),
    ('"min_p": {}', "min_p", "not an object"),
    ('"repetition_penalty": 0', "repetition_penalty", "from 0.01"),
    ('"presence_penalty": 3', "presence_penalty", "from -2.0 to 2.0"),
    ('"frequency_penalty": -3', "frequency_penalty", "from -2.0 to 2.0"),
    ('"seed": 1.0', "seed", "a whole number"),
    ('"max_tokens": 0', "max_tokens", "at least 1, not 0"),
    ('"max_tokens": true', "max_tokens", "a whole number"),
    ('"max_tokens": "10"', "max_tokens", "a whole number"),
    ('"max_completion_tokens": -5', "max_completion_tokens", "at least 1"),
    ('"max_tokens": 1, "max_completion_tokens": 2', "max_completion_tokens", "differ"),
    ('"min_tokens": -1', "min_tokens", "at least 0"),
    ('"min_tokens": 5, "max_tokens": 4', "min_tokens", "at most 4"),
    ('"n": 0', "n", "from 1 to 8"), ('"n": 9', "n", "from 1 to 8"),
    ('"n": 1000000000000000000', "n", "from 1 to 8"),
    ('"stop": true', "stop", "text, a list of texts, false or null"),
    ('"stop": [1]', "stop", "a list of texts"), ('"stop": ""', "stop", "1 to 256"),
    ('"stop": ' + json.dumps(["x"] * 17), "stop", "at most 16"),
    ('"stop": ' + json.dumps("x" * 257), "stop", "1 to 256"),
    ('"stop_token_ids": 5', "stop_token_ids", "a list"),
    ('"stop_token_ids": [1, "2"]', "stop_token_ids", 'item 1 is "2"'),
    ('"stop_token_ids": [-1]', "stop_token_ids", "item 0 is -1"),
    ('"stop_token_ids": [99999]', "stop_token_ids", "outside the vocabulary"),
    ('"stop_token_ids": ' + json.dumps([1] * 2000), "stop_token_ids", "at most 1024"),
    ('"logit_bias": {"a": 1}', "logit_bias", 'not "a"'),
    ('"logit_bias": {"-1": 1}', "logit_bias", 'not "-1"'),
    ('"logit_bias": {"1": 101}', "logit_bias", "not 101"),
    ('"logit_bias": {"1": true}', "logit_bias", "not true"),
    ('"logit_bias": {"99999": 1}', "logit_bias", "outside the vocabulary"),
    ('"logit_bias": [1]', "logit_bias", "an object"),
    ('"ignore_eos": 1', "ignore_eos", "true or false"),
    ('"logprobs": 1', "logprobs", "true or false"),
    ('"top_logprobs": 5', "top_logprobs", "needs logprobs"),
    ('"logprobs": true, "top_logprobs": 21', "top_logprobs", "from 0 to 20"),
    ('"stream": "yes"', "stream", "true or false"),
    ('"stream_options": {"include_usage": true}', "stream_options", "needs stream"),
    ('"stream": true, "stream_options": {"include_usage": 1}', "stream_options.include_usage",
     "true or false"),
    ('"stream": true, "stream_options": {"include_usge": true}', "stream_options.include_usge",
     "Did you mean include_usage?"),
    ('"stream_options": []', "stream_options", "an object"),
    ('"model": 5', "model", "text"),
    ('"temprature": 1', "temprature", "Did you mean temperature?"),
    ('"zzz": 1', "zzz", "listed at /docs"),
    ('"tools": [{"type": "function"}]', "tools", "not supported"),
    ('"functions": [{}]', "functions", "not supported"),
    ('"response_format": {"type": "json_object"}', "response_format", "not supported"),
    ('"store": true', "store", "not supported"), ('"audio": {}', "audio", "not supported"),
    ('"messages": []', "messages", "1 to 1024 messages"),
    ('"messages": null', "messages", "not null"), ('"messages": {}', "messages", "not an object"),
    ('"messages": 5', "messages", "text, or a list"),
    ('"kwargs": {"a": 1}', "kwargs", "not supported"),
    ('"messages": [1]', "messages[0]", "an object"),
    ('"messages": [[]]', "messages[0]", "an object"),
    ('"messages": ' + json.dumps(MESSAGES * 1025), "messages", "not a list of 1025"),
    ('"messages": [{}]', "messages[0].role", "missing"),
    ('"messages": [{"role": "user"}]', "messages[0].content", "missing"),
    ('"messages": [{"role": "tool", "content": ""}]', "messages[0].role", 'not "tool"'),
    ('"messages": [{"role": "user", "content": null}]', "messages[0].content", "not null"),
    ('"messages": [{"role": "user", "content": []}]', "messages[0].content", "not a list of 0"),
    ('"messages": [{"role": "user", "content": ["x"]}]', "messages[0].content", "parts like"),
    ('"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]',
     "messages[0].content", "reads text only"),
    ('"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]',
     "messages[0].content", "parts like"),
    ('"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]',
     "messages[0].tool_calls", "not supported"),
    ('"messages": [{"role": "user", "content": "x", "contents": "y"}]', "messages[0].contents",
     "Did you mean content?"),
    ('"messages": [{"role": "user", "content": ""}]', "prompt", "empty"),
]


def test_every_field_says_what_it_must_be(served: Served):
    for tail, param, sentence in FIELDS:  # a second "messages" replaces the first
        error = refused(served, CHAT, with_messages(tail))
        assert error["param"] == param and sentence in error["message"], (tail[:80], error)
    assert_goes_on(served)


COMPLETION_FIELDS = [
    ({}, "prompt", "missing"),
    ({"prompt": None}, "prompt", "must be text"), ({"prompt": []}, "prompt", "must be text"),
    ({"prompt": [1, "a"]}, "prompt", "must be text"), ({"prompt": [True]}, "prompt", "must be"),
    ({"prompt": [[1], "a"]}, "prompt", "must be text"), ({"prompt": 1.5}, "prompt", "must be"),
    ({"prompt": [[[1]]]}, "prompt", "must be text"), ({"prompt": ["a"] * 65}, "prompt", "64"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [320]}, "prompt", "Token id 320 is outside"),
    ({"prompt": [-1]}, "prompt", "Token id -1 is outside"),
    ({"prompt": [-1], "echo": True}, "prompt", "Token id -1 is outside"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "a whole number from 0 to 20"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"prompt": "a", "logprobs": 1, "echo": True}, "echo", "not supported"),
    ({"prompt": "a", "best_of": 2}, "best_of", "equal to n"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ({"prompt": "a", "messages": []}, "messages", "Unknown field"),
    ({"prompt": ["a"] * 64, "n": 8}, "n", "asks for 512 replies"),
]


def test_fields_of_completions(served: Served):
    for body, param, sentence in COMPLETION_FIELDS:
        error = refused(served, "/v1/completions", json.dumps(body).encode())
        assert error["param"] == param and sentence in error["message"], (body, error)
    assert_goes_on(served)


def test_huge_lists_of_mistakes_are_answered_with_the_first(served: Served):
    for body in (
        {"messages": [{"role": 1}] * 100_000},
        {"messages": [{f"k{i}": i for i in range(1000)}] * 100},
        {"messages": MESSAGES, "metadata": [[]] * 400_000},
        {"messages": [{"role": 1}] * 10_000},
        {"messages": MESSAGES, "stop_token_ids": ["x"] * 300_000},
        {"messages": MESSAGES, "stop": ["x"] * 300_000},
    ):
        refused(served, CHAT, json.dumps(body).encode())
    refused(served, "/v1/completions", json.dumps({"prompt": [1.5] * 300_000}).encode())
    assert_goes_on(served)


def test_too_large_bodies(served: Served):
    def chunks():
        for _ in range(40):
            yield b" " * 100_000
    with served.http() as http:
        for content in (b" " * 2_000_001, chunks()):
            reply = http.post(CHAT, content=content)
            assert reply.status_code == 413 and "2000000" in reply.json()["error"]["message"]
    assert_goes_on(served)


@pytest.mark.parametrize(("method", "path", "status", "allow"), [
    ("GET", "/v1/chat/completions", 405, "POST"), ("PUT", "/v1/completions", 405, "POST"),
    ("POST", "/v1/models", 405, "GET"), ("DELETE", "/health", 405, "GET, HEAD"),
    ("POST", "/metrics", 405, "GET"), ("PATCH", "/api/status", 405, "GET"),
    ("GET", "/v1", 404, None), ("GET", "/v1/", 404, None), ("POST", "/v1/embeddings", 404, None),
    ("GET", "/v1/models/", 404, None), ("GET", "/v1/chat/completions/", 404, None),
    ("POST", "/api/nothing", 404, None), ("GET", "/nothing", 404, None),
    ("GET", "/v1/models/../secret", 404, None), ("GET", "/v1/models/%2e%2e%2fx", 404, None),
])
def test_wrong_routes(served: Served, method: str, path: str, status: int, allow: str | None):
    with served.http() as http:
        reply = http.request(method, path)
    assert reply.status_code == status
    assert reply.headers.get("allow") == allow
    assert reply.json()["error"]["message"]
