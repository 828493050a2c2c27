"""Parts that the attention kernels share: rotating, quantizing, finding and widening KV.

A vector of a head is handled as its two halves everywhere, each padded to HALF columns (a power of
two, at least 16): rotating pairs them, and a byte of 4-bit KV holds one element of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KVCache


@triton.jit
def rotated(
    x_ptr, cos_ptr, sin_ptr, columns, mask, D: tl.constexpr, ROTARY_DIM: tl.constexpr
):
    """float32 tile of x after rotation, rounded to x's dtype as the reference does.

    x_ptr, cos_ptr, sin_ptr point to the rows' first elements, shapes that broadcast with columns.
    """
    mask = mask & (columns < D)
    x = tl.load(x_ptr + columns, mask=mask, other=0.0)
    if ROTARY_DIM > 0:
        rotary_half: tl.constexpr = ROTARY_DIM // 2
        turned = mask & (columns < ROTARY_DIM)
        partner = tl.where(columns < rotary_half, columns + rotary_half, columns - rotary_half)
        y = tl.load(x_ptr + partner, mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + columns, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + columns, mask=turned, other=0.0)
        y = tl.where(columns < rotary_half, -y, y)
        x = (x.to(tl.float32) * cos + y * sin).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def unpack_params(word):
    """(scale, zero) as float32 from the two float16 in an int32."""
    scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    zero = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def measure_params(low, high, columns, HALF_DIM: tl.constexpr, BITS: tl.constexpr):
    """The int32 of (scale, zero) of each row of (low, high) [rows, HALF] float32."""
    inside = columns < HALF_DIM
    top = tl.maximum(
        tl.max(tl.where(inside, low, float("-inf")), 1),
        tl.max(tl.where(inside, high, float("-inf")), 1),
    )
    zero = tl.minimum(
        tl.min(tl.where(inside, low, float("inf")), 1),
        tl.min(tl.where(inside, high, float("inf")), 1),
    )
    steps: tl.constexpr = float(2**BITS - 1)
    scale = tl.maximum(tl.div_rn(top - zero, tl.full(top.shape, steps, tl.float32)), 1e-7)
    low_half = scale.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high_half = zero.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low_half | (high_half << 16)).to(tl.int32, bitcast=True)


@triton.jit
def quantized(x, scale, zero, BITS: tl.constexpr):
    """Whole numbers, as float32, of x [rows, HALF] by scale and zero [rows]."""
    steps: tl.constexpr = float(2**BITS - 1)
    scaled = tl.div_rn(x - zero[:, None], scale[:, None] + tl.zeros_like(x))
    scaled = tl.minimum(tl.maximum(scaled, 0.0), steps)
    # Adding and taking away 1.5 * 2**23 rounds to the nearest, halves to even, as torch does.
    return (scaled + 12582912.0) - 12582912.0


@triton.jit
def store_rows(
    low, high, pool_ptr, params_ptr, columns, mask, HALF_DIM: tl.constexpr, BITS: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Write vectors (low, high) [rows, HALF] float32 where pool_ptr and params_ptr [rows] point.

    Returns what a reader will find there, as float32. `mask` [rows]: which rows are written.
    """
    inside = mask[:, None] & (columns < HALF_DIM)
    if BITS == 16:
        low = low.to(pool_ptr.dtype.element_ty)
        high = high.to(pool_ptr.dtype.element_ty)
        tl.store(pool_ptr[:, None] + columns, low, mask=inside)
        tl.store(pool_ptr[:, None] + HALF_DIM + columns, high, mask=inside)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        if STATIC:
            word = tl.load(params_ptr, mask=mask, other=0)
        else:
            word = measure_params(low, high, columns, HALF_DIM, BITS)
            tl.store(params_ptr, word, mask=mask)
        scale, zero = unpack_params(word)
        q_low = quantized(low, scale, zero, BITS)
        q_high = quantized(high, scale, zero, BITS)
        if BITS == 8:
            tl.store(pool_ptr[:, None] + columns, q_low.to(tl.uint8), mask=inside)
            tl.store(pool_ptr[:, None] + HALF_DIM + columns, q_high.to(tl.uint8), mask=inside)
        else:
            both = (q_low + 16.0 * q_high).to(tl.uint8)
            tl.store(pool_ptr[:, None] + columns, both, mask=inside)
        read_low = q_low * scale[:, None] + zero[:, None]
        read_high = q_high * scale[:, None] + zero[:, None]
        # Columns past the head's end must not count in a sum.
        return (
            tl.where(columns < HALF_DIM, read_low, 0.0),
            tl.where(columns < HALF_DIM, read_high, 0.0),
        )


@triton.jit
def tile_blocks(table_ptr, first, limit, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Blocks of the BLOCK_N positions from `first` on, one number if a tile lies in one block.

    Positions from `limit` on are in block 0. Loops ask for the next tile's blocks a turn ahead: in
    the turn itself, Triton would spend its pipeline's stages on this load, not on the tile's.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + first // BLOCK_SIZE, mask=first < limit, other=0)
    else:
        positions = first + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < limit, other=0)


