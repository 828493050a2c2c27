"""Split-KV ("flash decoding", Dao et al. 2023): which program of a decode reads which tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_softmax import combine
from kernels.gpu.kv_tiles import store_output
from kernels.gpu.launch import cdiv, num_sms
from kernels.ops import AttentionMetadata


@triton.jit
def tiles_of_split(
    seq_len, split, splits, least, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """(first old position seen, from tile, to tile, splits at work, which has the new token).

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
    new = 0
    if SPLIT:
        # Quantizing takes long: beside several programs with tiles the new token gets its own.
        new = tl.where(active > 1, active, 0)
        active = tl.where(active > 1, active + 1, 1)
    return start, tile_from, tl.minimum(tile_from + per_split, first + tiles), active, new


@triton.jit
def add_up_last(
    out, partial_ptr, stats_ptr, counter_ptr, pair, splits, active, GROUP: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """After a split's results are stored: whoever is the pair's last of `active` adds all up."""
    # All threads' stores come before the one thread's release of them.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
    if arrived == active - 1:
        tl.store(counter_ptr + pair, 0)
        combine(
            out, partial_ptr, stats_ptr, pair * (splits + 1) * GROUP, active, GROUP, D, CHUNK
        )


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

    Four programs a multiprocessor keep the memory busy; more only come and go: with eight, 8
    sequences of 8 heads and 1024 tokens take 20 µs on an H200 instead of 16. Where that would be
    less than three splits, sequences are split only if they may be so long that one would keep the
    others waiting: 16 sequences of 32 heads and 300 tokens take 24 µs whole, 31 where three splits
    were possible and one was used.
    """
    pairs = sequences * kv_heads
    least = max(1, 1024 * pairs // (4 * sms) // block_n)
    tiles = max(1, cdiv(max_seq_len, block_n))
    most = min(4 * sms // pairs, 32)
    if most < 3:
        most = cdiv(max_seq_len, 8192)
    return min(cdiv(tiles, least), most, 128), least


Work = tuple[Tensor | None, Tensor | None, Tensor | None]


def planned(
    q: Tensor, metadata: AttentionMetadata, kv_heads: int, rows: int, tile: int,
    splits: tuple[int, int] | None,
) -> tuple[int, int, Work]:  # fmt: skip
    """(splits, tiles of each at least, workspace) of a decode whose programs have `rows` queries.

    `splits` instead of those chosen for tiles of `tile` tokens.
    """
    sequences = metadata.num_decodes
    if splits is None:
        sms = num_sms(q.device.index or 0) if q.is_cuda else 1
        splits = choose_splits(sequences, kv_heads, metadata.max_seq_len, tile, sms)
    parts, least = splits
    if parts == 1:
        return parts, least, (None, None, None)
    pairs = sequences * kv_heads
    return parts, least, workspace(metadata, pairs, parts + 1, rows, q.shape[2], q)


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
