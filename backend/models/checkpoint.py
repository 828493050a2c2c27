"""The safetensors files of a checkpoint, their headers checked before any weight is read.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from backend.errors import UserError
from backend.models.model_config import read_json_object
from backend.workspace.layout import weights_folder

MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
MAX_INDEX_BYTES = 256 << 20
MAX_SHARDS = 10_000
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
REFUSED = {
    ".bin": "a file of Python objects, which can run code when it is opened",
    ".pt": "a file of Python objects, which can run code when it is opened",
    ".pth": "a file of Python objects, which can run code when it is opened",
    ".gguf": "a llama.cpp file, in a format of its own",
}
DOWNLOAD_AGAIN = "Download the model again."


Runs = tuple[tuple[int, int], ...]  # (first, how many), one run after another


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor, or of a part of one (see backend.models.layout).

    Attributes:
        path: of the file that holds it.
        dtype: as safetensors spells it, such as BF16.
        shape: of the part, if it is one.
        name: of the tensor in the file.
        runs: of a part, what it takes of the stored tensor along `dim`; None takes all.
        dim: see runs.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    name: str
    runs: Runs | None = None
    dim: int = 0


def read_tensor(
    file: safe_open, info: TensorInfo, source: tuple[slice, ...] | None = None
) -> Tensor:
    """A tensor of an open file, or `source` of it: one slice with both ends a dimension."""
    stored = file.get_slice(info.name)
    source = source or tuple(slice(0, size) for size in info.shape)
    if info.runs is None:
        return stored[source]
    wanted, dim, at = source[info.dim], info.dim, 0
    pieces = []
    for start, length in info.runs:
        first, last = max(wanted.start - at, 0), min(wanted.stop - at, length)
        if first <= last:  # also what is empty has a shape
            here = slice(start + first, start + last)
            pieces.append(stored[(*source[:dim], here, *source[dim + 1 :])])
        at += length
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def read_checkpoint(folder: str) -> dict[str, TensorInfo]:
    """All tensors of the checkpoint (or of the workspace) in `folder`, by name.

    Raises:
        UserError: if files are missing, damaged, or not safetensors.
    """
    folder = str(weights_folder(folder))
    index_path = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.lexists(index_path):
        path = os.path.join(folder, "model.safetensors")
        if not os.path.lexists(path):
            raise _no_weights(folder)
        return read_header(path)
    weight_map = read_json_object(index_path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path} has no weight_map.", DOWNLOAD_AGAIN)
    for shard in weight_map.values():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise UserError(
                f"{index_path} names the shard {shard!r:.80}, which is not the name of a "
                ".safetensors file in this folder.",
                "Do not trust this checkpoint; download it from its publisher.",
            )
    tensors: dict[str, TensorInfo] = {}
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise UserError(f"{index_path} names {len(shards)} shards; at most {MAX_SHARDS} are read.")
    for shard in shards:
        for name, info in read_header(os.path.join(folder, shard)).items():
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{shard} holds the tensor {name:.200}, which the index places in "
                    f"{weight_map.get(name, 'no shard')}.",
                    f"Was a shard renamed? {DOWNLOAD_AGAIN}",
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{shard} does not hold the tensor {name:.200}, which the index places there.",
                f"Was a shard renamed? {DOWNLOAD_AGAIN}",
            )
    return tensors


def _no_weights(folder: str) -> UserError:
    for name in sorted(os.listdir(folder)):
        reason = REFUSED.get(os.path.splitext(name)[1])
        if reason is not None:
            return UserError(
                f"The weights in {folder} are refused: {name} is {reason}.",
                "Use a checkpoint in safetensors format, which most publishers offer"
                + (f", or import this one: python app.py import {folder} NEW_FOLDER"
                   if name.endswith(".bin") else "."),
                field="model",
            )
    shards = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    if shards:
        return UserError(
            f"{folder} holds {min(shards)} but neither model.safetensors nor "
            "model.safetensors.index.json, which says what the shards hold.",
            DOWNLOAD_AGAIN,
            field="model",
        )
    return UserError(
        f"The folder {folder} has no weights.",
        "It needs model.safetensors, or shards with model.safetensors.index.json.",
        field="model",
    )


def read_header(path: str) -> dict[str, TensorInfo]:
    """The tensors of one file, after checking that the file is whole.

    Raises:
        UserError: if it is missing, truncated or damaged.
    """
    name = os.path.basename(path)
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"The shard {path} is missing.", DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
        raise UserError(f"{path} is not a regular file.", DOWNLOAD_AGAIN)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if status.st_size >= 8 and length > MAX_HEADER_BYTES:
                raise UserError(
                    f"{name} is no safetensors file: its header would have {length} bytes.",
                    DOWNLOAD_AGAIN,
                )
            if status.st_size < 8 + length:
                raise _truncated(name, status.st_size, 8 + length)
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} has a damaged header: {error}.", DOWNLOAD_AGAIN) from error
    if not isinstance(header, dict):
        raise UserError(f"{name} has a damaged header: no JSON object.", DOWNLOAD_AGAIN)
    header.pop("__metadata__", None)
    end = 8 + length
    tensors = {}
    for tensor, entry in header.items():
        info, last = _entry(path, tensor, entry)
        tensors[tensor] = info
        end = max(end, 8 + length + last)
    if status.st_size < end:
        raise _truncated(name, status.st_size, end)
    return tensors


def _entry(path: str, tensor: str, entry: Any) -> tuple[TensorInfo, int]:
    """(a header's entry, where its data end)."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [first, last, *shape]
        if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("not whole numbers")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{os.path.basename(path)} has a damaged header: bad entry for {tensor:.200}.",
            DOWNLOAD_AGAIN,
        ) from error
    return TensorInfo(path, dtype, tuple(shape), tensor), last


def _truncated(name: str, actual: int, expected: int) -> UserError:
    return UserError(
        f"{name} is truncated: it has {actual} bytes and should have {expected}.", DOWNLOAD_AGAIN
    )
