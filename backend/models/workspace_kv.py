"""Scales and zeros of K and V in a workspace: layers.N.past_kv_scale.R.weight, a file for each.

LMDeploy's names, and what `backend.models.kv_params` has in JSON: a row [k_scale, k_zero, v_scale,
v_zero] for each KV head of rank R. Each is a safetensors file with the one tensor of its own name,
float32 [KV heads, 4]. The manifest does not list them, so they may be copied in and taken away.
LMDeploy's own, which people copy in too, have no header: float32 k_scale, k_zero, v_scale, v_zero
(16 bytes), or the two scales (8 bytes, symmetric), for all heads of the rank, and a zero that
belongs to q = 128.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from backend.errors import UserError
from backend.workspace.layout import WEIGHTS

log = logging.getLogger(__name__)
FILE = re.compile(r"layers\.(\d+)\.past_kv_scale\.(\d+)\.weight")
LMDEPLOY = {8: "<2f", 16: "<4f"}  # bytes -> numbers
MIDDLE = 128  # their q for a zero
MAX_BYTES = 1 << 20


def kv_files(root: Path) -> list[Path]:
    """Those that the workspace `root` has."""
    return _files_in(root / WEIGHTS)


def is_apart(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is there, and has nothing but such files: they are to be copied from it."""
    path = Path(folder)
    return path.is_dir() and all(FILE.fullmatch(entry.name) for entry in path.iterdir())


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if FILE.fullmatch(path.name))


def read_entries(root: Path, num_kv_heads: int) -> dict[str, Any] | None:
    """The files' contents by their names, and num_tp; None if there are none.

    Args:
        num_kv_heads: of the whole model.

    Raises:
        UserError: one is damaged.
    """
    files = kv_files(root)
    if not files:
        return None
    ranks = 1 + max(int(found[2]) for path in files if (found := FILE.fullmatch(path.name)))
    entries: dict[str, Any] = {}
    coarse = 0
    for path in files:
        try:
            size = path.stat().st_size
            if not path.is_file() or size > MAX_BYTES:
                raise ValueError("not a regular file, or too large")
            content = path.read_bytes()
            if size in LMDEPLOY:
                coarse += 1
                row = _lmdeploy_row(struct.unpack(LMDEPLOY[size], content))
                entries[path.name] = [row] * max(1, num_kv_heads // ranks)
                continue
            entries[path.name] = load(content)[path.name].float().tolist()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is damaged: {error}.", "Make it again with `lite kv_qparams`."
            ) from error
    if coarse:
        log.warning(
            "%d of the KV scales in %s are LMDeploy's, one for all heads of a layer, which is "
            "coarse: `lite kv_qparams` writes one a head, and without any they follow each token.",
            coarse, root,
        )  # fmt: skip
    return {**entries, "num_tp": ranks}


def _lmdeploy_row(numbers: tuple[float, ...]) -> list[float]:
    """A row of ours that means the same. Whoever gets it checks that it is finite and so on."""
    k_scale, k_zero, v_scale, v_zero = (
        numbers if len(numbers) == 4 else (numbers[0], 0.0, numbers[1], 0.0)
    )
    return [k_scale, k_zero - MIDDLE * k_scale, v_scale, v_zero - MIDDLE * v_scale]


def write_entries(folder: Path, entries: Mapping[str, Any], overwrite: bool) -> None:
    """Write a file for each entry into `folder`; all that were there are replaced.

    Raises:
        UserError: there are some and not `overwrite`, or they cannot be written.
    """
    old = _files_in(folder)
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
