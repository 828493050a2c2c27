"""Tiny checkpoints of families that transformers has no code for, made of models that it has.

Each family's mathematics are Llama's or Qwen2's; what is its own is names, order and config keys.
They are written here as the families' published code reads them, with no help of the loader's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kernels.packing import pack_awq, unpack_awq
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import quantize_checkpoint

WHOLE = "model.safetensors"
MHA: dict[str, Any] = dict(num_key_value_heads=4)


def one_after_another(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    return torch.cat((q, k, v))


def in_groups(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """[KV heads, queries of each and K and V, head_dim, ...], as InternLM2's code views it."""
    dim = k.shape[0] // kv_heads
    grouped = [x.unflatten(0, (kv_heads, -1, dim)) for x in (q, k, v)]
    return torch.cat(grouped, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Made:
    """How a checkpoint of `base`, in Llama's names, becomes one of the family."""

    config: dict[str, Any]  # what its config.json says; None removes a key
    base: str = "llama"
    overrides: dict[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    fused: str | None = None  # name of the module that takes the place of self_attn.{q,k,v}_proj
    fuse: Callable[[Tensor, Tensor, Tensor, int], Tensor] = one_after_another


INTERNLM2_NAMES = (
    ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output"),
    ("self_attn.o_proj", "attention.wo"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
)  # fmt: skip
QWEN_NAMES = (
    ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"),
    ("model.layers", "transformer.h"), ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"), ("self_attn.o_proj", "attn.c_proj"),
    ("mlp.gate_proj", "mlp.w2"), ("mlp.up_proj", "mlp.w1"), ("mlp.down_proj", "mlp.c_proj"),
)  # fmt: skip
QWEN_CONFIG = dict(
    architectures=["QWenLMHeadModel"], model_type="qwen", kv_channels=16, intermediate_size=256,
    seq_length=256, max_position_embeddings=1024, layer_norm_epsilon=1e-6, rotary_emb_base=10000,
    rotary_pct=1.0, no_bias=True, use_logn_attn=True, use_dynamic_ntk=True, bf16=False,
    num_key_value_heads=None, rope_parameters=None, rms_norm_eps=None, use_sliding_window=None,
)  # fmt: skip
FAMILIES: dict[str, Made] = {
    "internlm_7b": Made(
        dict(
            architectures=["InternLMForCausalLM"], model_type="internlm", bias=True,
            attention_bias=None, rope_parameters=None, rotary={"base": 10000, "type": "dynamic"},
        ),
        overrides=dict(**MHA, attention_bias=True),
    ),
    "internlm_20b": Made(
        dict(architectures=["InternLMForCausalLM"], model_type="internlm", bias=False),
        overrides=MHA,
    ),
    "internlm2": Made(
        dict(architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=False),
        renamed=INTERNLM2_NAMES, fused="attention.wqkv", fuse=in_groups,
    ),
    "internlm2_biases": Made(
        dict(architectures=["InternLM2ForCausalLM"], bias=True, attention_bias=None),
        overrides=dict(attention_bias=True),
        renamed=INTERNLM2_NAMES, fused="attention.wqkv", fuse=in_groups,
    ),
    "internlm3": Made(
        dict(architectures=["InternLM3ForCausalLM"], model_type="internlm3", head_dim=32),
        overrides=dict(head_dim=32),
    ),
    "internlm3_qkv_biases": Made(
        dict(architectures=["InternLM3ForCausalLM"], qkv_bias=True, bias=False),
        base="qwen2", overrides=dict(use_sliding_window=False),
    ),
    "baichuan": Made(
        dict(architectures=["BaiChuanForCausalLM"], model_type="baichuan"),
        overrides=MHA, fused="self_attn.W_pack",
    ),
    "baichuan2": Made(
        dict(architectures=["BaichuanForCausalLM"], model_type="baichuan", model_max_length=256),
        overrides=MHA, fused="self_attn.W_pack",
    ),
    "qwen": Made(
        QWEN_CONFIG, base="qwen2", overrides=dict(**MHA, use_sliding_window=False),
        renamed=QWEN_NAMES, fused="attn.c_attn",
    ),
    "qwen_wide_heads": Made(
        {**QWEN_CONFIG, "kv_channels": 24, "head_dim": None}, base="qwen2",
        overrides=dict(**MHA, head_dim=24, use_sliding_window=False),
        renamed=QWEN_NAMES, fused="attn.c_attn",
    ),
    "yi": Made(
        dict(architectures=["YiForCausalLM"], model_type="Yi"),
        renamed=(("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2")),
    ),
    "llama_by_model_type": Made(dict(architectures=None)),
}  # fmt: skip


def make_family(folder: Path, name: str, awq: bool = False, **overrides: Any) -> PreTrainedModel:
    """Write a checkpoint of FAMILIES[name] and return the model that it stands for."""
    made = FAMILIES[name]
    model = make_checkpoint(folder, made.base, **{**made.overrides, **overrides})
    if awq:
        model.load_state_dict(quantize_checkpoint(folder), strict=False)
    tensors = load_file(folder / WHOLE)
    config = json.loads((folder / "config.json").read_text())
    if name == "baichuan2":
        lm_head = tensors["lm_head.weight"]
        with torch.no_grad():
            model.lm_head.weight.copy_(lm_head / lm_head.pow(2).sum(1, keepdim=True).sqrt())
    if made.fused:
        tensors = _fused(tensors, made, config["num_key_value_heads"])
    tensors = {_renamed(key, made.renamed): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
    config |= made.config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return model


def _fused(tensors: dict[str, Tensor], made: Made, kv_heads: int) -> dict[str, Tensor]:
    """Each layer's q_proj, k_proj and v_proj in one, of whatever is stored of them."""
    result = {k: t for k, t in tensors.items() if k.split(".")[-2] not in _QKV}
    for key in tensors:
        prefix, _, kind = key.rpartition(".self_attn.q_proj.")
        if not prefix:
            continue
        parts = [tensors[f"{prefix}.self_attn.{part}.{kind}"] for part in _QKV]
        target = f"{prefix}.{made.fused}.{kind}"
        if kind in ("weight", "bias"):
            result[target] = made.fuse(*parts, kv_heads)
        else:  # AWQ's have the outputs in their columns, the 4-bit ones in words of eight
            packed = kind != "scales"
            rows = [(unpack_awq(part) if packed else part).t() for part in parts]
            columns = made.fuse(*rows, kv_heads).t().contiguous()
            result[target] = pack_awq(columns) if packed else columns
    return result


_QKV = ("q_proj", "k_proj", "v_proj")


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in names:
        key = key.replace(ours, theirs) if f".{ours}." in f".{key}." else key
    return key
