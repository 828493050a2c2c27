"""A second reader of AutoAWQ's checkpoints, written from the format alone.

Nothing of the product is used: safetensors and JSON by their own documents, the nibbles by numpy.
It puts dequantized weights into transformers' float model of the same config, so that logits can
be compared with those of the product's own loader.

The format ("gemm"): a linear layer [out, in] has qweight int32 [in, out / 8], qzeros int32
[in / g, out / 8], scales float16 [in / g, out]. Bits 4i to 4i + 3 of word c hold the output
8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; a weight is (q - zero) * scale.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def nibbles_of(words: np.ndarray) -> np.ndarray:
    """int32 [rows, n] as uint8 [rows, 8 n]."""
    words = words.view(np.uint32)
    out = np.zeros((words.shape[0], words.shape[1] * 8), np.uint8)
    for i, place in enumerate(PLACES):
        out[:, place::8] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return out


def weight_of(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [out, in]."""
    group = qweight.shape[0] // scales.shape[0]
    q = nibbles_of(qweight).astype(np.float32)
    zeros = np.repeat(nibbles_of(qzeros).astype(np.float32), group, axis=0)
    return ((q - zeros) * np.repeat(scales.astype(np.float32), group, axis=0)).T.copy()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the float model that the checkpoint stands for, in float32."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    else:
        weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    weights: dict[str, torch.Tensor] = {}
    packed: dict[str, dict[str, np.ndarray]] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in load_file(folder / shard).items():
            assert weight_map[name] == shard
            module, _, kind = name.rpartition(".")
            if kind in ("qweight", "qzeros", "scales"):
                packed.setdefault(module, {})[kind] = tensor.numpy()
            else:
                weights[name] = tensor.float()
    for module, parts in packed.items():
        weights[f"{module}.weight"] = torch.from_numpy(weight_of(**parts))
    return weights


def read_model(folder: Path) -> PreTrainedModel:
    """transformers' own float32 model with the checkpoint's weights."""
    config = AutoConfig.from_pretrained(folder)
    assert config.quantization_config["quant_method"] == "awq"
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(read_weights(folder), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    assert not missing or config.tie_word_embeddings
    model.tie_weights()
    return model


def read_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits float32 [S, vocab] of ids int64 [S]."""
    with torch.inference_mode():
        return read_model(folder)(ids[None]).logits[0]
