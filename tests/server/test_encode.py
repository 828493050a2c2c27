"""/v1/encode, as LMDeploy has it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.support import Served


def encode(served: Served, **body: Any) -> Any:
    with served.http() as http:
        return http.post("/v1/encode", json=body)


def test_a_text_and_a_list(served: Served):
    assert encode(served, input="hé").json() == {"input_ids": [104, 195, 169], "length": 3}
    assert encode(served, input=["ab", ""]).json() == {"input_ids": [[97, 98], []],
                                                       "length": [2, 0]}


def test_the_beginning_and_the_chat_template(served: Served, monkeypatch: pytest.MonkeyPatch):
    def begun(text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] * add_special_tokens + list(text.encode())

    def rendered(messages: Any, tokenizer: Any) -> list[int]:
        assert messages == [{"role": "user", "content": "a"}]
        return [256, *b"<a>"]

    monkeypatch.setattr(served.chat.tokenizer, "encode", begun)
    monkeypatch.setattr(served.chat.template, "encode", rendered)
    for preprocess, bos, ids in (
        (False, True, [256, 97]), (False, False, [97]),
        (True, True, [256, *b"<a>"]), (True, False, [*b"<a>"]),
    ):
        reply = encode(served, input="a", do_preprocess=preprocess, add_bos=bos)
        assert reply.json() == {"input_ids": ids, "length": len(ids)}


@pytest.mark.parametrize(("body", "param"), [
    ({}, "input"), ({"input": 1}, "input"), ({"input": []}, "input"), ({"input": ["a"] * 65},
     "input"), ({"input": [1]}, "input"), ({"input": "a", "add_bos": 1}, "add_bos"),
    ({"input": "a", "do_proprocess": True}, "do_proprocess"),
])
def test_bad_fields(served: Served, body: dict[str, Any], param: str):
    reply = encode(served, **body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
