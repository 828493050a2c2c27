"""Which kernel and which tiles a product takes: a measured table for each GPU, else a rule.

Tables lie in `tuned/`, one for each name of a GPU, written by `python -m tests.bench.kernels_w4`.
Nothing is tried out at run time. The number of tokens counts through its bucket only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TUNED = Path(__file__).parent / "tuned"
# Upper bounds of the buckets of tokens, the last two for Hopper's kernel only. Beyond the last:
# unpack the weight, then cuBLAS.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512)
HOPPER_BUCKETS = (*BUCKETS, 1024, 2048)


@dataclass(frozen=True, slots=True)
class MmaConfig:
    """`w4_mma_kernel`: for few tokens."""

    tokens: int  # a program's
    blocks: int = 1  # of 16 rows of the weight
    warps: int = 8
    ahead: int = 4


@dataclass(frozen=True, slots=True)
class WideConfig:
    """`w4_wide_kernel`: for two to eight tokens."""

    blocks: int = 1  # of 16 rows of the weight
    keep: bool = False  # x in registers, by one program a multiprocessor that stays
    tokens: int = 8
    warps: int = 8
    ahead: int = 4


@dataclass(frozen=True, slots=True)
class DotConfig:
    """`w4_dot_kernel`: for a batch."""

    tokens: int
    rows: int = 128
    splits: int = 1
    scale_weights: bool = False
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class WgmmaConfig:
    """`w4_wgmma_kernel`: for a batch, on Hopper only."""

    tokens: int
    rows: int = 128
    parts: int = 2  # a tile is cut into at most, or one more
    warps: int = 8
    stages: int = 3
    programs: int = 1  # a multiprocessor


W4Config = MmaConfig | WideConfig | DotConfig | WgmmaConfig
KINDS: dict[str, type[W4Config]] = {
    "mma": MmaConfig,
    "wide": WideConfig,
    "dot": DotConfig,
    "wgmma": WgmmaConfig,
}


class Division(NamedTuple):
    """How tiles of a result are dealt out to programs."""

    programs: int
    full: int  # whole tiles for each program
    units: int  # column tiles a program has of those that do not go round; 0: there are none
    rest: int  # tiles that do not go round


def division(tiles: int, column_tiles: int, most: int, parts: int) -> Division:
    """Of `tiles` among at most `most` programs, no part below a `parts`-th of a tile."""
    full, rest = divmod(tiles, most)
    if not rest:
        return Division(most, full, 0, 0)
    units = max(-(-rest * column_tiles // most), -(-column_tiles // parts))
    return Division(most if full else -(-rest * column_tiles // units), full, units, rest)


def bucket_of(tokens: int, hopper: bool = False) -> int | None:
    """The bucket of a number of tokens; None beyond the last."""
    buckets = HOPPER_BUCKETS if hopper else BUCKETS
    return next((bound for bound in buckets if tokens <= bound), None)


@cache
def w4_config(
    gpu: str, sms: int, op: str, rows: int, columns: int, bucket: int, hopper: bool = False
) -> W4Config:
    """What serves a weight [rows, columns] and a bucket of tokens on a GPU of `sms` processors.

    hopper: what only such GPUs have may be used.
    """
    entry = _table(gpu).get(op, {}).get(f"{rows}x{columns}", {}).get(str(bucket))
    if entry is not None and entry["kernel"] == "wgmma" and not hopper:
        entry = None
    if entry is None:
        return default_config(sms, rows, columns, bucket, hopper)
    return KINDS[entry["kernel"]](**{k: v for k, v in entry.items() if k != "kernel"})


def default_config(
    sms: int, rows: int, columns: int, bucket: int, hopper: bool = False
) -> W4Config:
    """The rule for what no table knows: what was fastest on an H200 in shapes of 7B models."""
    if 1 < bucket <= 8 and columns <= 4096:
        # What x takes of the registers is as much as there is. Narrow results fill no program.
        return WideConfig(2, True) if rows > columns else WideConfig()
    if bucket <= 8:
        # With more tokens x comes slowly: each reading of it then serves more rows.
        return MmaConfig(8, 1 if bucket == 1 else 2, 8, 4 if rows <= columns else 2)
    if hopper and (bucket >= 256 or (bucket == 128 and rows > columns)):
        # The larger tile where it still gives most of the processors one.
        large = -(-rows // 128) * (bucket // 256)
        if large * 10 >= sms * 7:
            return WgmmaConfig(256, parts=1 if large * 2 > 3 * sms else 2)
        return WgmmaConfig(128, stages=6)
    tokens = min(bucket, 128)
    tile_rows = 128
    programs = -(-rows // tile_rows) * -(-bucket // tokens)
    splits = 1
    # Up to three programs a multiprocessor, each with at least four tiles of columns.
    while splits < 8 and programs * splits * 2 <= 3 * sms and columns >= 1024 * splits:
        splits *= 2
    scaled = tokens >= 128 or (tokens == 64 and rows > columns)
    return DotConfig(tokens, tile_rows, splits, scaled, 8 if tokens == 128 else 4)


def invariant_config(group_size: int) -> DotConfig:
    """The one form and tile that batch_invariant asks for, whatever the tokens and the GPU."""
    return DotConfig(32, 128, 1, group_size != 128)


@cache
def _table(gpu: str) -> dict[str, Any]:
    path = TUNED / f"{gpu.lower().replace(' ', '_')}.json"
    if not path.is_file():
        return {}
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


@cache
def gpu_name(index: int) -> str:
    """The name that tables go by."""
    return torch.cuda.get_device_name(index)
