"""Scales and zeros of an int8 KV cache from what calibration saw, written beside the model.

One pair for K and one for V of each KV head, for all of its tokens. Without them the engine takes
a pair for each token and head, which follows the values more closely and costs 4 bytes a vector.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from backend.errors import UserError
from backend.layers.linear import kv_heads_per_rank
from backend.layers.parallel import ParallelContext
from backend.models.kv_params import BITS, FILE_NAME, LARGEST_ZERO, entry_name, stored_params
from backend.models.registry import read_model_config
from backend.models.workspace_kv import is_apart, write_entries
from backend.workspace.layout import WEIGHTS, workspace_of


def head_params(low: Tensor, high: Tensor, symmetric: bool = False) -> Tensor:
    """Scale and zero of each head: float32 [K, 2], for elements q * scale + zero, q from 0 to 255.

    Args:
        low, high: smallest and largest value of each element, [K, D].
        symmetric: the range is as wide below 0 as above.

    Raises:
        UserError: a value is beyond float16, which the cache's scales are kept in.
    """
    lowest, highest = low.float().amin(-1), high.float().amax(-1)
    if symmetric:
        highest = torch.maximum(lowest.abs(), highest.abs())
        lowest = -highest
    if not bool((torch.isfinite(lowest) & torch.isfinite(highest)).all()) or (
        float(torch.maximum(lowest.abs(), highest.abs()).max()) > LARGEST_ZERO
    ):
        raise UserError(
            "Calibration saw keys or values beyond the range of float16, which the scales of a "
            "quantized KV cache are kept in.",
            "Run this model with a KV cache of 16 bits (quant_policy 0).",
        )
    scale = ((highest - lowest) / (2**BITS - 1)).clamp(min=1e-7)
    return torch.stack((scale, lowest), dim=-1)


def write_kv_qparams(
    folder: str | Path,
    keys: list[tuple[Tensor, Tensor]],
    values: list[tuple[Tensor, Tensor]],
    *,
    symmetric: bool = False,
    num_tp: int = 1,
    overwrite: bool = False,
) -> Path:
    """Write `kv_qparams.json` into a model's folder; an engine that starts on it uses it.

    A workspace gets LMDeploy's files: see backend.models.workspace_kv. So does a folder that has
    nothing else, from which they are to be copied into one.

    Args:
        keys, values: of each layer, smallest and largest value by KV head and element: [K, D].
            Keys are those after the rotation.
        symmetric: see `head_params`.
        num_tp: ranks that the rows are parted into. The engine reads them with any other number.
        overwrite: whether to replace a file that is there.

    Returns:
        The file's path, or the folder of such files.

    Raises:
        UserError: the file is there, the ranks and the KV heads do not divide, the folder is no
            model's or cannot be written, its model's values are not those that were seen, or as
            `head_params`.
    """
    apart = is_apart(folder)
    if not apart:
        _check_values_unchanged(str(folder))
    path = Path(folder) / FILE_NAME
    stored = stored_params(folder)
    if stored is not None and not overwrite:
        raise UserError(f"{stored} is there already.", "Give --overwrite to replace it.")
    entries: dict[str, object] = {}
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        rows = torch.cat([head_params(*part, symmetric) for part in (key, value)], dim=-1)
        for rank in range(num_tp):
            count = kv_heads_per_rank(len(rows), ParallelContext(rank, num_tp))
            mine = rows.narrow(0, rank * len(rows) // num_tp, count)
            entries[entry_name(layer, rank)] = mine.tolist()
    workspace = workspace_of(folder)
    if apart or workspace is not None:
        among = Path(folder) if workspace is None else workspace / WEIGHTS
        write_entries(among, entries, overwrite)
        return among
    content = {"bits": BITS, "symmetric": symmetric, "num_tp": num_tp, **entries}
    partial = path.with_name(FILE_NAME + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _check_values_unchanged(folder: str) -> None:
    """Only 16-bit models are calibrated; is what they showed true of the model in `folder`?

    AWQ and SmoothQuant divide V's channels by scales of their own choice, and multiply the output
    projection by them, where each query head has its own KV head. Ranges of V from before would
    then cut V off, or leave it hardly any steps. K, and V of grouped heads, stay as they were.
    """
    config = read_model_config(folder)
    if config.quantization is not None and config.num_heads == config.num_kv_heads:
        raise UserError(
            f"{folder} was quantized by {config.quantization.method}, which changed the scale of "
            "its values: what calibration saw in the 16-bit model is not true of it.",
            "Leave this step out: --quant-policy 8 computes scales for each token, which is at "
            "least as accurate.",
            field="model",
        )
