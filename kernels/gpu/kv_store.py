"""Rotate new keys, quantize, and write keys and values into the pools."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.kv_tiles import packed_params, part_width, pool_words, rotated, store_parts
from kernels.gpu.launch import (
    cdiv,
    launch,
    launch_options,
    next_power_of_2,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)
from kernels.ops import KVCache


@triton.jit
def _store_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, k_pool, v_pool, k_params, v_params, slot_mapping,
    k_stride_token, k_stride_head, v_stride_token, v_stride_head, rotary_stride,
    pool_stride_head, pool_stride_slot, params_stride_head, params_stride_slot,
    KV_HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY_DIM: tl.constexpr,
    BITS: tl.constexpr, STATIC: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of HEADS KV heads)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    release_successor(PDL)
    wait_for_predecessor(PDL)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    mask = heads < KV_HEADS
    words = tl.arange(0, WIDTH)[None, :]
    rows = (k_ptr + token * k_stride_token + heads * k_stride_head)[:, None]
    cos = cos_ptr + token * rotary_stride if ROTARY_DIM > 0 else None
    sin = sin_ptr + token * rotary_stride if ROTARY_DIM > 0 else None
    a, b, c, d = rotated(rows, cos, sin, mask[:, None], WIDTH, D, ROTARY_DIM, BITS)
    pool_offsets = heads.to(tl.int64) * pool_stride_head + slot * pool_stride_slot
    params_offsets = heads.to(tl.int64) * params_stride_head + slot * params_stride_slot
    store_parts(
        a, b, c, d, k_pool + pool_offsets, k_params + params_offsets if BITS < 16 else None,
        words, mask, D, BITS, STATIC,
    )  # fmt: skip
    rows = (v_ptr + token * v_stride_token + heads * v_stride_head)[:, None]
    a, b, c, d = rotated(rows, None, None, mask[:, None], WIDTH, D, 0, BITS)
    store_parts(
        a, b, c, d, v_pool + pool_offsets, v_params + params_offsets if BITS < 16 else None,
        words, mask, D, BITS, STATIC,
    )  # fmt: skip


def rope_and_store(
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cache: KVCache,
    slot_mapping: Tensor,
) -> None:
    """Rotate k [T, K, D] by rotary (cos and sin, float32 [T, R]) and store it, and v as it is."""
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    cos, sin = rotary if rotary is not None else (None, None)
    k_params, v_params = packed_params(cache.k_params), packed_params(cache.v_params)
    k_pool, v_pool = pool_words(cache.k, cache.bits), pool_words(cache.v, cache.bits)
    heads = min(8, next_power_of_2(kv_heads))
    pdl = supports_pdl(k)
    launch(
        _store_kernel, (tokens, cdiv(kv_heads, heads)),
        k, v, cos, sin, k_pool, v_pool, k_params, v_params, slot_mapping,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0 if cos is None else cos.stride(0),
        k_pool.stride(0), k_pool.stride(1),
        *((0, 0) if k_params is None else k_params.stride()),
        kv_heads, head_dim, part_width(head_dim, cache.bits), 0 if cos is None else cos.shape[-1],
        cache.bits, cache.static, heads, pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
