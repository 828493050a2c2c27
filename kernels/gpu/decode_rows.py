"""Decode attention where each KV head serves one query head: multiply-adds, no tensor cores.

A tensor core multiplies 16 queries at a time; with one query 15 of them are padding, and keys and
values take a way through shared memory only to get there. Here they stay in the registers that
they are loaded into: a program reads tiles of REPEATS x LANES tokens, a few lanes to a token's
vector, and each of the LANES has a softmax and sums of its own, so that the loop has no barrier.
They are merged once, at the end. Splits, the new token and their merging are as in
`kernels.gpu.decode_attention`.

Old tokens' keys and values, lengths and block tables are read before the kernel's predecessor has
ended: in a step no kernel writes them, and between steps there is always a copy, which waits for
all before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_softmax import merge
from kernels.gpu.kv_rows import (
    load_rows,
    row_blocks,
    row_slots,
    store_row,
    whole_row,
    widened_rows,
)
from kernels.gpu.kv_tiles import (
    packed_params,
    part_width,
    pool_words,
    rotated,
    store_parts,
    unpack_params,
)
from kernels.gpu.launch import (
    launch,
    launch_options,
    next_power_of_2,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)
from kernels.gpu.splits import add_up_last, planned, tiles_of_split
from kernels.ops import AttentionMetadata, KVCache

LOG2_E = 1.4426950408889634
WORDS_A_LANE = 4  # 16 bytes, the widest load


# Of these numbers no variant is worth compiling.
@triton.jit(do_not_specialize=["splits", "least", "table_stride"])
def decode_rows_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pool, v_pool, k_words, v_words, k_params,
    v_params, slot_mapping, block_table, seq_lens, partial_ptr, stats_ptr, counter_ptr,
    softmax_scale, q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token,
    v_stride_head, rotary_stride, pool_stride_head, pool_stride_slot, words_stride_head,
    words_stride_slot, params_stride_head, params_stride_slot, table_stride, splits, least,
    D: tl.constexpr, WIDTH: tl.constexpr, ROTARY_DIM: tl.constexpr, BITS: tl.constexpr,
    STATIC: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr,
    AHEAD: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (heads, sequences, splits, and with SPLIT one more)."""
    BLOCK_N: tl.constexpr = REPEATS * LANES
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    head = kv_head.to(tl.int64)
    token = sequence.to(tl.int64)
    release_successor(PDL)
    seq_len = tl.load(seq_lens + sequence)
    old = seq_len - 1
    start, tile_from, tile_to, active, new = tiles_of_split(
        seq_len, split, splits, least, WINDOW, BLOCK_N, SPLIT
    )
    if split >= active:
        return  # without waiting, since split 0 always waits
    k_head = k_words + head * words_stride_head
    v_head = v_words + head * words_stride_head
    if BITS < 16:
        k_params += head * params_stride_head
        v_params += head * params_stride_head
    table = block_table + token * table_stride
    words = tl.arange(0, WORDS)
    blocks = row_blocks(table, tile_from, old, REPEATS, LANES, BLOCK_SIZE)
    slots, seen = row_slots(tile_from, start, old, blocks, BLOCK_SIZE, WINDOW, REPEATS, LANES)
    k, k_word = load_rows(
        k_head, k_params, slots, seen, words_stride_slot, params_stride_slot, words, D, BITS
    )
    v, v_word = load_rows(
        v_head, v_params, slots, seen, words_stride_slot, params_stride_slot, words, D, BITS
    )
    blocks = row_blocks(table, tile_from + 1, old, REPEATS, LANES, BLOCK_SIZE)
    slot = tl.load(slot_mapping + token)
    wait_for_predecessor(PDL)

    # Tiles of one row, so that the functions for tiles serve.
    one = tl.arange(0, 1)
    there = (one == 0)[:, None]
    cos = cos_ptr + token * rotary_stride
    sin = sin_ptr + token * rotary_stride
    q_row = q_ptr + token * q_stride_token + kv_head * q_stride_head + one[:, None]
    k_row = k_ptr + token * k_stride_token + kv_head * k_stride_head + one[:, None]
    v_row = v_ptr + token * v_stride_token + kv_head * v_stride_head + one[:, None]
    qa, qb, _, _ = rotated(q_row, cos, sin, there, WIDTH, D, ROTARY_DIM, BITS)
    q = whole_row(qa, qb, BITS)
    if not SPLIT:
        # Asked for here, they arrive while the older tokens are worked on.
        ka, kb, _, _ = rotated(k_row, cos, sin, there, WIDTH, D, ROTARY_DIM, BITS)
        va, vb, _, _ = rotated(v_row, None, None, there, WIDTH, D, 0, BITS)
    query = tl.reshape(q, (1, 1, q.shape[1]))
    if BITS < 16:
        q_sum = tl.sum(q)

    m = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    scales = tl.zeros((LANES,), tl.float32)  # of the values, times their probabilities
    zeros = tl.zeros((LANES,), tl.float32)
    a = tl.zeros((LANES, q.shape[1]), tl.float32)
    for tile in tl.range(tile_from, tile_to, num_stages=1):
        slots, next_seen = row_slots(
            tile + 1, start, old, blocks, BLOCK_SIZE, WINDOW, REPEATS, LANES
        )
        blocks = row_blocks(table, tile + 2, old, REPEATS, LANES, BLOCK_SIZE)
        if AHEAD:
            next_k, next_k_word = load_rows(
                k_head, k_params, slots, next_seen, words_stride_slot, params_stride_slot, words,
                D, BITS,
            )  # fmt: skip
            next_v, next_v_word = load_rows(
                v_head, v_params, slots, next_seen, words_stride_slot, params_stride_slot, words,
                D, BITS,
            )  # fmt: skip
        scores = tl.sum(widened_rows(k, BITS, BF16, PTX) * query, 2)
        if BITS < 16:
            k_scale, k_zero = unpack_params(k_word)
            scores = (scores - 1024.0 * q_sum) * k_scale + q_sum * k_zero
        scores = tl.where(seen, scores * softmax_scale, float("-inf"))
        if not AHEAD:
            k, k_word = load_rows(
                k_head, k_params, slots, next_seen, words_stride_slot, params_stride_slot, words,
                D, BITS,
            )  # fmt: skip
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A lane that has seen nothing yet: -inf less -inf would be NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        m = m_new
        total = total * alpha + tl.sum(p, 1)
        if BITS < 16:
            v_scale, v_zero = unpack_params(v_word)
            zeros = zeros * alpha + tl.sum(tl.where(seen, p * v_zero, 0.0), 1)
            p = tl.where(seen, p * v_scale, 0.0)
            scales = scales * alpha + tl.sum(p, 1)
        values = widened_rows(v, BITS, BF16, PTX)
        a = a * alpha[:, None] + tl.sum(p[:, :, None] * values, 1)
        seen = next_seen
        if AHEAD:
            k, k_word, v, v_word = next_k, next_k_word, next_v, next_v_word
        else:
            v, v_word = load_rows(
                v_head, v_params, slots, next_seen, words_stride_slot, params_stride_slot, words,
                D, BITS,
            )  # fmt: skip

    largest = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(total * weight, 0) + tl.zeros((1,), tl.float32)
    m = largest + tl.zeros((1,), tl.float32)
    if BITS < 16:
        a = a - 1024.0 * scales[:, None] + zeros[:, None]
    a = tl.sum(a * weight[:, None], 0)[None, :]

    if split == new:
        if SPLIT:
            ka, kb, _, _ = rotated(k_row, cos, sin, there, WIDTH, D, ROTARY_DIM, BITS)
            va, vb, _, _ = rotated(v_row, None, None, there, WIDTH, D, 0, BITS)
        stored = (one == 0) & (slot >= 0)
        pool_at = head * pool_stride_head + slot * pool_stride_slot + one
        params_at = slot * params_stride_slot + one
        parts = tl.arange(0, WIDTH)[None, :]
        ka, kb, _, _ = store_parts(
            ka, kb, 0.0, 0.0, k_pool + pool_at, k_params + params_at if BITS < 16 else None, parts,
            stored, D, BITS, STATIC,
        )  # fmt: skip
        va, vb, _, _ = store_parts(
            va, vb, 0.0, 0.0, v_pool + pool_at, v_params + params_at if BITS < 16 else None, parts,
            stored, D, BITS, STATIC,
        )  # fmt: skip
        score = tl.sum(q * whole_row(ka, kb, BITS), 1) * softmax_scale
        m, total, a, _, _, _ = merge(
            m, total, a, 0.0, 0.0, 0.0, score, whole_row(va, vb, BITS), 0.0, 0.0, 0.0, 16
        )

    pair = token * tl.num_programs(0) + kv_head
    out = out_ptr + pair * D
    if SPLIT:
        if active > 1:
            # [sequence, head, split, D]
            mine = pair * (splits + 1) + split
            store_row(partial_ptr + mine * D, a, D)
            tl.store(stats_ptr + mine * 2 + one, m)
            tl.store(stats_ptr + mine * 2 + 1 + one, total)
            add_up_last(
                out, partial_ptr, stats_ptr, counter_ptr, pair, splits, active, 1, D, CHUNK
            )
        else:
            _store_result(out, a, total, seq_len, D)
    else:
        _store_result(out, a, total, seq_len, D)


