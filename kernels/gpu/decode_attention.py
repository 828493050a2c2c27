"""Attention of sequences with one new token each: rotation, KV write and attention in one launch.

Split-KV ("flash decoding", Dao et al. 2023): a program takes one sequence, one KV head with all the
query heads that read it, and a run of tiles of the sequence's older tokens. The new token itself is
no tile: its score and value join the online softmax straight from registers, while they are
written to the pool; so nothing written here is read back. The program of a (sequence, KV
head) that finishes last adds up the others' partial results in the splits' order, so the bits do
not depend on who was last.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_softmax import LIFT, add_values, merge, softmax_step
from kernels.gpu.decode_rows import LOG2_E, decode_rows, rows_config
from kernels.gpu.kv_tiles import (
    dot_dtype,
    dot_keys,
    load_tile,
    packed_params,
    part_width,
    pool_words,
    rotated,
    store_output,
    store_parts,
    tile_blocks,
    tile_slots,
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
from kernels.gpu.splits import add_up_last, planned, store_result, tiles_of_split
from kernels.ops import AttentionMetadata, KVCache

# By bits: up to so many pairs of a sequence and a KV head, as `_config`. The fastest on an H200,
# mostly (docs/performance-log.md). Many programs of one warp keep the memory busier than fewer of
# two, which are quicker for themselves; four warps serve some 256 pairs, which are split no more.
QUANTIZED_TILES = {
    8: (
        (32, (32, 1, 3, 0)),
        (176, (64, 2, 3, 0)),
        (400, (64, 4, 3, 0)),
        (1000, (64, 2, 3, 0)),
        (math.inf, (32, 1, 3, 0)),
    ),
    4: ((1000, (64, 2, 3, 0)), (math.inf, (32, 1, 3, 0))),
}
TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _prefetch_tile(
    k_head, v_head, blocks, tile_from, pool_stride_slot, D: tl.constexpr, BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ask for the split's first tile, into L2, while earlier kernels still run."""
    if BLOCK_SIZE % BLOCK_N == 0:
        slot = blocks.to(tl.int64) * BLOCK_SIZE + tile_from * BLOCK_N % BLOCK_SIZE
        size: tl.constexpr = k_head.dtype.element_ty.primitive_bitwidth // 8
        line: tl.constexpr = 128 // size
        lines: tl.constexpr = triton.next_power_of_2(triton.cdiv(D * BITS // 8, 128))
        at = slot * pool_stride_slot + (tl.arange(0, BLOCK_N) * pool_stride_slot)[:, None]
        at = at + (tl.arange(0, lines) * line)[None, :]
        for head in tl.static_range(2):
            addresses = ((k_head if head == 0 else v_head) + at).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


# Of these numbers no variant is worth compiling.
@triton.jit(do_not_specialize=["splits", "least", "table_stride"])
def _decode_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pool, v_pool, k_params, v_params,
    slot_mapping, block_table, seq_lens, partial_ptr, stats_ptr, counter_ptr, softmax_scale,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    rotary_stride, pool_stride_head, pool_stride_slot, params_stride_head, params_stride_slot,
    table_stride, splits, least,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY_DIM: tl.constexpr,
    BITS: tl.constexpr, STATIC: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, sequences, splits, and with SPLIT one more)."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    head = kv_head.to(tl.int64)
    token = sequence.to(tl.int64)
    k_head = k_pool + head * pool_stride_head
    v_head = v_pool + head * pool_stride_head
    table = block_table + token * table_stride
    release_successor(PDL)
    # No kernel of a step writes lengths and tables (see `kernels.gpu.decode_rows`).
    seq_len = tl.load(seq_lens + sequence)
    old = seq_len - 1
    start, tile_from, tile_to, active, new = tiles_of_split(
        seq_len, split, splits, least, WINDOW, BLOCK_N, SPLIT
    )
    if split >= active:
        return  # without waiting, since split 0 always waits
    blocks = tile_blocks(table, tile_from * BLOCK_N, old, BLOCK_N, BLOCK_SIZE)
    if PDL:
        _prefetch_tile(
            k_head, v_head, blocks, tile_from, pool_stride_slot, D, BITS, BLOCK_SIZE, BLOCK_N
        )
    wait_for_predecessor(PDL)

    words = tl.arange(0, WIDTH)[None, :]
    rows = tl.arange(0, BLOCK_M)
    used = rows < GROUP
    cos = cos_ptr + token * rotary_stride
    sin = sin_ptr + token * rotary_stride
    q_rows = q_ptr + token * q_stride_token
    q_rows = q_rows + ((kv_head * GROUP + rows) * q_stride_head)[:, None]
    qa, qb, qc, qd = rotated(q_rows, cos, sin, used[:, None], WIDTH, D, ROTARY_DIM, BITS)
    qa = qa.to(DTYPE)
    if BITS < 16:
        qb = qb.to(DTYPE)
    if BITS == 4:
        qc = qc.to(DTYPE)
        qd = qd.to(DTYPE)
    # Tiles of one row, so that the functions for tiles serve.
    one = tl.arange(0, 1)
    there = (one == 0)[:, None]
    k_row = k_ptr + token * k_stride_token + kv_head * k_stride_head + one[:, None]
    v_row = v_ptr + token * v_stride_token + kv_head * v_stride_head + one[:, None]
    if not SPLIT:
        # Asked for here, they arrive while the older tokens are worked on.
        ka, kb, kc, kd = rotated(k_row, cos, sin, there, WIDTH, D, ROTARY_DIM, BITS)
        va, vb, vc, vd = rotated(v_row, None, None, there, WIDTH, D, 0, BITS)
    if BITS < 16:
        k_params += head * params_stride_head
        v_params += head * params_stride_head
        q_sum = tl.sum(qa.to(tl.float32), 1) + tl.sum(qb.to(tl.float32), 1)
        if BITS == 4:
            q_sum += tl.sum(qc.to(tl.float32), 1) + tl.sum(qd.to(tl.float32), 1)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # A sum for each column of a tile: adding them up once at the end spares the warps a meeting.
    totals = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offsets = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if BITS < 16 else 0.0
    a = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    b = tl.zeros((BLOCK_M, WIDTH), tl.float32) if BITS < 16 else 0.0
    c = tl.zeros((BLOCK_M, WIDTH), tl.float32) if BITS == 4 else 0.0
    d = tl.zeros((BLOCK_M, WIDTH), tl.float32) if BITS == 4 else 0.0
    for tile in tl.range(tile_from, tile_to, num_stages=STAGES):
        origin, slots = tile_slots(blocks, tile * BLOCK_N, BLOCK_N, BLOCK_SIZE)
        blocks = tile_blocks(table, (tile + 1) * BLOCK_N, old, BLOCK_N, BLOCK_SIZE)
        positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = positions < old
        if WINDOW > 0:
            valid = valid & (positions >= start)
        tile_at = origin * pool_stride_slot
        oa, ob, oc, od = load_tile(
            k_head + tile_at, slots, pool_stride_slot, words, valid, D, BITS, DTYPE, PTX, True
        )
        scores = dot_keys(qa, qb, qc, qd, oa, ob, oc, od, BITS, PRECISION)
        v_scale = 1.0
        v_zero = 0.0
        if BITS < 16:
            params_at = (origin + slots) * params_stride_slot
            k_scale, k_zero = unpack_params(tl.load(k_params + params_at, mask=valid, other=0))
            v_scale, v_zero = unpack_params(tl.load(v_params + params_at, mask=valid, other=0))
            scores = scores * k_scale[None, :] + q_sum[:, None] * k_zero[None, :]
        p, alpha, m, totals, offsets = softmax_step(
            scores, valid[None, :], m, totals, offsets, v_scale, v_zero, softmax_scale, BITS, True
        )
        # Asked for here, not beside the keys, the values take no registers during the softmax.
        pa, pb, pc, pd = load_tile(
            v_head + tile_at, slots, pool_stride_slot, words, valid, D, BITS, DTYPE, PTX, True
        )
        a, b, c, d = add_values(p, alpha, a, b, c, d, pa, pb, pc, pd, BITS, PRECISION)
    total = tl.sum(totals, 1)
    if BITS < 16:
        offset = tl.sum(offsets, 1)[:, None]
        a = a / LIFT + offset
        b = b / LIFT + offset
        if BITS == 4:
            c = c / LIFT + offset
            d = d / LIFT + offset

    if split == new:
        if SPLIT:
            ka, kb, kc, kd = rotated(k_row, cos, sin, there, WIDTH, D, ROTARY_DIM, BITS)
            va, vb, vc, vd = rotated(v_row, None, None, there, WIDTH, D, 0, BITS)
        slot = tl.load(slot_mapping + token)
        stored = (one == 0) & (slot >= 0)
        pool_at = slot * pool_stride_slot + one
        params_at = slot * params_stride_slot + one
        na, nb, nc, nd = store_parts(
            ka, kb, kc, kd, k_head + pool_at, k_params + params_at if BITS < 16 else None,
            words, stored, D, BITS, STATIC,
        )  # fmt: skip
        wa, wb, wc, wd = store_parts(
            va, vb, vc, vd, v_head + pool_at, v_params + params_at if BITS < 16 else None,
            words, stored, D, BITS, STATIC,
        )  # fmt: skip
        score = tl.sum(qa.to(tl.float32) * na, 1)
        if BITS < 16:
            score += tl.sum(qb.to(tl.float32) * nb, 1)
        if BITS == 4:
            score += tl.sum(qc.to(tl.float32) * nc, 1) + tl.sum(qd.to(tl.float32) * nd, 1)
        score *= softmax_scale
        m, total, a, b, c, d = merge(m, total, a, b, c, d, score, wa, wb, wc, wd, BITS)

    pair = token * tl.num_programs(0) + kv_head
    out = out_ptr + pair * (GROUP * D)
    if SPLIT:
        if active > 1:
            # [sequence, KV head, split, query head of the group, D]
            mine = (pair * (splits + 1) + split) * GROUP + rows
            store_output(partial_ptr + (mine * D)[:, None], a, b, c, d, used[:, None], D, BITS)
            tl.store(stats_ptr + mine * 2, m, mask=used)
            tl.store(stats_ptr + mine * 2 + 1, total, mask=used)
            add_up_last(
                out, partial_ptr, stats_ptr, counter_ptr, pair, splits, active, GROUP, D, CHUNK
            )
        else:
            store_result(out, a, b, c, d, total, rows, used, seq_len, D, BITS)
    else:
        store_result(out, a, b, c, d, total, rows, used, seq_len, D, BITS)


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
    splits: tuple[int, int] | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """`kernels.ops.attention` of the first num_decodes tokens into out [T, H, D], contiguous.

    `splits` (as `choose_splits`) and `config` (tile, warps, pipeline stages, registers a thread or
    0 for as many as the compiler likes) instead of those chosen here.
    """
    sequences, kv_heads, head_dim = metadata.num_decodes, cache.k.shape[0], q.shape[2]
    group = q.shape[1] // kv_heads
    rows = rows_config(cache.k.dtype, cache.bits, group, sequences * kv_heads)
    if rows is not None and config is None:
        decode_rows(out, q, k, v, cos, sin, cache, metadata, scale, window, splits, rows)
        return
    pdl = supports_pdl(q)
    dtype = dot_dtype(q, cache)
    tile, warps, stages, registers = config or _config(
        cache.bits, head_dim, group, sequences * kv_heads, dtype
    )
    parts, least, work = planned(q, metadata, kv_heads, group, tile, splits)
    k_params, v_params = packed_params(cache.k_params), packed_params(cache.v_params)
    k_pool, v_pool = pool_words(cache.k, cache.bits), pool_words(cache.v, cache.bits)
    # Partial results that fit in the registers at once.
    chunk = 2048 * warps // (next_power_of_2(group) * next_power_of_2(head_dim))
    launch(
        _decode_kernel, (kv_heads, sequences, parts + 1 if parts > 1 else 1),
        out, q, k, v, cos, sin, k_pool, v_pool, k_params, v_params,
        metadata.slot_mapping, metadata.block_table, metadata.seq_lens_k, *work, scale * LOG2_E,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        cos.stride(0), k_pool.stride(0), k_pool.stride(1),
        *((0, 0) if k_params is None else k_params.stride()),
        metadata.block_table.stride(0), parts, least,
        group, head_dim, part_width(head_dim, cache.bits), cos.shape[-1],
        cache.bits, cache.static, metadata.block_size, window or 0,
        parts > 1, max(1, chunk), max(16, next_power_of_2(group)), tile, stages,
        TL_DTYPES[dtype], "ieee" if dtype == torch.float32 else "tf32",
        q.is_cuda and dtype == torch.float16, pdl,
        num_warps=warps, **launch_options(pdl), **({"maxnreg": registers} if registers else {}),
    )  # fmt: skip


def _config(
    bits: int, head_dim: int, group: int, pairs: int, dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """Tokens of a tile, warps, pipeline stages, registers a thread (0: any number).

    `pairs` of a sequence and a KV head, which `group` query heads read.
    """
    if dtype == torch.float32 or head_dim > 128 or group > 16:
        return 32, 4, 2, 0
    if bits == 16:
        # Without groups short tiles: 16 x 300 tokens 24 µs on an H200 (64 tokens a tile: 31).
        return (32, 2, 3, 0) if group == 1 else (64, 2, 2, 0)
    return next(config for most, config in QUANTIZED_TILES[bits] if pairs <= most)
