"""Split-KV ("flash decoding", Dao et al. 2023): which program of a decode reads which tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.kv_tiles import store_output
from kernels.gpu.launch import cdiv
from kernels.ops import AttentionMetadata


@triton.jit
def tiles_of_split(
    seq_len, split, splits, least, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(first old position seen, from tile, to tile, splits that have tiles, at least 1).

    A split has `least` tiles, if there are so many.
    """
    start = 0
    if WINDOW > 0:
        start = tl.maximum(seq_len - WINDOW, 0)
    first = start // BLOCK_N
    tiles = tl.maximum(tl.cdiv(seq_len - 1, BLOCK_N) - first, 0)
    per_split = tl.maximum(tl.cdiv(tiles, splits), least)
    active = tl.maximum(tl.cdiv(tiles, per_split), 1)
    tile_from = first + split * per_split
    return start, tile_from, tl.minimum(tile_from + per_split, first + tiles), active


@triton.jit
def store_result(
    out, a, b, c, d, total, rows, used, seq_len, D: tl.constexpr, BITS: tl.constexpr
):
    """Write sums [BLOCK_M, WIDTH] over their total [BLOCK_M]; 0 for a padding sequence."""
    # Of padding nothing was attended to, whatever its q holds.
    keep = used[:, None] & (seq_len > 0)
    weight = 1.0 / tl.where(used & (seq_len > 0), total, 1.0)[:, None]
    a = tl.where(keep, a * weight, 0.0)
    if BITS < 16:
        b = tl.where(keep, b * weight, 0.0)
    if BITS == 4:
        c = tl.where(keep, c * weight, 0.0)
        d = tl.where(keep, d * weight, 0.0)
    store_output(out + (rows * D)[:, None], a, b, c, d, used[:, None], D, BITS)


def choose_splits(
    sequences: int, kv_heads: int, max_seq_len: int, block_n: int, sms: int
) -> tuple[int, int]:
    """(splits of a sequence, tiles that each has at least).

    Two programs a multiprocessor keep the memory busy. Beyond, sequences are split only if they may
    be so long that one would keep the others waiting: on an H200, 16 sequences of 32 heads and 300
    tokens take 24 µs whole, 31 where three splits were possible and one was used.
    """
    pairs = sequences * kv_heads
    least = max(1, 1024 * pairs // (4 * sms) // block_n)
    tiles = max(1, cdiv(max_seq_len, block_n))
    most = cdiv(8 * sms, pairs) if pairs < 2 * sms else cdiv(max_seq_len, 8192)
    return min(cdiv(tiles, least), most, 128), least


def workspace(
    metadata: AttentionMetadata, pairs: int, splits: int, rows: int, head_dim: int, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(partial sums, maxima and sums, counters at zero): one for all layers of a step."""
    key = f"decode_workspace_{pairs}_{splits}_{rows}_{head_dim}"
    if key not in metadata.derived:
        metadata.derived[key] = (
            torch.empty(pairs * splits * rows * head_dim, dtype=torch.float32, device=q.device),
            torch.empty(pairs * splits * rows * 2, dtype=torch.float32, device=q.device),
            torch.zeros(pairs, dtype=torch.int32, device=q.device),
        )
    return metadata.derived[key]
