"""Attention of sequences with any number of new tokens over paged KV (FlashAttention-2, Dao 2023).

A tile's rows are the query heads that read one KV head, token by token: a program serves all of
them with one reading of the keys. The queries are rotated as they are loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_softmax import LIFT, add_values, softmax_step
from kernels.gpu.decode_attention import TL_DTYPES
from kernels.gpu.decode_rows import LOG2_E
from kernels.gpu.kv_dequantize import dequantized
from kernels.gpu.kv_tiles import (
    dot_dtype,
    dot_keys,
    load_tile,
    packed_params,
    part_width,
    pool_words,
    rotated,
    store_output,
    tile_blocks,
    tile_slots,
    unpack_params,
)
from kernels.gpu.launch import (
    cdiv,
    launch,
    launch_options,
    next_power_of_2,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)
from kernels.ops import LARGEST_KV_COPY, AttentionMetadata, KVCache


@triton.jit
def _attend_tiles(
    tile_from, tile_to, m, total, offset, a, b, c, d, qa, qb, qc, qd, q_sum, positions, row_start,
    k_head, v_head, k_params, v_params, table, limit, softmax_scale,
    pool_stride_slot, params_stride_slot, words,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Tiles of keys; with MASKED a row sees keys from row_start to positions, both [BLOCK_M]."""
    blocks = tile_blocks(table, tile_from * BLOCK_N, limit, BLOCK_N, BLOCK_SIZE)
    for tile in tl.range(tile_from, tile_to, num_stages=STAGES):
        origin, slots = tile_slots(blocks, tile * BLOCK_N, BLOCK_N, BLOCK_SIZE)
        blocks = tile_blocks(table, (tile + 1) * BLOCK_N, limit, BLOCK_N, BLOCK_SIZE)
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tile_at = origin * pool_stride_slot
        ka, kb, kc, kd = load_tile(
            k_head + tile_at, slots, pool_stride_slot, words, keys < limit, D, BITS, DTYPE, PTX,
            MASKED,
        )  # fmt: skip
        scores = dot_keys(qa, qb, qc, qd, ka, kb, kc, kd, BITS, PRECISION)
        v_scale = 1.0
        v_zero = 0.0
        if BITS < 16:
            at = (origin + slots) * params_stride_slot
            k_word = tl.load(k_params + at, mask=keys < limit, other=0)
            v_word = tl.load(v_params + at, mask=keys < limit, other=0)
            k_scale, k_zero = unpack_params(k_word)
            v_scale, v_zero = unpack_params(v_word)
            scores = tl.fma(
                scores, k_scale[None, :] + tl.zeros_like(scores), q_sum[:, None] * k_zero[None, :]
            )
        valid = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= row_start[:, None])
        p, alpha, m, total, offset = softmax_step(
            scores, valid, m, total, offset, v_scale, v_zero, softmax_scale, BITS, MASKED
        )
        va, vb, vc, vd = load_tile(
            v_head + tile_at, slots, pool_stride_slot, words, keys < limit, D, BITS, DTYPE, PTX,
            MASKED,
        )  # fmt: skip
        a, b, c, d = add_values(p, alpha, a, b, c, d, va, vb, vc, vd, BITS, PRECISION)
    return m, total, offset, a, b, c, d


