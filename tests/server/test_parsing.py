"""Whatever is sent, parsing ends in a request or in a `UserError`, never in anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from backend.config import SamplingParams
from backend.errors import UserError
from backend.server.body import parse_json
from backend.server.protocol import ChatRequest, CompletionRequest, Generation
from backend.server.strict import parse, show

FINE: dict[type[Generation], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "hi"}]},
    CompletionRequest: {"prompt": "hi"},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300)
    | st.sampled_from(["user", "text", "role", "content", "type"]),
    lambda inner: st.lists(inner, max_size=20)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1", "x"]), inner),
    max_leaves=30)


def read(model: type[Generation], data: dict[str, Any]) -> SamplingParams:
    body = parse(model, parse_json(json.dumps(data).encode("utf-8", "surrogatepass")))
    body.check()
    return body.sampling({})


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary() | st.text().map(lambda text: f'{{"prompt": {text}}}'.encode("utf-8", "replace")))
def test_any_bytes(data: bytes):
    try:
        assert isinstance(parse_json(data), dict)
    except UserError as error:
        assert error.status == 400


@pytest.mark.parametrize("model", FINE)
def test_any_value_in_any_field(model: type[Generation]):
    names = sorted({*model.model_fields, *model.neutral, *model.no_effect, "nothing"})

    @settings(max_examples=600, derandomize=True, deadline=None)
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    def check(fields: dict[str, Any]) -> None:
        try:
            sampling = read(model, FINE[model] | fields)
        except UserError as error:
            assert error.status == 400 and len(str(error)) < 500
        else:
            assert isinstance(sampling, SamplingParams)

    check()


def test_what_is_not_sent_comes_from_the_model_and_then_from_the_usual_defaults():
    advice = {"temperature": 0.3, "top_k": 20, "max_tokens": 5}
    body = parse(ChatRequest, FINE[ChatRequest] | {"top_k": 7, "temperature": None})
    sampling = body.sampling(advice)
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.3, 7, 5)
    assert sampling.top_p == SamplingParams().top_p and sampling.logprobs is None
    zeros = {"temperature": 0, "top_k": 0, "min_tokens": 0, "seed": 0, "frequency_penalty": 0}
    sampling = parse(ChatRequest, FINE[ChatRequest] | zeros).sampling(
        {"temperature": 0.3, "top_k": 20, "frequency_penalty": 1.0})
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0, 0, 0)
    assert sampling.frequency_penalty == 0
    assert parse(CompletionRequest, FINE[CompletionRequest]).sampling(advice).max_tokens == 16


def test_every_sampling_parameter_can_be_sent():
    sent = dict(
        temperature=1, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.1, presence_penalty=1,
        frequency_penalty=-1, max_tokens=9, min_tokens=2, seed=-4, ignore_eos=True,
        stop_token_ids=[5, 6], logit_bias={"7": -100})
    expected = SamplingParams(
        **sent | {"stop_token_ids": (5, 6), "logit_bias": {7: -100.0}, "logprobs": 3})
    assert read(ChatRequest, FINE[ChatRequest] | sent | {"logprobs": True, "top_logprobs": 3}) == (
        expected)
    assert read(CompletionRequest, FINE[CompletionRequest] | sent | {"logprobs": 3}) == expected
    assert {*sent, "logprobs"} == set(SamplingParams.__dataclass_fields__)


def test_developer_is_system():
    body = parse(ChatRequest, {"messages": [{"role": "developer", "content": "be brief"}]})
    assert [m.as_dict() for m in body.messages] == [{"role": "system", "content": "be brief"}]


def test_shown_values_are_short():
    assert show("x" * 1000) == '"' + "x" * 40 + '..."' and show([1] * 9) == "a list of 9"
    assert show(None) == "null" and show(True) == "true" and show({}) == "an object"
