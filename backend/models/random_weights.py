"""Checkpoints of real shapes with random weights: to measure speed and memory without a download.

A folder in Hugging Face layout that other engines load too. Weights are never zeros, and 4-bit
ones use all 16 values: a GPU computes zeros faster than real data, with less power.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import UserError
from backend.layers.linear_method import WeightSlot
from backend.layers.parallel import ParallelContext
from backend.models.loader import create_shell
from backend.models.model_config import ConfigFields
from backend.models.registry import parse_config
from kernels.packing import pack_awq

SHARD_BYTES = 4 << 30
DESCRIPTION = "random_weights.json"  # what the folder was made from
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SIGMA = 0.02  # of 16-bit weights, as models of these families are initialised
# Of q - zero times scale, q from 0 to 15 and zero near 8, this gives the same sigma.
AWQ_SCALE = 0.0045
AWQ_GROUP_SIZE = 128


def _shape(
    architecture: str,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    heads: tuple[int, int],
    **others: Any,
) -> dict[str, Any]:
    """A config.json; `heads` are those of the queries and of the keys and values."""
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_act": "silu",
        "initializer_range": SIGMA,
        "tie_word_embeddings": False,
        "use_cache": True,
        **others,
    }


_LLAMA2 = dict(
    max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
    bos_token_id=1, eos_token_id=2,
)
_LLAMA3 = dict(
    max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0,
    bos_token_id=128000, eos_token_id=128001,
)
_QWEN = dict(
    max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6,
    bos_token_id=151643, eos_token_id=151645, use_sliding_window=False,
)
_QWEN3 = {**_QWEN, "max_position_embeddings": 40960, "head_dim": 128}
_TINY = dict(
    max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
    bos_token_id=None, eos_token_id=258,
)
# The published models' own config.json values.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape("LlamaForCausalLM", 320, 128, 256, 2, (4, 2), **_TINY),
    "llama-2-7b": _shape("LlamaForCausalLM", 32000, 4096, 11008, 32, (32, 32), **_LLAMA2),
    "llama-2-13b": _shape("LlamaForCausalLM", 32000, 5120, 13824, 40, (40, 40), **_LLAMA2),
    "llama-2-70b": _shape("LlamaForCausalLM", 32000, 8192, 28672, 80, (64, 8), **_LLAMA2),
    "llama-3-8b": _shape("LlamaForCausalLM", 128256, 4096, 14336, 32, (32, 8), **_LLAMA3),
    "qwen2.5-0.5b": _shape(
        "Qwen2ForCausalLM", 151936, 896, 4864, 24, (14, 2), **{**_QWEN, "tie_word_embeddings": True}
    ),
    "qwen2.5-7b": _shape("Qwen2ForCausalLM", 152064, 3584, 18944, 28, (28, 4), **_QWEN),
    "qwen3-8b": _shape("Qwen3ForCausalLM", 151936, 4096, 12288, 36, (32, 8), **_QWEN3),
}


def write_random_checkpoint(
    folder: str,
    shape: str,
    quantization: str | None = None,
    dtype: str = "float16",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    tokenizer_folder: str | None = None,
) -> None:
    """Write a checkpoint into `folder`; if it holds the very same already, leave its weights alone.

    It appears under its name only when it is whole. Drawn on the GPU when there is one: there, the
    same seed gives other numbers than on a CPU.

    Args:
        folder: made if it does not exist; otherwise empty, or written by the same call before.
        shape: one of SHAPES.
        quantization: "awq" for 4 bits in groups of 128, or None.
        dtype: float32, bfloat16 or float16, of all that is not 4 bits.
        seed: of the random numbers.
        progress: called with (bytes written, bytes in all) after each tensor.
        tokenizer_folder: a model's folder whose tokenizer is copied; None copies none.

    Raises:
        UserError: the shape is unknown, the folder holds something else, or cannot be written.
    """
    if shape not in SHAPES:
        raise UserError(
            f"The shape {shape!r:.80} is not known.", f"Shapes: {', '.join(SHAPES)}."
        )
    made_from = {"shape": shape, "quantization": quantization, "dtype": dtype, "seed": seed}
    folder = os.path.abspath(folder)
    try:
        if not _holds(folder, made_from):
            _write(folder, made_from, _config(shape, quantization, dtype), seed, progress)
        if tokenizer_folder is not None:
            for name in TOKENIZER_FILES:
                if os.path.exists(os.path.join(tokenizer_folder, name)):
                    shutil.copyfile(
                        os.path.join(tokenizer_folder, name), os.path.join(folder, name)
                    )
    except OSError as error:
        raise UserError(
            f"The checkpoint {folder} cannot be written: {error.strerror}.",
            "Check the path and the space on its disk.",
        ) from error


def _holds(folder: str, made_from: dict[str, Any]) -> bool:
    """Whether the folder was made from the same; False if it is missing or empty."""
    if not os.path.exists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return False
    try:
        with open(os.path.join(folder, DESCRIPTION), encoding="utf-8") as file:
            same = json.load(file) == made_from
    except (OSError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"{folder} exists and holds something else than the random weights asked for.",
            "Choose another folder, or delete this one.",
        )
    return True


def _config(shape: str, quantization: str | None, dtype: str) -> dict[str, Any]:
    """config.json as a dict."""
    config = {**SHAPES[shape], "torch_dtype": dtype}
    if quantization is not None:
        config["quantization_config"] = {
            "quant_method": quantization,
            "bits": 4,
            "group_size": AWQ_GROUP_SIZE,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    return config


def _write(
    folder: str,
    made_from: dict[str, Any],
    config: dict[str, Any],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    model_config = parse_config(ConfigFields(config))
    slots = create_shell(model_config, ParallelContext()).weight_slots()
    floats: torch.dtype = getattr(torch, model_config.dtype)
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    os.makedirs(partial)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    shards = list(_shards(slots, floats))
    total = sum(_nbytes(slots[name], floats) for names in shards for name in names)
    written = 0
    weight_map = {}
    for index, names in enumerate(shards, 1):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = draw(name, slots[name], floats, generator).cpu()
            weight_map[name] = file_name
            written += tensors[name].nbytes
            if progress is not None:
                progress(written, total)
        save_file(tensors, os.path.join(partial, file_name), metadata={"format": "pt"})
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(partial, "model.safetensors.index.json", index_json)
    _write_json(partial, "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(partial, "generation_config.json", {**ends, "do_sample": False})
    _write_json(partial, DESCRIPTION, made_from)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if os.path.isdir(folder):
        os.rmdir(folder)  # empty, as was seen; otherwise this raises
    os.rename(partial, folder)


def draw(
    name: str, slot: WeightSlot, floats: torch.dtype, generator: torch.Generator
) -> Tensor:
    """A random tensor of a checkpoint, on the generator's device.

    Args:
        name: as the checkpoint calls it; its end says what the tensor is.
        slot: tells the shape.
        floats: dtype of what is not quantized.
        generator: of the random numbers.
    """
    device = generator.device
    if name.endswith(".qweight"):  # whole words: every nibble from 0 to 15, equally often
        words = torch.empty(slot.shape, dtype=torch.int32, device=device)
        return words.random_(-(2**31), 2**31, generator=generator)
    if name.endswith(".qzeros"):
        # 7 or 8, so that weights are 0 on average: else every layer adds up what all inputs have in
        # common, and 32 layers of a 7B shape leave float16's range.
        groups, words_a_row = slot.shape
        zeros = torch.randint(7, 9, (groups, words_a_row * 8), generator=generator, device=device)
        return pack_awq(zeros.to(torch.uint8))
    normal = torch.empty(slot.shape, device=device).normal_(generator=generator)
    if name.endswith(".scales"):
        return (AWQ_SCALE * (1 + 0.1 * normal)).clamp(min=AWQ_SCALE / 4).half()
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    return normal.mul_(SIGMA).add_(mean).to(floats)


def _shards(slots: dict[str, WeightSlot], floats: torch.dtype) -> Iterator[list[str]]:
    """Names in order, each run of them at most SHARD_BYTES."""
    names: list[str] = []
    size = 0
    for name, slot in slots.items():
        more = _nbytes(slot, floats)
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _nbytes(slot: WeightSlot, floats: torch.dtype) -> int:
    # The shell's unquantized tensors are float32; the others have the checkpoint's own dtype.
    stored = slot.destination.dtype
    itemsize = floats.itemsize if stored == torch.float32 else stored.itemsize
    return slot.destination.numel() * itemsize


def _write_json(folder: str, name: str, value: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