# Of these numbers no variant is worth compiling.
@triton.jit(do_not_specialize=["first_sequence", "table_stride"])
def _prefill_kernel(
    out_ptr, q_ptr, cos_ptr, sin_ptr, k_pool, v_pool, k_params, v_params,
    block_table, cu_seqlens, seq_lens, softmax_scale, first_sequence,
    q_stride_token, q_stride_head, rotary_stride, pool_stride_head, pool_stride_slot,
    params_stride_head, params_stride_slot, table_stride,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY_DIM: tl.constexpr,
    BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, tiles of the longest query, sequences)."""
    kv_head = tl.program_id(0)
    sequence = first_sequence + tl.program_id(2)
    release_successor(PDL)
    wait_for_predecessor(PDL)
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    query_start = tl.load(cu_seqlens + sequence)
    query_len = tl.load(cu_seqlens + sequence + 1) - query_start
    seq_len = tl.load(seq_lens + sequence)
    # The last tiles see the most keys: they start first, so that none is alone at the end.
    tile_m = tl.cdiv(query_len, TOKENS) - 1 - tl.program_id(1)
    if tile_m < 0:
        return
    rows = tl.arange(0, BLOCK_M)
    tokens = tile_m * TOKENS + rows // GROUP
    used = (rows < TOKENS * GROUP) & (tokens < query_len)
    before = seq_len - query_len
    # Padding has a length of 0 and one query at position -1, which sees nothing.
    positions = before + tokens
    row_start = positions * 0
    if WINDOW > 0:
        row_start = tl.maximum(positions - (WINDOW - 1), 0)
    first = before + tile_m * TOKENS  # position of the tile's first token
    limit = tl.minimum(first + TOKENS, seq_len)
    tile_from = 0
    if WINDOW > 0:
        tile_from = tl.maximum(first - (WINDOW - 1), 0) // BLOCK_N
    tile_to = tl.cdiv(limit, BLOCK_N)
    # Up to here every row sees every key of a tile.
    tile_full = tl.minimum(tl.maximum(first + 1, 0) // BLOCK_N, tile_to)
    if WINDOW > 0:
        tile_full = tile_from

    words = tl.arange(0, WIDTH)[None, :]
    flat = (query_start + tokens).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    q_rows = q_ptr + (flat * q_stride_token + heads * q_stride_head)[:, None]
    cos = cos_ptr + (flat * rotary_stride)[:, None] if ROTARY_DIM > 0 else None
    sin = sin_ptr + (flat * rotary_stride)[:, None] if ROTARY_DIM > 0 else None
    qa, qb, qc, qd = rotated(q_rows, cos, sin, used[:, None], WIDTH, D, ROTARY_DIM, BITS)
    qa = qa.to(DTYPE)
    q_sum = 0.0
    if BITS < 16:
        qb = qb.to(DTYPE)
        q_sum = tl.sum(qa.to(tl.float32), 1) + tl.sum(qb.to(tl.float32), 1)
        k_params += kv_head.to(tl.int64) * params_stride_head
        v_params += kv_head.to(tl.int64) * params_stride_head
    if BITS == 4:
        qc = qc.to(DTYPE)
        qd = qd.to(DTYPE)
        q_sum += tl.sum(qc.to(tl.float32), 1) + tl.sum(qd.to(tl.float32), 1)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    offset = tl.zeros((BLOCK_M,), tl.float32)
    a = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    b = tl.zeros((BLOCK_M, WIDTH), tl.float32) if BITS < 16 else 0.0
    c = tl.zeros((BLOCK_M, WIDTH), tl.float32) if BITS == 4 else 0.0
    d = tl.zeros((BLOCK_M, WIDTH), tl.float32) if BITS == 4 else 0.0
    k_head = k_pool + kv_head.to(tl.int64) * pool_stride_head
    v_head = v_pool + kv_head.to(tl.int64) * pool_stride_head
    table = block_table + sequence.to(tl.int64) * table_stride
    m, total, offset, a, b, c, d = _attend_tiles(
        tile_from, tile_full, m, total, offset, a, b, c, d, qa, qb, qc, qd, q_sum, positions,
        row_start, k_head, v_head, k_params, v_params, table, limit, softmax_scale,
        pool_stride_slot, params_stride_slot, words,
        D, BITS, BLOCK_SIZE, BLOCK_N, STAGES, False, DTYPE, PRECISION, PTX,
    )  # fmt: skip
    m, total, offset, a, b, c, d = _attend_tiles(
        tile_full, tile_to, m, total, offset, a, b, c, d, qa, qb, qc, qd, q_sum, positions,
        row_start, k_head, v_head, k_params, v_params, table, limit, softmax_scale,
        pool_stride_slot, params_stride_slot, words,
        D, BITS, BLOCK_SIZE, BLOCK_N, STAGES, True, DTYPE, PRECISION, PTX,
    )  # fmt: skip
    weight = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    if BITS < 16:
        offset = offset[:, None] * weight
        a = a * (weight / LIFT) + offset
        b = b * (weight / LIFT) + offset
        if BITS == 4:
            c = c * (weight / LIFT) + offset
            d = d * (weight / LIFT) + offset
    else:
        a = a * weight
    out = out_ptr + ((flat * (tl.num_programs(0) * GROUP) + heads) * D)[:, None]
    store_output(out, a, b, c, d, used[:, None], D, BITS)


def prefill_attention(
    out: Tensor,
    q: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    first_sequence: int = 0,
    config: tuple[int, int, int, int] | None = None,
    unpack_first: bool | None = None,
) -> None:
    """Attention of sequences from `first_sequence` on, into their rows of out [T, H, D].

    q [T, H, D] is rotated by rotary (cos and sin, float32 [T, R]) unless that is None; the pools
    hold the new tokens. `config`: rows and keys of a tile, warps, stages, instead of those chosen.
    `unpack_first`: whether quantized KV is copied out as float16, if it is not too much.
    """
    kv_heads, head_dim = cache.k.shape[0], q.shape[2]
    group = q.shape[1] // kv_heads
    sequences = metadata.seq_lens_k.shape[0] - first_sequence
    # Decode rows are counted apart from the others' longest.
    longest = max(metadata.max_query_len, 1 if metadata.num_decodes > first_sequence else 0)
    if sequences == 0 or longest == 0:
        return
    copied = sequences * metadata.max_seq_len * kv_heads * head_dim * 4
    if unpack_first is None:
        # Not for invariant bits: that would depend on the others' lengths.
        unpack_first = not metadata.batch_invariant and longest * group >= 256
    if cache.bits < 16 and unpack_first and copied <= LARGEST_KV_COPY:
        cache, metadata = dequantized(q, cache, metadata, first_sequence)
    dtype = dot_dtype(q, cache)
    block_m, block_n, warps, stages = config or _config(
        64 if metadata.batch_invariant else longest * group, cache.bits, head_dim, dtype
    )
    block_m = max(block_m, next_power_of_2(group))
    cos, sin = rotary if rotary is not None else (None, None)
    k_params, v_params = packed_params(cache.k_params), packed_params(cache.v_params)
    k_pool, v_pool = pool_words(cache.k, cache.bits), pool_words(cache.v, cache.bits)
    pdl = supports_pdl(q)
    grid = (kv_heads, cdiv(longest, block_m // group), sequences)
    launch(
        _prefill_kernel, grid,
        out, q, cos, sin, k_pool, v_pool, k_params, v_params,
        metadata.block_table, metadata.cu_seqlens_q, metadata.seq_lens_k, scale * LOG2_E,
        first_sequence, q.stride(0), q.stride(1), 0 if cos is None else cos.stride(0),
        k_pool.stride(0), k_pool.stride(1),
        *((0, 0) if k_params is None else k_params.stride()),
        metadata.block_table.stride(0),
        group, head_dim, part_width(head_dim, cache.bits), 0 if cos is None else cos.shape[-1],
        cache.bits, metadata.block_size, window or 0, block_m, block_n, stages,
        TL_DTYPES[dtype], "ieee" if dtype == torch.float32 else "tf32",
        q.is_cuda and dtype == torch.float16, pdl,
        num_warps=warps, **launch_options(pdl),
    )  # fmt: skip


def _config(rows: int, bits: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps, pipeline stages, for at most `rows` rows a sequence."""
    if dtype == torch.float32:
        return 16 if rows <= 16 else 32, 32, 4, 1
    if rows <= 16:
        return 16, 64, 4, 2
    if head_dim > 128:
        return 64, 32, 4, 2
    if bits < 16:
        return 32, 64, 4, 3
    return 64, 64, 4, 3
