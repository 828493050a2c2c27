"""Attention of sequences with one new token each: rotation, KV write and attention in one launch.

Split-KV ("flash decoding", Dao et al. 2023): a program takes one sequence, one KV head with all the
query heads that read it, and a run of tiles of the sequence's older tokens. The new token itself is
no tile: its score and value start the online softmax of split 0, straight from registers, while
they are written to the pool; so nothing written here is read back. The program of a (sequence, KV
head) that finishes last adds up the others' partial results in the splits' order, so the bits do
not depend on who was last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.kv_tiles import (
    dot_dtype,
    half_columns,
    load_tile,
    packed_params,
    rotated,
    store_rows,
    tile_blocks,
    tile_slots,
    unpack_params,
)
from kernels.gpu.launch import (
    launch_options,
    num_sms,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)
from kernels.ops import AttentionMetadata, KVCache

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOG2_E = 1.4426950408889634
# Whole numbers of values are multiplied by probability * scale, which in float16 would be lost
# below 6e-8; times 256, a scale of 1e-3 still leaves probabilities down to 1e-6 their weight.
LIFT: tl.constexpr = tl.constexpr(256.0)


@triton.jit
def attend(
    scores, valid, m, total, zeros, low, high, v_low, v_high, v_scale, v_zero, softmax_scale,
    BITS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's step of the online softmax (Milakov & Gimelshein 2018).

    scores [BLOCK_M, BLOCK_N] not yet scaled; m, total [BLOCK_M] running maximum (scaled, base
    2) and sum; zeros [BLOCK_M] sum of probability * zero of the values; low, high [BLOCK_M, HALF]
    sums of probability * value, for quantized values of the whole numbers times LIFT. The products
    are spelled out as fma so that masked and unmasked tiles round alike.
    """
    if MASKED:
        scores = tl.where(valid, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * softmax_scale)
    # A row that has seen nothing yet: -inf less -inf would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(scores, softmax_scale + tl.zeros_like(scores), 0.0 - m_safe[:, None]))
    alpha = tl.exp2(m - m_safe)
    total = total * alpha + tl.sum(p, 1)
    if BITS < 16:
        zeros = zeros * alpha + tl.sum(p * v_zero[None, :], 1)
        p = p * (v_scale * LIFT)[None, :]
    p = p.to(v_low.dtype)
    low = tl.dot(p, v_low, low * alpha[:, None], input_precision=PRECISION)
    high = tl.dot(p, v_high, high * alpha[:, None], input_precision=PRECISION)
    return m_new, total, zeros, low, high


