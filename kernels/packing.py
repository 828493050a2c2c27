"""Layouts of quantized weights: what a checkpoint stores and what the kernels read, both ways.

W4 of the kernels, made so that a tensor core's register fragments are contiguous in memory:
a matrix [N, K] of 4-bit numbers is cut into tiles of 64 rows by 128 columns (rows and columns
padded), each stored as one run of 4 KB. Row n of a tile is 16 int32 words. Word 4c + u (c, u from
0 to 3), nibble (2 * s + h) + 4 * p (s, h, p from 0 to 1; nibble 0 is the lowest) holds column
32u + 16s + 8h + 2c + p of the tile: that is the order in which lane c of four feeds the A operand
of mma.m16n8k16 and wgmma, so unpacking needs no exchange between lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 64
TILE_COLUMNS = 128
WORDS = 16  # int32 words a row of a tile


@dataclass(slots=True)
class W4Weight:
    """Weights [out_features, in_features] of 4 bits: (q - zero) * scale, q and zero from 0 to 15.

    Padding rows and columns hold q = zero = 0 and scale = 0.
    """

    qweight: Tensor  # int32 [N / 64, K / 128, 64, 16], N and K rounded up to whole tiles
    # int32 [N / 64, K / group_size, 64]: float16 scale in the low half, float16 (1024 + zero) in
    # the high half
    scale_zero: Tensor
    group_size: int  # 32, 64 or 128 inputs
    out_features: int
    in_features: int


@dataclass(slots=True)
class W8Weight:
    """Weights [out_features, in_features] of 8 bits: qweight * scales[:, None]."""

    qweight: Tensor  # int8 [out_features, in_features]
    scales: Tensor  # float32 [out_features]


def _column_order() -> Tensor:
    """Column of each (word, nibble) of a tile's row: int64 [16 * 8]."""
    columns = torch.empty(WORDS, 8, dtype=torch.int64)
    for c in range(4):
        for u in range(4):
            for s in range(2):
                for h in range(2):
                    for p in range(2):
                        columns[4 * c + u, 2 * s + h + 4 * p] = 32 * u + 16 * s + 8 * h + 2 * c + p
    return columns.flatten()


def _pack_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [..., 8], the lowest first, to int32 [...]."""
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=nibbles.device)
    for i in range(8):
        words |= nibbles[..., i].to(torch.int32) << (4 * i)
    return words


def _unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [...] to uint8 [..., 8], the lowest first."""
    return torch.stack([((words >> (4 * i)) & 0xF).to(torch.uint8) for i in range(8)], dim=-1)


def pack_w4(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> W4Weight:
    """q uint8 [N, K], scales float [N, K / group], zeros uint8 [N, K / group] for the kernels.

    Raises:
        ValueError: K is no multiple of group_size, or group_size is not 32, 64 or 128.
    """
    rows, columns = q.shape
    if group_size not in (32, 64, 128) or columns % group_size:
        raise ValueError(f"{columns} columns in groups of {group_size}")
    row_tiles, column_tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    padded = q.new_zeros(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    padded[:rows, :columns] = q
    tiles = padded.view(row_tiles, TILE_ROWS, column_tiles, TILE_COLUMNS).transpose(1, 2)
    ordered = tiles[..., _column_order().to(q.device)]
    qweight = _pack_nibbles(ordered.reshape(*tiles.shape[:3], WORDS, 8))
    groups = column_tiles * TILE_COLUMNS // group_size
    halves = torch.zeros(
        row_tiles * TILE_ROWS, groups, 2, dtype=torch.float16, device=q.device
    )
    halves[..., 1] = 1024
    halves[:rows, : columns // group_size, 0] = scales.to(torch.float16)
    halves[:rows, : columns // group_size, 1] = zeros.to(torch.float16) + 1024
    words = halves.view(torch.int32).squeeze(-1)
    scale_zero = words.view(row_tiles, TILE_ROWS, groups).transpose(1, 2).contiguous()
    return W4Weight(qweight.contiguous(), scale_zero, group_size, rows, columns)


def unpack_w4(weight: W4Weight) -> tuple[Tensor, Tensor, Tensor]:
    """(q uint8 [N, K], scales float16 [N, K / group], zeros uint8 [N, K / group])."""
    rows, columns = weight.out_features, weight.in_features
    ordered = _unpack_nibbles(weight.qweight).flatten(-2)  # [row tiles, column tiles, 64, 128]
    tiles = torch.empty_like(ordered)
    tiles[..., _column_order().to(ordered.device)] = ordered
    q = tiles.transpose(1, 2).reshape(-1, tiles.shape[1] * TILE_COLUMNS)[:rows, :columns]
    words = weight.scale_zero.transpose(1, 2).contiguous()  # [row tiles, 64, groups]
    halves = words.unsqueeze(-1).view(torch.float16).flatten(0, 1)  # [N, groups, 2]
    halves = halves[:rows, : columns // weight.group_size]
    return q.contiguous(), halves[..., 0].contiguous(), (halves[..., 1] - 1024).to(torch.uint8)


def dequantize_w4(weight: W4Weight) -> Tensor:
    """(q - zero) * scale as float32 [out_features, in_features]."""
    q, scales, zeros = unpack_w4(weight)
    groups = q.view(q.shape[0], -1, weight.group_size).float()
    return ((groups - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(1)


# AutoAWQ's "gemm" layout: [in_features, out_features / 8], each int32 holding eight columns in
# this order, the lowest nibble first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_awq(packed: Tensor) -> Tensor:
    """A checkpoint's qweight or qzeros int32 [R, N / 8] as uint8 [R, N]."""
    nibbles = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    nibbles[..., list(AWQ_ORDER)] = _unpack_nibbles(packed)
    return nibbles.flatten(-2)


def pack_awq(q: Tensor) -> Tensor:
    """uint8 [R, N] as a checkpoint stores it, int32 [R, N / 8].

    Raises:
        ValueError: N is no multiple of 8.
    """
    if q.shape[1] % 8:
        raise ValueError(f"{q.shape[1]} columns, which is no multiple of 8")
    return _pack_nibbles(q.view(q.shape[0], -1, 8)[..., list(AWQ_ORDER)])
