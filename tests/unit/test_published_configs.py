"""config.json of published models, as far as it is read: their parameters, counted on no memory.

The counts are those that the models' cards and hubs state.
"""

from __future__ import annotations

from typing import Any

import pytest

from backend.layers.parallel import ParallelContext
from backend.layers.rotary import QWEN_DYNAMIC
from backend.models.loader import create_shell
from backend.models.model_config import ConfigFields, ModelConfig
from backend.models.registry import parse_config

BIG = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, torch_dtype="bfloat16")
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5)
LLAMA2 = {**LLAMA, **BIG, "intermediate_size": 11008, "max_position_embeddings": 4096}
QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", rms_norm_eps=1e-6, sliding_window=4096,
    use_sliding_window=False, max_window_layers=28, torch_dtype="bfloat16",
)  # fmt: skip
QWEN25_7B = {
    **QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "use_mrope": False,
}  # fmt: skip
LLAMA3_ROPE = dict(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
    original_max_position_embeddings=8192,
)  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b-chat": ({**LLAMA2, "vocab_size": 32000, "rope_scaling": None}, 6_738_415_616),
    "CodeLlama-7b": (
        {**LLAMA2, "vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1000000},
        6_738_546_688,
    ),
    "vicuna-7b-v1.5-16k": (
        {**LLAMA2, "vocab_size": 32000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        6_738_415_616,
    ),
    "Llama-3.2-1B": (
        dict(
            **LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
            max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE,
            tie_word_embeddings=True, torch_dtype="bfloat16",
        ),
        1_235_814_400,
    ),
    "Yi-6B": (
        {**LLAMA2, "vocab_size": 64000, "num_key_value_heads": 4, "rope_theta": 5000000.0},
        6_061_035_520,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": ({**QWEN25_7B, "rope_theta": 10000}, 7_615_616_512),
    "Qwen2.5-7B-Instruct": (QWEN25_7B, 7_615_616_512),
    "Mistral-7B-v0.3": (
        dict(
            **BIG, architectures=["MistralForCausalLM"], model_type="mistral", vocab_size=32768,
            intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=32768,
            rope_theta=1000000.0, sliding_window=None, rms_norm_eps=1e-5,
        ),
        7_248_023_552,
    ),
    "Qwen3-8B": (
        dict(
            architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=4096, head_dim=128,
            intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960,
            rope_theta=1000000, use_sliding_window=False, max_window_layers=36,
            sliding_window=None, attention_bias=False, rms_norm_eps=1e-6, torch_dtype="bfloat16",
        ),
        8_190_735_360,
    ),
    "Qwen-7B-Chat": (
        dict(
            architectures=["QWenLMHeadModel"], model_type="qwen", hidden_size=4096,
            intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32, kv_channels=128,
            vocab_size=151936, seq_length=8192, max_position_embeddings=32768, no_bias=True,
            layer_norm_epsilon=1e-6, rotary_emb_base=10000, rotary_pct=1.0, bf16=False, fp16=False,
            scale_attn_weights=True, use_dynamic_ntk=True, use_logn_attn=True,
            tie_word_embeddings=False, use_flash_attn="auto", onnx_safe=None,
        ),
        7_721_324_544,
    ),
    "internlm2_5-7b-chat": (
        dict(
            **BIG, architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=False,
            intermediate_size=14336, num_key_value_heads=8, vocab_size=92544, hidden_act="silu",
            max_position_embeddings=32768, rope_theta=1000000, rms_norm_eps=1e-5, pretraining_tp=1,
            rope_scaling={"type": "dynamic", "factor": 2.0}, attn_implementation="eager",
        ),
        7_737_708_544,
    ),
    "Baichuan2-7B-Chat": (
        dict(
            **BIG, architectures=["BaichuanForCausalLM"], model_type="baichuan", vocab_size=125696,
            intermediate_size=11008, max_position_embeddings=4096, model_max_length=4096,
            rms_norm_eps=1e-6, tie_word_embeddings=False,
        ),
        7_505_973_248,
    ),
}  # fmt: skip


def parsed(config: dict[str, Any]) -> ModelConfig:
    return parse_config(ConfigFields(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    config, count = PUBLISHED[name]
    model = create_shell(parsed(config), ParallelContext())
    assert sum(slot.destination.numel() for slot in model.weight_slots().values()) == count


def test_what_only_they_say():
    qwen = parsed(PUBLISHED["Qwen-7B-Chat"][0])
    assert (qwen.max_position_embeddings, qwen.head_dim, qwen.dtype) == (8192, 128, "bfloat16")
    assert qwen.rope.rope_type == QWEN_DYNAMIC and qwen.use_logn_attn and qwen.rms_norm_eps == 1e-6
    renamed = dict(
        hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
        intermediate_size="ffn_hidden_size",
    )  # fmt: skip
    first = {renamed.get(key, key): value for key, value in PUBLISHED["Qwen-7B-Chat"][0].items()}
    assert parsed(first) == qwen
    assert parsed(PUBLISHED["Baichuan2-7B-Chat"][0]).normalized_head
    assert parsed(PUBLISHED["internlm2_5-7b-chat"][0]).rope.factor == 2.0
    internlm = dict(
        **BIG, architectures=["InternLMForCausalLM"], model_type="internlm", bias=True,
        intermediate_size=11008, vocab_size=103168, max_position_embeddings=2048,
        rotary={"base": 10000, "type": "dynamic"},
    )  # fmt: skip
    config = parsed(internlm)
    assert config.qkv_bias and config.output_bias and not config.mlp_bias
    assert (config.rope.rope_type, config.rope.factor) == ("dynamic", 1.0)
    config = parsed({**internlm, "bias": False, "rotary": {"base": 500, "type": "origin"}})
    assert not config.qkv_bias and config.rope.rope_type == "default"
    assert config.rope.rope_theta == 500


@pytest.mark.parametrize(
    "entry, names",
    [
        ("wqkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("attention.wo", ["self_attn.o_proj"]),
        ("layers.12.feed_forward.w2", ["model.layers.12.mlp.down_proj"]),
        ("feed_forward", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("output", ["lm_head"]),
        ("w", []),
    ],
)
def test_modules_that_stay_in_16_bit_by_the_familys_names(entry, names):
    config = {
        **PUBLISHED["internlm2_5-7b-chat"][0],
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": [entry],
        },
    }  # fmt: skip
    quantization = parsed(config).quantization
    assert quantization is not None and list(quantization.not_converted) == [entry, *names]