# Of these numbers no variant is worth compiling.
@triton.jit(do_not_specialize=["splits", "table_stride"])
def _decode_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pool, v_pool, k_params, v_params,
    slot_mapping, block_table, seq_lens, partial_ptr, stats_ptr, counter_ptr, softmax_scale,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    rotary_stride, pool_stride_head, pool_stride_slot, params_stride_head, params_stride_slot,
    table_stride, splits,
    GROUP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROTARY_DIM: tl.constexpr,
    BITS: tl.constexpr, STATIC: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, sequences, splits)."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    release_successor(PDL)
    wait_for_predecessor(PDL)
    HALF_DIM: tl.constexpr = D // 2
    seq_len = tl.load(seq_lens + sequence)
    old = seq_len - 1
    start = 0
    if WINDOW > 0:
        start = tl.maximum(seq_len - WINDOW, 0)
    first_tile = start // BLOCK_N
    tiles = tl.maximum(tl.cdiv(old, BLOCK_N) - first_tile, 0)
    per_split = tl.maximum(tl.cdiv(tiles, splits), 1)
    active = tl.maximum(tl.cdiv(tiles, per_split), 1)
    if split >= active:
        return

    columns = tl.arange(0, HALF)[None, :]
    rows = tl.arange(0, BLOCK_M)
    used = rows < GROUP
    token = sequence.to(tl.int64)
    cos = cos_ptr + token * rotary_stride
    sin = sin_ptr + token * rotary_stride
    inside = used[:, None] & (columns < HALF_DIM)
    q_rows = q_ptr + token * q_stride_token
    q_rows = q_rows + ((kv_head * GROUP + rows) * q_stride_head)[:, None]
    q_low = rotated(q_rows, cos, sin, columns, inside, D, ROTARY_DIM).to(DTYPE)
    q_high = rotated(q_rows, cos, sin, columns + HALF_DIM, inside, D, ROTARY_DIM).to(DTYPE)
    q_low32 = q_low.to(tl.float32)
    q_high32 = q_high.to(tl.float32)
    q_sum = tl.sum(q_low32, 1) + tl.sum(q_high32, 1)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    low = tl.zeros((BLOCK_M, HALF), tl.float32)
    high = tl.zeros((BLOCK_M, HALF), tl.float32)
    lift: tl.constexpr = 1.0 if BITS == 16 else LIFT
    head = kv_head.to(tl.int64)
    if split == 0:
        # A tile of one row, so that the functions for tiles serve.
        one = tl.arange(0, 1)
        slot = tl.load(slot_mapping + token)
        stored = (one == 0) & (slot >= 0)
        whole = (one == 0)[:, None] & (columns < HALF_DIM)
        k_row = k_ptr + token * k_stride_token + kv_head * k_stride_head + one[:, None]
        new_low = rotated(k_row, cos, sin, columns, whole, D, ROTARY_DIM)
        new_high = rotated(k_row, cos, sin, columns + HALF_DIM, whole, D, ROTARY_DIM)
        v_row = v_ptr + token * v_stride_token + kv_head * v_stride_head + one[:, None]
        v_low = tl.load(v_row + columns, mask=whole, other=0.0).to(tl.float32)
        v_high = tl.load(v_row + HALF_DIM + columns, mask=whole, other=0.0).to(tl.float32)
        at = head * pool_stride_head + slot * pool_stride_slot + one
        params_at = head * params_stride_head + slot * params_stride_slot + one
        new_low, new_high = store_rows(
            new_low, new_high, k_pool + at, k_params + params_at if BITS < 16 else None,
            columns, stored, HALF_DIM, BITS, STATIC,
        )  # fmt: skip
        v_low, v_high = store_rows(
            v_low, v_high, v_pool + at, v_params + params_at if BITS < 16 else None,
            columns, stored, HALF_DIM, BITS, STATIC,
        )  # fmt: skip
        score = tl.sum(q_low32 * new_low, 1) + tl.sum(q_high32 * new_high, 1)
        m = score * softmax_scale
        total += 1.0
        low += v_low * lift
        high += v_high * lift

    k_head = k_pool + head * pool_stride_head
    v_head = v_pool + head * pool_stride_head
    table = block_table + token * table_stride
    tile_from = first_tile + split * per_split
    tile_to = tl.minimum(tile_from + per_split, first_tile + tiles)
    blocks = tile_blocks(table, tile_from * BLOCK_N, old, BLOCK_N, BLOCK_SIZE)
    for tile in tl.range(tile_from, tile_to, num_stages=STAGES):
        origin, slots = tile_slots(blocks, tile * BLOCK_N, BLOCK_N, BLOCK_SIZE)
        blocks = tile_blocks(table, (tile + 1) * BLOCK_N, old, BLOCK_N, BLOCK_SIZE)
        positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = positions < old
        if WINDOW > 0:
            valid = valid & (positions >= start)
        tile_at = origin * pool_stride_slot
        k_low, k_high = load_tile(
            k_head + tile_at, slots, pool_stride_slot, columns, valid, HALF_DIM, BITS, DTYPE, PTX
        )
        v_low, v_high = load_tile(
            v_head + tile_at, slots, pool_stride_slot, columns, valid, HALF_DIM, BITS, DTYPE, PTX
        )
        scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
        v_scale = 1.0
        v_zero = 0.0
        if BITS < 16:
            params_at = head * params_stride_head + (origin + slots) * params_stride_slot
            k_scale, k_zero = unpack_params(tl.load(k_params + params_at, mask=valid, other=0))
            v_scale, v_zero = unpack_params(tl.load(v_params + params_at, mask=valid, other=0))
            scores = tl.fma(
                scores, k_scale[None, :] + tl.zeros_like(scores), q_sum[:, None] * k_zero[None, :]
            )
        m, total, zeros, low, high = attend(
            scores, valid[None, :], m, total, zeros, low, high, v_low, v_high, v_scale, v_zero,
            softmax_scale, BITS, True, PRECISION,
        )  # fmt: skip
    low = low / lift + zeros[:, None]
    high = high / lift + zeros[:, None]

    if SPLIT and active > 1:
        # [sequence, KV head, split, query head of the group, D]
        pair = token * tl.num_programs(0) + kv_head
        mine = (pair * splits + split) * GROUP + rows
        part = partial_ptr + mine[:, None] * D + columns
        tl.store(part, low, mask=inside)
        tl.store(part + HALF_DIM, high, mask=inside)
        tl.store(stats_ptr + mine * 2, m, mask=used)
        tl.store(stats_ptr + mine * 2 + 1, total, mask=used)
        # All threads' stores come before the one thread's release of them.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
        if arrived != active - 1:
            return
        tl.store(counter_ptr + pair, 0)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        low = tl.zeros((BLOCK_M, HALF), tl.float32)
        high = tl.zeros((BLOCK_M, HALF), tl.float32)
        for other in range(0, active):
            theirs = (pair * splits + other) * GROUP + rows
            part = partial_ptr + theirs[:, None] * D + columns
            # Past L1, which may hold what an earlier layer left in this workspace.
            m_other = tl.load(stats_ptr + theirs * 2, mask=used, other=0.0, cache_modifier=".cg")
            total_other = tl.load(
                stats_ptr + theirs * 2 + 1, mask=used, other=1.0, cache_modifier=".cg"
            )
            low_other = tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
            high_other = tl.load(part + HALF_DIM, mask=inside, other=0.0, cache_modifier=".cg")
            m_new = tl.maximum(m, m_other)
            alpha = tl.exp2(m - m_new)
            beta = tl.exp2(m_other - m_new)
            total = total * alpha + total_other * beta
            low = low * alpha[:, None] + low_other * beta[:, None]
            high = high * alpha[:, None] + high_other * beta[:, None]
            m = m_new

    # A padding sequence's row: nothing was attended to, whatever its q holds.
    keep = inside & (seq_len > 0)
    weight = 1.0 / tl.where(used & (seq_len > 0), total, 1.0)
    out = out_ptr + ((token * tl.num_programs(0) + kv_head) * GROUP + rows)[:, None] * D + columns
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out, tl.where(keep, low * weight[:, None], 0.0).to(kind), mask=inside)
    tl.store(out + HALF_DIM, tl.where(keep, high * weight[:, None], 0.0).to(kind), mask=inside)