@triton.jit
def _store_result(out, a, total, seq_len, D: tl.constexpr):
    """Write sums [1, elements] over their total [1]; 0 for a padding sequence."""
    # Of padding nothing was attended to, whatever its q holds.
    keep = (tl.arange(0, 1) + seq_len > 0)[:, None]
    store_row(out, tl.where(keep, a / tl.where(keep, total[:, None], 1.0), 0.0), D)


def decode_rows(
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
    splits: tuple[int, int] | None = None,
    config: tuple[int, int, bool, int] = (8, 1, True, 0),
) -> None:
    """As `decode_attention` where H = K, 8 or 16 bits. `config` as `rows_config`'s."""
    sequences, heads, head_dim = metadata.num_decodes, cache.k.shape[0], q.shape[2]
    pdl = supports_pdl(q)
    repeats, warps, ahead, registers = config
    k_pool, v_pool = pool_words(cache.k, cache.bits), pool_words(cache.v, cache.bits)
    k_words, v_words = cache.k.view(torch.int32), cache.v.view(torch.int32)
    width = part_width(head_dim, cache.bits)
    words = width * k_pool.element_size() // 4
    lanes = 32 * warps * WORDS_A_LANE // words
    parts, least, work = planned(q, metadata, heads, 1, repeats * lanes, splits)
    k_params, v_params = packed_params(cache.k_params), packed_params(cache.v_params)
    launch(
        decode_rows_kernel, (heads, sequences, parts + 1 if parts > 1 else 1),
        out, q, k, v, cos, sin, k_pool, v_pool, k_words, v_words, k_params, v_params,
        metadata.slot_mapping, metadata.block_table, metadata.seq_lens_k, *work, scale * LOG2_E,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        cos.stride(0), k_pool.stride(0), k_pool.stride(1), k_words.stride(0), k_words.stride(1),
        *((0, 0) if k_params is None else k_params.stride()),
        metadata.block_table.stride(0), parts, least,
        head_dim, width, cos.shape[-1], cache.bits, cache.static, metadata.block_size,
        window or 0, parts > 1, max(1, 2048 * warps // next_power_of_2(head_dim)), repeats, lanes,
        words, ahead, cache.k.dtype == torch.bfloat16, q.is_cuda, pdl,
        num_warps=warps, **launch_options(pdl), **({"maxnreg": registers} if registers else {}),
    )  # fmt: skip


def rows_config(
    dtype: torch.dtype, bits: int, group: int, pairs: int
) -> tuple[int, int, bool, int] | None:
    """Tokens a lane has of a tile, warps, whether tiles are loaded a turn ahead, registers.

    None where tensor cores serve better. `pairs` of a sequence and a KV head, which `group` query
    heads read; 0 registers are as many as the compiler likes. Measured on an H200: see
    `decode_attention.QUANTIZED_TILES`, which takes over where this says None.
    """
    if group > 1 or bits == 4 or dtype == torch.float32:
        return None
    if bits == 8:
        if pairs <= 64 or 1024 <= pairs < 1536:
            return 8, 1, True, 0
        return (8, 2, True, 0) if pairs <= 176 else None
    if pairs <= 64:
        return 4, 2, True, 0
    return (4, 1, True, 0) if pairs >= 2048 else None
