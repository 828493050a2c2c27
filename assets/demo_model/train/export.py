"""Writes the trained network as a Hugging Face checkpoint: plain files, small shards."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from assets.demo_model.train.conversation import END_OF_TEXT, IM_END
from assets.demo_model.train.network import Llama, Shape
from assets.demo_model.train.tokenizer import save_tokenizer

SHARD_BYTES = 15_000_000
TOTAL_BYTES = 30_000_000


def config(shape: Shape, tokenizer: Tokenizer) -> dict[str, object]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The contents of generation_config.json."""
    return {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "eos_token_id": [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)],
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Splits tensors, in order, into groups of at most ``SHARD_BYTES``."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        # A few kB per shard go to the safetensors header.
        if size + tensor.nbytes > SHARD_BYTES - 20_000:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def save_checkpoint(model: Llama, tokenizer: Tokenizer, folder: Path) -> int:
    """Writes weights (bfloat16), configuration and tokenizer; returns the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    total = sum(t.nbytes for t in tensors.values())
    if total > TOTAL_BYTES:
        raise RuntimeError(f"the weights take {total} bytes, more than {TOTAL_BYTES}")
    groups = shards(tensors)
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        places.update(dict.fromkeys(group, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    for file, content in (
        ("model.safetensors.index.json", index),
        ("config.json", config(model.shape, tokenizer)),
        ("generation_config.json", generation_config(tokenizer)),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, model.shape.max_position_embeddings)
    return total