@triton.jit
def tile_slots(blocks, first, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(origin, rows): slot origin + rows[i] holds position first + i, i < BLOCK_N."""
    offsets = tl.arange(0, BLOCK_N)
    blocks = blocks.to(tl.int64)
    if BLOCK_SIZE % BLOCK_N == 0:
        return blocks * BLOCK_SIZE + first % BLOCK_SIZE, offsets
    else:
        return 0, blocks * BLOCK_SIZE + (first + offsets) % BLOCK_SIZE


@triton.jit
def widened_bytes(x, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Bytes as numbers of DTYPE.

    A conversion instruction makes one number in the time of several others; a byte under 0x64 is
    already the float16 1024 + byte.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 hi, k, t0, t1;
            mov.b32 hi, 0x64646464;
            mov.b32 k, 0x64006400;
            prmt.b32 t0, $2, hi, 0x4140;
            prmt.b32 t1, $2, hi, 0x4342;
            sub.f16x2 $0, t0, k;
            sub.f16x2 $1, t1, k;
            }""",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )
    else:
        return x.to(DTYPE)


@triton.jit
def widened_nibbles(x, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """(low, high) halves of bytes as numbers of DTYPE; 0x64h0 is the float16 1024 + 16 h."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 hi, k, s, m, t0, t1, a, b, c, d;
            mov.b32 hi, 0x64646464;
            mov.b32 k, 0x64006400;
            mov.b32 s, 0x2c002c00;
            mov.b32 m, 0xd400d400;
            prmt.b32 t0, $4, hi, 0x4140;
            prmt.b32 t1, $4, hi, 0x4342;
            and.b32 a, t0, 0x640f640f;
            and.b32 b, t1, 0x640f640f;
            and.b32 c, t0, 0x64f064f0;
            and.b32 d, t1, 0x64f064f0;
            sub.f16x2 $0, a, k;
            sub.f16x2 $1, b, k;
            fma.rn.f16x2 $2, c, s, m;
            fma.rn.f16x2 $3, d, s, m;
            }""",
            "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )
    else:
        return (x & 15).to(DTYPE), (x >> 4).to(DTYPE)


@triton.jit
def load_tile(
    pool_ptr, rows, slot_stride, columns, valid, HALF_DIM: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr, MASKED: tl.constexpr = True,
):
    """The halves [BLOCK_N, HALF] of a tile's vectors, as stored but widened to DTYPE.

    Rows that are not `valid` [BLOCK_N] are 0: what lies there may be anything, NaN too. Without
    MASKED all are valid.
    """
    HALF: tl.constexpr = columns.shape[1]
    pointers = pool_ptr + rows[:, None] * slot_stride + columns
    mask = valid[:, None] if MASKED else columns >= 0
    if HALF != HALF_DIM:
        mask = mask & (columns < HALF_DIM)
    if BITS == 16:
        low = tl.load(pointers, mask=mask, other=0.0)
        high = tl.load(pointers + HALF_DIM, mask=mask, other=0.0)
        return low.to(DTYPE), high.to(DTYPE)
    elif BITS == 8:
        low = tl.load(pointers, mask=mask, other=0)
        high = tl.load(pointers + HALF_DIM, mask=mask, other=0)
        return widened_bytes(low, DTYPE, PTX), widened_bytes(high, DTYPE, PTX)
    else:
        return widened_nibbles(tl.load(pointers, mask=mask, other=0), DTYPE, PTX)


def half_columns(head_dim: int) -> int:
    """Columns a half of a head takes in a tile: what tl.dot needs at least is 16."""
    return max(16, triton.next_power_of_2(head_dim // 2))


def dot_dtype(q: Tensor, cache: KVCache) -> torch.dtype:
    """What the tensor cores multiply: whole numbers to 255 are exact in float16."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return torch.float32  # Triton's interpreter multiplies bfloat16's bits as whole numbers
    if cache.bits == 16 or q.dtype == torch.float32:
        return q.dtype
    return torch.float16


def packed_params(params: Tensor | None) -> Tensor | None:
    """(scale, zero) float16 [K, N, 2] as int32 [K, N]: read and written in one piece."""
    return None if params is None else params.view(torch.int32).squeeze(-1)


def check(q: Tensor, k: Tensor | None, cache: KVCache) -> None:
    """What the kernels assume of q [T, H, D], k [T, K, D] and the pools.

    Raises:
        ValueError: a shape, layout or number of bits that they do not serve.
    """
    _, num_heads, head_dim = q.shape
    kv_heads = cache.k.shape[0]
    if cache.bits not in (4, 8, 16):
        raise ValueError(f"KV of {cache.bits} bits; 4, 8 and 16 are known")
    if num_heads % kv_heads or num_heads // kv_heads > 64:
        raise ValueError(f"{num_heads} query heads over {kv_heads} KV heads")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"head_dim {head_dim}, which is no multiple of 8 up to 256")
    if cache.k.shape != cache.v.shape or cache.k.stride() != cache.v.stride():
        raise ValueError("the pools of keys and values have different layouts")
    if k is not None and k.shape[1:] != (kv_heads, head_dim):
        raise ValueError(f"keys {tuple(k.shape)} for {kv_heads} KV heads of {head_dim}")
