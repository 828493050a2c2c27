"""kv_qparams.json in a model's folder: scales and zeros of K and V that were measured beforehand.

    {"bits": 8, "symmetric": false, "num_tp": 1,
     "layers.0.past_kv_scale.0.weight": [[k_scale, k_zero, v_scale, v_zero], ...], ...}

An entry a layer and rank, a row a KV head of that rank; an element is q * scale + zero, q from 0 to
255. The entries have the names of LMDeploy's files. JSON, because other engines take every
.safetensors file in a model's folder for weights. A workspace has a file for each entry: see
workspace_kv.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from backend.errors import UserError
from backend.layers.linear import kv_heads_per_rank
from backend.layers.parallel import ParallelContext
from backend.models.model_config import ModelConfig, read_json_object
from backend.models.workspace_kv import kv_files, read_entries
from backend.workspace.layout import workspace_of

FILE_NAME = "kv_qparams.json"
BITS = 8  # that the scales are of; with fewer, the same range has fewer steps
MAX_BYTES = 64 << 20
# The kernels read them in float16, which goes so far.
LARGEST_ZERO = 65504.0
LARGEST_SCALE = 2 * LARGEST_ZERO / (2**BITS - 1)


def entry_name(layer: int, rank: int) -> str:
    """The name under which a layer's rows for a rank are stored."""
    return f"layers.{layer}.past_kv_scale.{rank}.weight"


def read_kv_params(
    folder: str, config: ModelConfig, parallel: ParallelContext
) -> Tensor | None:
    """Scales and zeros of this rank's KV heads: float32 [layers, 2 (K, V), heads, 2 (scale, zero)].

    None if the folder has no such file. It may have been written for another number of ranks.

    Raises:
        UserError: the file is damaged or of another model.
    """
    raw = _entries(folder, config.num_kv_heads)
    if raw is None:
        return None
    path = stored_params(folder)
    ranks = raw.get("num_tp")
    if type(ranks) is not int or not 1 <= ranks <= 1024 or raw.get("bits") != BITS:
        raise _damaged(path, f"it says num_tp {ranks!r:.40} and bits {raw.get('bits')!r:.40}")
    layers = []
    for layer in range(config.num_layers):
        rows: list[Any] = []
        for rank in range(ranks):
            entry = raw.get(entry_name(layer, rank))
            if not isinstance(entry, list) or not all(map(_is_row, entry)):
                raise _damaged(path, f"{entry_name(layer, rank)} is no list of scales and zeros")
            rows += entry
        # Ranks that outnumber the heads have them in common.
        copies = max(1, ranks // config.num_kv_heads)
        if len(rows) != copies * config.num_kv_heads:
            raise _damaged(path, f"layer {layer} has {len(rows)} heads in it")
        layers.append(rows[::copies])
    if entry_name(config.num_layers, 0) in raw:
        raise _damaged(path, f"it has more than {config.num_layers} layers")
    whole = torch.tensor(layers, dtype=torch.float32)  # [layers, KV heads, 4]
    first = parallel.rank * config.num_kv_heads // parallel.world_size
    mine = whole.narrow(1, first, kv_heads_per_rank(config.num_kv_heads, parallel))
    return mine.unflatten(-1, (2, 2)).transpose(1, 2).contiguous()


def stored_params(folder: str | os.PathLike[str]) -> str | None:
    """Path of the file that a model's folder has, or of a workspace's first; None without."""
    root = workspace_of(folder)
    if root is not None:
        return next(map(str, kv_files(root)), None)
    path = os.path.join(folder, FILE_NAME)
    return path if os.path.lexists(path) else None


def _entries(folder: str, num_kv_heads: int) -> dict[str, Any] | None:
    root = workspace_of(folder)
    if root is not None:
        found = read_entries(root, num_kv_heads)
        return None if found is None else {"bits": BITS, **found}
    path = stored_params(folder)
    return None if path is None else read_json_object(path, MAX_BYTES)


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4:
        return False
    if not all(type(n) in (int, float) and math.isfinite(n) for n in row):
        return False
    if max(map(abs, row)) > LARGEST_ZERO:
        return False
    return 0 < row[0] <= LARGEST_SCALE and 0 < row[2] <= LARGEST_SCALE


def _damaged(path: str | None, what: str) -> UserError:
    return UserError(
        f"{path} does not fit this model: {what}.",
        "Make it again with `lite kv_qparams`, or delete it: scales are then computed by token.",
    )
