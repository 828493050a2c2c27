"""Scales and zeros of K and V in a workspace: layers.N.past_kv_scale.R.weight, a file for each.

LMDeploy's names, and what `backend.models.kv_params` has in JSON: a row [k_scale, k_zero, v_scale,
v_zero] for each KV head of rank R. Each is a safetensors file with the one tensor of its own name,
float32 [KV heads, 4]. The manifest does not list them, so they may be copied in and taken away.
(LMDeploy's own have 8 or 16 bytes: one row for all heads, without a header.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from backend.errors import UserError
from backend.workspace.layout import WEIGHTS

FILE = re.compile(r"layers\.(\d+)\.past_kv_scale\.(\d+)\.weight")
LMDEPLOY_SIZES = (8, 16)  # bytes
MAX_BYTES = 1 << 20


def kv_files(root: Path) -> list[Path]:
    """Those that the workspace `root` has."""
    return sorted(path for path in (root / WEIGHTS).iterdir() if FILE.fullmatch(path.name))


def read_entries(root: Path) -> dict[str, Any] | None:
    """The files' contents by their names, and num_tp; None if there are none.

    Raises:
        UserError: one is damaged, or LMDeploy's own.
    """
    files = kv_files(root)
    if not files:
        return None
    entries: dict[str, Any] = {}
    for path in files:
        try:
            size = path.stat().st_size
            if not path.is_file() or size > MAX_BYTES:
                raise ValueError("not a regular file, or too large")
            if size in LMDEPLOY_SIZES:
                raise UserError(
                    f"{path} is LMDeploy's: one scale for all heads, which is too coarse.",
                    "Make it again with `lite kv_qparams`, or delete it.",
                )
            entries[path.name] = load(path.read_bytes())[path.name].float().tolist()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is damaged: {error}.", "Make it again with `lite kv_qparams`."
            ) from error
    ranks = 1 + max(int(found[2]) for path in files if (found := FILE.fullmatch(path.name)))
    return {**entries, "num_tp": ranks}


def write_entries(root: Path, entries: Mapping[str, Any], overwrite: bool) -> Path:
    """Write a file for each entry; all that were there are replaced.

    Returns:
        The folder that they are in.

    Raises:
        UserError: there are some and not `overwrite`, or they cannot be written.
    """
    folder = root / WEIGHTS
    old = kv_files(root)
    if old and not overwrite:
        raise UserError(f"{old[0]} is there already.", "Give --overwrite to replace it.")
    drafts = []
    try:
        for name, rows in entries.items():
            draft = folder / f".{name}.partial"
            drafts.append(draft)
            with open(draft, "wb") as file:
                file.write(save({name: torch.tensor(rows, dtype=torch.float32)}))
                file.flush()
                os.fsync(file.fileno())
        for path in old:
            path.unlink()
        for name, draft in zip(entries, drafts):
            os.replace(draft, folder / name)
    except OSError as error:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    return folder
