"""config.json is data: what is read, what is refused, and what is ignored."""

from __future__ import annotations

import json
import math
import os

import pytest

from backend.errors import UserError
from backend.models.model_config import ConfigFields, QuantizationConfig, read_config_fields
from backend.models.registry import parse_config, read_model_config

BASE = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    torch_dtype="bfloat16",
)


def parsed(**overrides):
    return parse_config(ConfigFields({**BASE, **overrides}))


def test_a_plain_config():
    config = parsed(rope_theta=500000.0)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.head_dim, config.dtype, config.rms_norm_eps) == (16, "bfloat16", 1e-5)
    assert (config.rope.rope_type, config.rope.rope_theta) == ("default", 500000.0)
    assert config.windows == (None, None)
    assert not (config.tie_word_embeddings or config.qkv_bias or config.mlp_bias)


def test_what_is_not_known_is_ignored():
    """Above all what would make transformers run code from the folder."""
    strange = dict(auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True, x={"y": [1]})
    assert parsed(**strange) == parsed()


def test_missing_counts_have_defaults():
    config = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "torch_dtype")}
    made = parse_config(ConfigFields(config))
    assert (made.num_kv_heads, made.dtype) == (4, "float32")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_both_spellings_of_rope(key, type_key):
    scaling = {type_key: "linear", "factor": 4}
    config = parsed(**{key: scaling, "rope_theta": 1e6})
    assert (config.rope.rope_type, config.rope.factor) == ("linear", 4.0)
    assert config.rope.rope_theta == 1e6


def test_the_sections_theta_wins():
    config = parsed(rope_theta=1e4, rope_parameters=dict(rope_type="default", rope_theta=2e4))
    assert config.rope.rope_theta == 2e4


def test_a_top_level_original_length_wins():
    rope = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=128)
    assert parsed(rope_scaling=rope).rope.original_max_position_embeddings == 128
    config = parsed(rope_scaling=rope, original_max_position_embeddings=64)
    assert config.rope.original_max_position_embeddings == 64


def test_windows_of_the_families():
    def windows(architecture, **overrides):
        return parsed(architectures=[architecture], **overrides).windows

    assert windows("LlamaForCausalLM", sliding_window=8) == (None, None)
    assert windows("MistralForCausalLM", sliding_window=8) == (8, 8)
    assert windows("MistralForCausalLM", sliding_window=None) == (None, None)
    assert windows("MistralForCausalLM") == (4096, 4096)
    qwen = dict(sliding_window=8, max_window_layers=1)
    assert windows("Qwen2ForCausalLM", use_sliding_window=True, **qwen) == (None, 8)
    assert windows("Qwen2ForCausalLM", use_sliding_window=False, **qwen) == (None, None)
    kinds = ["sliding_attention", "full_attention"]
    typed = dict(use_sliding_window=True, layer_types=kinds, **qwen)
    assert windows("Qwen3ForCausalLM", **typed) == (8, None)


