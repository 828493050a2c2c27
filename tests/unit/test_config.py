"""Config dataclasses and what is made of them agree."""

from __future__ import annotations

import argparse
import math
import typing
from dataclasses import fields

import pytest

from backend.config import (
    ChatConfig,
    EngineConfig,
    SamplingParams,
    ServerConfig,
    add_arguments,
    base_type,
    from_namespace,
    validate,
    workspace_kv_cache_dtype,
)
from backend.errors import UserError
from backend.proxy_command import ProxyConfig

CONFIGS = [EngineConfig, SamplingParams, ServerConfig, ChatConfig, ProxyConfig]


def parser_for(cls: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, cls)
    return parser


def example(cls: type, name: str) -> typing.Any:
    """A valid value other than the default."""
    f = next(f for f in fields(cls) if f.name == name)
    kind, _ = base_type(typing.get_type_hints(cls)[name])
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c != f.default)
    if kind is bool:
        return not f.default
    if kind is str:
        return "example"
    if typing.get_origin(kind) is tuple:
        return tuple(typing.get_args(kind)[0](i) for i in (7, 9))
    low = f.metadata["low"] if f.metadata["low"] is not None else 0
    return kind(low + 1)


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_are_valid_and_every_field_has_help(cls):
    validate(cls())
    for f in fields(cls):
        assert f.metadata["help"], f.name


@pytest.mark.parametrize("cls", CONFIGS)
def test_no_flags_give_the_defaults(cls):
    assert from_namespace(cls, parser_for(cls).parse_args([])) == cls()


@pytest.mark.parametrize(
    "cls,name",
    [(c, f.name) for c in CONFIGS for f in fields(c) if "dict" not in str(f.type)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_every_field_has_a_flag_that_sets_it(cls, name):
    value = example(cls, name)
    words = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    f = next(f for f in fields(cls) if f.name == name)
    flag = [] if f.metadata["positional"] else ["--" + name.replace("_", "-")]
    config = from_namespace(cls, parser_for(cls).parse_args(flag + words))
    assert getattr(config, name) == value
    others = {g.name for g in fields(cls)} - {name}
    assert all(getattr(config, o) == getattr(cls(), o) for o in others)


def test_flags_win_over_given_defaults():
    parser = parser_for(SamplingParams)
    given = parser.parse_args(["--top-k", "5"])
    config = from_namespace(SamplingParams, given, top_k=40, temperature=0.0)
    assert (config.top_k, config.temperature) == (5, 0.0)


@pytest.mark.parametrize(
    "word,value", [("True", True), ("false", False), ("1", True), (None, True)]
)
def test_booleans_are_spelled_as_in_the_tutorials(word, value):
    words = ["--ignore-eos"] + ([word] if word else [])
    assert (
        from_namespace(SamplingParams, parser_for(SamplingParams).parse_args(words)).ignore_eos
        is value
    )


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_k", 1.5),
        ("top_k", -1),
        ("max_tokens", 0),
        ("seed", 1 << 63),
        ("logprobs", 21),
        ("ignore_eos", 1),
        ("stop_token_ids", (1.5,)),
        ("stop_token_ids", [1]),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("repetition_penalty", 0.0),
        ("min_tokens", None),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(UserError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and field in caught.value.message


def test_choices_are_named():
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        validate(EngineConfig(dtype="int7"))


def test_kv_caches_by_name_and_by_number():
    def bits(**given) -> int:
        return EngineConfig(**given).kv_cache_bits

    assert (bits(), bits(quant_policy=8), bits(quant_policy=4)) == (0, 8, 4)
    assert (bits(kv_cache_dtype="int8"), bits(kv_cache_dtype="int4")) == (8, 4)
    assert bits(kv_cache_dtype="int4", quant_policy=4) == 4
    with pytest.raises(UserError, match="int8 and quant_policy 4 ask for different KV") as caught:
        EngineConfig(kv_cache_dtype="int8", quant_policy=4)
    assert caught.value.field == "kv_cache_dtype"


def test_quant_policy_of_a_workspace_means_int8(caplog):
    """As the tutorials have it."""
    assert [workspace_kv_cache_dtype(policy) for policy in (0, 8)] == ["auto", "int8"]
    assert not caplog.text
    assert workspace_kv_cache_dtype(4) == "int8" and "means int8" in caplog.text
    with pytest.raises(UserError, match="must be one of 0, 4, 8, not 3"):
        workspace_kv_cache_dtype(3)
