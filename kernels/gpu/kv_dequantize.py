"""Quantized KV of some sequences as float16, side by side: what a long prompt reads many times.

A tensor core's second operand must lie in shared memory, so the attention kernel would unpack each
tile, once more for every tile of queries, and wait for it: on an H200 2048 tokens of 32 heads take
423 µs with 8 bits, 101 µs with 16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.kv_tiles import (
    dot_dtype,
    load_tile,
    packed_params,
    part_width,
    pool_words,
    store_output,
    tile_blocks,
    tile_slots,
    unpack_params,
)
from kernels.gpu.launch import (
    cdiv,
    launch,
    launch_options,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)
from kernels.ops import AttentionMetadata, KVCache

BLOCK = 64  # tokens of a block of the copy, and of a tile


@triton.jit(do_not_specialize=["first_sequence", "table_stride"])
def _dequantize_kernel(
    k_out, v_out, k_pool, v_pool, k_params, v_params, block_table, seq_lens, first_sequence,
    out_stride_head, pool_stride_head, pool_stride_slot, params_stride_head, params_stride_slot,
    table_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the longest sequence, KV heads, sequences)."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = (first_sequence + tl.program_id(2)).to(tl.int64)
    release_successor(PDL)
    wait_for_predecessor(PDL)
    seq_len = tl.load(seq_lens + sequence)
    first = tile * BLOCK_N
    if first >= seq_len:
        return
    table = block_table + sequence * table_stride
    blocks = tile_blocks(table, first, seq_len, BLOCK_N, BLOCK_SIZE)
    origin, slots = tile_slots(blocks, first, BLOCK_N, BLOCK_SIZE)
    rows = tl.arange(0, BLOCK_N)
    valid = first + rows < seq_len
    words = tl.arange(0, WIDTH)[None, :]
    out_slot = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tile) * BLOCK_N + rows
    out_at = (head * out_stride_head + out_slot * D)[:, None]
    pool_at = head * pool_stride_head + origin * pool_stride_slot
    params_at = head * params_stride_head + (origin + slots) * params_stride_slot
    for which in tl.static_range(2):
        pool = k_pool if which == 0 else v_pool
        params = k_params if which == 0 else v_params
        out = k_out if which == 0 else v_out
        a, b, c, d = load_tile(
            pool + pool_at, slots, pool_stride_slot, words, valid, D, BITS, DTYPE, PTX, True
        )
        scale, zero = unpack_params(tl.load(params + params_at, mask=valid, other=0))
        scale = scale[:, None]
        zero = zero[:, None]
        a = a.to(tl.float32) * scale + zero
        b = b.to(tl.float32) * scale + zero
        if BITS == 4:
            c = c.to(tl.float32) * scale + zero
            d = d.to(tl.float32) * scale + zero
        store_output(out + out_at, a, b, c, d, valid[:, None], D, BITS)


def dequantized(
    q: Tensor, cache: KVCache, metadata: AttentionMetadata, first_sequence: int
) -> tuple[KVCache, AttentionMetadata]:
    """The sequences from `first_sequence` on in pools of their own, and where they lie there.

    The copy takes max_seq_len tokens a sequence. Its block table still counts all sequences.
    """
    kv_heads, head_dim = cache.k.shape[0], q.shape[2]
    sequences = metadata.seq_lens_k.shape[0] - first_sequence
    tiles = cdiv(metadata.max_seq_len, BLOCK)
    dtype = dot_dtype(q, cache)
    k, v = torch.empty(
        (2, kv_heads, sequences * tiles * BLOCK, head_dim), dtype=dtype, device=q.device
    )
    k_pool, v_pool = pool_words(cache.k, cache.bits), pool_words(cache.v, cache.bits)
    k_params, v_params = packed_params(cache.k_params), packed_params(cache.v_params)
    assert k_params is not None and v_params is not None
    pdl = supports_pdl(q)
    launch(
        _dequantize_kernel, (tiles, kv_heads, sequences),
        k, v, k_pool, v_pool, k_params, v_params, metadata.block_table, metadata.seq_lens_k,
        first_sequence, k.stride(0), k_pool.stride(0), k_pool.stride(1), *k_params.stride(),
        metadata.block_table.stride(0),
        head_dim, part_width(head_dim, cache.bits), cache.bits, metadata.block_size, BLOCK,
        tl.float32 if dtype == torch.float32 else tl.float16,
        q.is_cuda and dtype == torch.float16, pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    key = f"dequantized_table_{first_sequence}_{tiles}"
    if key not in metadata.derived:
        table = torch.arange(
            -first_sequence * tiles, sequences * tiles, dtype=torch.int32, device=q.device
        )
        metadata.derived[key] = table.view(-1, tiles)
    return KVCache(k, v), replace(
        metadata, block_table=metadata.derived[key], block_size=BLOCK
    )