def test_biases_norms_and_head_dims_of_the_families():
    llama = parsed(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parsed(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parsed(architectures=["Qwen3ForCausalLM"])
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 7)
BAD = {
    "missing": (dict(vocab_size=None), "vocab_size is missing"),
    "text for number": (dict(hidden_size="64"), "hidden_size must be a whole number"),
    "bool for number": (dict(num_hidden_layers=True), "num_hidden_layers must be a whole number"),
    "fraction": (dict(vocab_size=3.5), "vocab_size must be a whole number"),
    "negative": (dict(intermediate_size=-1), "intermediate_size must be a whole number"),
    "absurd": (dict(num_hidden_layers=10**9), "num_hidden_layers must be a whole number"),
    "nan eps": (dict(rms_norm_eps=math.nan), "rms_norm_eps must be finite"),
    "no flag": (dict(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
    "kv heads": (dict(num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    "heads": (dict(num_attention_heads=6, num_key_value_heads=2), "no multiple of num_attention"),
    "odd head": (dict(head_dim=15), "head_dim 15 must be even"),
    "activation": (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "dtype": (dict(torch_dtype="int8"), "dtype 'int8' is not one of"),
    "rope type": (dict(rope_scaling=dict(type="magic")), "rope type 'magic' is unknown"),
    "rope no object": (dict(rope_scaling=[1]), "rope_scaling must be an object"),
    "rope factor": (dict(rope_scaling=dict(type="linear")), "needs factor"),
    "rope zero": (dict(rope_scaling=dict(type="linear", factor=0)), "factor must be finite"),
    "llama3": (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "needs low_freq_factor"),
    "longrope": (dict(rope_scaling=LONGROPE), "long_factor has 7 entries"),
    "theta": (dict(rope_theta=-1.0), "rope_theta must be finite and above"),
    "partial": (dict(partial_rotary_factor=0.5), "partial_rotary_factor is not supported"),
    "by layer": (dict(rope_parameters=dict(full_attention={})), "differs by layer"),
    "architecture": (dict(architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not supported"),
    "no architecture": (dict(architectures=None), "names no architecture"),
    "odd architecture": (dict(architectures=[7]), r"architectures\[0\] must be text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    overrides, words = BAD[name]
    with pytest.raises(UserError, match=words):
        parsed(**overrides)


AWQ = dict(quant_method="awq", bits=4, group_size=128, version="gemm", zero_point=True)


def test_a_quantized_model():
    assert parsed().quantization is None
    assert parsed(quantization_config=None).quantization is None
    assert parsed(quantization_config=AWQ).quantization == QuantizationConfig("awq", 128)
    spelled = {**AWQ, "group_size": 32, "version": "GEMM", "modules_to_not_convert": ["mlp"]}
    assert parsed(quantization_config=spelled).quantization == QuantizationConfig(
        "awq", 32, ("mlp",)
    )
    newer = {**AWQ, "format": "gemm", "modules_to_not_convert": None}
    del newer["version"]
    assert parsed(quantization_config=newer) == parsed(quantization_config=AWQ)


def test_a_quantized_model_without_a_dtype_is_float16():
    assert parsed(quantization_config=AWQ, torch_dtype=None).dtype == "float16"
    assert parsed(quantization_config=AWQ).dtype == "bfloat16"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(quant_method="gptq"), "quantized with the method 'gptq'"),
        (dict(quant_method="bitsandbytes"), "quantized with the method 'bitsandbytes'"),
        (dict(quant_method=None), "quant_method is missing"),
        (dict(quant_method=4), "quant_method must be text"),
        (dict(bits=3), "quantized with bits 3"),
        (dict(bits=8), "quantized with bits 8"),
        (dict(bits=None), "bits is missing"),
        (dict(group_size=-1), "quantized with group_size -1"),
        (dict(group_size=96), "quantized with group_size 96"),
        (dict(group_size="128"), "group_size must be a whole number"),
        (dict(version="gemv"), "quantized with version 'gemv'"),
        (dict(version=None, format="gemv_fast"), "quantized with version 'gemv_fast'"),
        (dict(backend="llm-awq"), "quantized with the backend 'llm-awq'"),
        (dict(zero_point=False), "quantized with zero_point false"),
        (dict(modules_to_not_convert="mlp"), "modules_to_not_convert must be a list"),
        (dict(modules_to_not_convert=[3]), "modules_to_not_convert must be a list"),
    ],
)
def test_quantizations_that_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        parsed(quantization_config={**AWQ, **change})


def test_other_kinds_of_quantization_are_named():
    with pytest.raises(UserError, match="the method 'compressed-tensors'"):
        parsed(compression_config={"quant_method": "compressed-tensors"})


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        parsed(architectures=["GPT2LMHeadModel"])
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in caught.value.hint


@pytest.mark.parametrize("kinds", [["full_attention"], "full_attention", ["a", "b"], [1, {}]])
def test_bad_layer_types(kinds):
    overrides = dict(use_sliding_window=True, sliding_window=8, layer_types=kinds)
    with pytest.raises(UserError, match="layer_types must name"):
        parsed(architectures=["Qwen2ForCausalLM"], **overrides)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_model_config(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no config.json"):
        read_model_config(str(tmp_path))
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="is a file, not a model folder"):
        path.write_text("{}")
        read_model_config(str(path))


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("{}", "names no architecture"),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_model_config(str(tmp_path))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_model_config(str(tmp_path))


def test_a_pipe_for_a_config_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_config_fields(str(tmp_path))


def test_a_config_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="no config.json is that large"):
        read_config_fields(str(tmp_path))


def test_reading_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert read_model_config(str(tmp_path)) == parsed()
