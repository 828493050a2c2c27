"""Tiny random checkpoints of every family, written by transformers, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 320  # 256 bytes, the special tokens, and ids that no token has
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # Wide enough that the likeliest token is so by far, whatever the order of additions.
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=258,
    pad_token_id=256,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# Name -> (config class, model class, what differs). The windows are shorter than the tests' texts.
_MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    ),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=24)),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        dict(use_sliding_window=True, sliding_window=20, max_window_layers=1),
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=32, tie_word_embeddings=True)),
}
FAMILIES = tuple(_MADE)


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model of `family` with random weights; `overrides` go into its config."""
    config_class, model_class, differs = _MADE[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**COMMON, **differs, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts these at 0 and 1, where a mistake would not show.
            if name.endswith("bias") or "norm" in name:
                parameter += torch.randn_like(parameter) * 0.1
    return model


def make_checkpoint(
    folder: str | Path, family: str, seed: int = 0, shard_size: str = "1GB", **overrides: Any
) -> PreTrainedModel:
    """Write a checkpoint with tokenizer into `folder` and return the model in it.

    Args:
        folder: made if it does not exist.
        family: one of FAMILIES.
        shard_size: largest shard, such as "100KB".
        overrides: config keys, such as `num_key_value_heads=4`.
    """
    model = make_model(family, seed, **overrides)
    model.save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: str | Path) -> None:
    """One token a byte, ids 0 to 255 in the bytes' order, then SPECIAL_TOKENS; ChatML template."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
    generation = {"eos_token_id": [258, 256], "pad_token_id": 256, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE (as in GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