def num_splits(sequences: int, kv_heads: int, max_seq_len: int, block_n: int, sms: int) -> int:
    """Splits of a sequence: as many as fill the multiprocessors four times, of a tile at least."""
    wanted = max(1, 4 * sms // (sequences * kv_heads))
    return min(wanted, max(1, triton.cdiv(max_seq_len, block_n)), 128)


def _workspace(
    metadata: AttentionMetadata, pairs: int, splits: int, group: int, head_dim: int, device: object
) -> tuple[Tensor, Tensor, Tensor]:
    """(partial sums, maxima and sums, counters at zero): one for all layers of a step."""
    key = f"decode_workspace_{pairs}_{splits}_{group}_{head_dim}"
    if key not in metadata.derived:
        floats = {"dtype": torch.float32, "device": device}
        metadata.derived[key] = (
            torch.empty(pairs * splits * group * head_dim, **floats),
            torch.empty(pairs * splits * group * 2, **floats),
            torch.zeros(pairs, dtype=torch.int32, device=device),
        )
    return metadata.derived[key]


def decode_attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    splits: int | None = None,
    config: tuple[int, int, int] | None = None,
) -> None:
    """`kernels.ops.attention` of the first num_decodes tokens into out [T, H, D], contiguous.

    `splits` and `config` (tile, warps, pipeline stages) instead of those chosen here.
    """
    sequences, kv_heads, head_dim = metadata.num_decodes, cache.k.shape[0], q.shape[2]
    group = q.shape[1] // kv_heads
    pdl = supports_pdl(q)
    dtype = dot_dtype(q, cache)
    tile, warps, stages = config or _config(cache.bits, head_dim, group, dtype)
    if splits is None:
        sms = num_sms(q.device.index or 0) if q.is_cuda else 1
        splits = num_splits(sequences, kv_heads, metadata.max_seq_len, tile, sms)
    work: tuple[Tensor | None, ...]
    if splits > 1:
        work = _workspace(metadata, sequences * kv_heads, splits, group, head_dim, q.device)
    else:
        work = (None, None, None)
    k_params, v_params = packed_params(cache.k_params), packed_params(cache.v_params)
    _decode_kernel[(kv_heads, sequences, splits)](
        out, q, k, v, cos, sin, cache.k, cache.v, k_params, v_params,
        metadata.slot_mapping, metadata.block_table, metadata.seq_lens_k, *work, scale * LOG2_E,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        cos.stride(0), cache.k.stride(0), cache.k.stride(1),
        *((0, 0) if k_params is None else k_params.stride()),
        metadata.block_table.stride(0), splits,
        group, head_dim, half_columns(head_dim), cos.shape[-1],
        cache.bits, cache.static, metadata.block_size, window or 0,
        splits > 1, max(16, triton.next_power_of_2(group)), tile, stages,
        TL_DTYPES[dtype], "ieee" if dtype == torch.float32 else "tf32",
        q.is_cuda and dtype == torch.float16, pdl,
        num_warps=warps, **launch_options(pdl),
    )  # fmt: skip


def _config(bits: int, head_dim: int, group: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of a tile, warps, pipeline stages."""
    if dtype == torch.float32 or head_dim > 128:
        return 32, 4, 2
    return 64, 4, 3
